package introspect

// CheckKprobes lists the breakpoints that the kernel has in its own code, and whom they call: kprobes, kretprobes, and the
// consumers of uprobes, which are breakpoints in programs.
func (g *Guest) CheckKprobes() ([]Finding, error) {
	return g.look(all((*control).kprobes, (*control).uprobes))
}

const (
	kprobeBuckets = 64 // KPROBE_TABLE_SIZE
	maxProbes     = 1 << 14
)

func (c *control) kprobes() error {
	table, err := c.symbolAddr("kprobe_table")
	if err != nil {
		return err
	}
	r := c.resolver()
	link, list := r.field("kprobe", "hlist"), r.field("kprobe", "list")
	if r.err != nil {
		return r.err
	}
	n := 0
	for i := range uint64(kprobeBuckets) {
		err := c.hashed(table+i*8, func(node uint64) error {
			if n++; n > maxProbes {
				return ErrEndless
			}
			probe := node - link
			if !c.kprobe(probe) {
				return nil
			}
			// Several at one place: this one only hands on to those on its list.
			return c.walk(probe+list, func(node uint64) error {
				if n++; n > maxProbes {
					return ErrEndless
				}
				c.kprobe(node - list)
				return nil
			})
		})
		if err != nil {
			return err
		}
	}
	return nil
}

// kprobe reports one probe, and returns whether it stands for several.
func (c *control) kprobe(probe uint64) (several bool) {
	r := c.resolver()
	addr, pre, post := r.field("kprobe", "addr"), r.field("kprobe", "pre_handler"), r.field("kprobe", "post_handler")
	read := reader{s: c.space}
	at, before, after := read.u64(probe+addr), read.u64(probe+pre), read.u64(probe+post)
	if r.err != nil || read.err != nil {
		return false
	}
	if before != 0 && before == c.known("aggr_pre_handler") {
		return true
	}
	name := c.where(at)
	if before != 0 && before == c.known("pre_handler_kretprobe") {
		ret, entry, exit := r.field("kretprobe", "kp"), r.field("kretprobe", "entry_handler"), r.field("kretprobe", "handler")
		c.probed(name, "kretprobe: the return of "+name, probe-ret+exit)
		c.probed(name, "kretprobe: the entry of "+name, probe-ret+entry)
		return false
	}
	c.probed(name, "kprobe: a breakpoint in "+name, probe+pre)
	if after != before {
		c.probed(name, "kprobe: after a breakpoint in "+name, probe+post)
	}
	return false
}

func (c *control) probed(subject, what string, pointer uint64) {
	if target, err := c.space.U64(pointer); err == nil && target != 0 {
		c.hook("kprobe.hook", subject, what, pointer, target)
	}
}

// uprobes lists who is called when a program comes past a breakpoint in its file.
func (c *control) uprobes() error {
	root, err := c.symbolAddr("uprobes_tree")
	if err != nil {
		return err
	}
	r := c.resolver()
	node, consumers := r.field("uprobe", "rb_node"), r.field("uprobe", "consumers")
	handler, exit := r.field("uprobe_consumer", "handler"), r.field("uprobe_consumer", "ret_handler")
	next := r.optional("uprobe_consumer", "next")
	link := r.optional("uprobe_consumer", "cons_node")
	if r.err != nil {
		return r.err
	}
	consumer := func(at uint64) error {
		for _, f := range []uint64{handler, exit} {
			if target, err := c.space.U64(at + f); err == nil && target != 0 {
				c.hook("kprobe.hook", "uprobe", "uprobe: a breakpoint in a program", at+f, target)
			}
		}
		return nil
	}
	return c.tree(root, func(at uint64) error {
		if link != noField {
			return c.walk(at-node+consumers, func(n uint64) error { return consumer(n - link) })
		}
		for one, n := at-node+consumers, 0; next != noField && n < maxProbes; n++ {
			if one, err = c.space.U64(one); err != nil || one == 0 {
				return nil
			}
			_ = consumer(one)
			one += next
		}
		return nil
	})
}
