package introspect

import "slices"

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

// tree calls visit with each node of a red-black tree, whose root pointer lies at root, in no order that matters. Nodes
// that do not point back at their parent tear it.
func (c *control) tree(root uint64, visit func(node uint64) error) error {
	top, err := c.space.U64(root)
	if err != nil || top == 0 {
		return err
	}
	type edge struct{ node, parent uint64 }
	pending := []edge{{top, 0}}
	for n := 0; len(pending) > 0; n++ {
		e := pending[len(pending)-1]
		pending = pending[:len(pending)-1]
		r := reader{s: c.space}
		parent, right, left := r.u64(e.node)&^3, r.u64(e.node+8), r.u64(e.node+16)
		if r.err != nil || parent != e.parent || n == maxNodes {
			return ErrTorn
		}
		for _, child := range []uint64{left, right} {
			if child != 0 {
				pending = append(pending, edge{child, e.node})
			}
		}
		if err := visit(e.node); err != nil {
			return err
		}
		if len(pending) > maxNodes {
			return ErrTorn
		}
	}
	return nil
}

// CheckTracepoints lists the functions that are called at the kernel's tracepoints.
func (g *Guest) CheckTracepoints() ([]Finding, error) { return g.look((*control).tracepoints) }

const maxTracepointProbes = 64

func (c *control) tracepoints() error {
	r := c.resolver()
	funcs, fn := r.field("tracepoint", "funcs"), r.field("tracepoint_func", "func")
	size, err := c.profile.Size("tracepoint_func")
	if r.err != nil || err != nil {
		return errNotBuilt
	}
	if c.points == nil {
		for s := range c.profile.SymbolsFrom("__tracepoint_") {
			c.points = append(c.points, s.Addr)
		}
		slices.Sort(c.points)
	}
	for _, link := range c.points {
		list, err := c.space.U64(link + c.boot.Slide + funcs)
		if err != nil || list == 0 {
			continue
		}
		name := c.symbol(link + c.boot.Slide)[len("__tracepoint_"):]
		for i := range uint64(maxTracepointProbes) {
			at := list + i*size + fn
			target, err := c.space.U64(at)
			if err != nil || target == 0 {
				break
			}
			c.hook("tracepoint.hook", name, "the tracepoint "+name, at, target)
		}
	}
	return nil
}
