package introspect

import (
	"encoding/binary"
	"slices"
)

// CheckLSM reports hooks of security modules, and functions on the kernel's notifier chains, that are not the kernel's.
func (g *Guest) CheckLSM() ([]Finding, error) {
	return g.look(all((*control).lsm, (*control).notifiers))
}

const maxLSM = 32 // modules on one hook

func (c *control) lsm() error {
	hook, err := c.profile.Offset("security_hook_list", "hook")
	if err != nil {
		return errNotBuilt
	}
	if table := c.known("static_calls_table"); table != 0 {
		return c.lsmCalls(table, hook)
	}
	return c.lsmLists(hook)
}

// lsmLists reads the lists of hooks that kernels have up to 6.11: one hlist for each.
func (c *control) lsmLists(hook uint64) error {
	table, err := c.symbolAddr("security_hook_heads")
	if err != nil {
		return err
	}
	size, err := c.profile.Size("security_hook_heads")
	link, err2 := c.profile.Offset("security_hook_list", "list")
	if err != nil || err2 != nil {
		return errNotBuilt
	}
	for at := table; at < table+min(size, 64<<10); at += 8 {
		n := 0
		err := c.hashed(at, func(node uint64) error {
			if n++; n > maxLSM {
				return ErrEndless
			}
			c.secured(node - link + hook)
			return nil
		})
		if err != nil {
			return err
		}
	}
	return nil
}

// lsmCalls reads the static calls that 6.12 has in their place: key, trampoline, hook, switch.
func (c *control) lsmCalls(table, hook uint64) error {
	size, err := c.profile.Size("lsm_static_calls_table")
	r := c.resolver()
	key, entry := r.field("lsm_static_call", "key"), r.field("lsm_static_call", "hl")
	function := r.field("static_call_key", "func")
	each, err2 := c.profile.Size("lsm_static_call")
	if err != nil || err2 != nil || r.err != nil || each == 0 || entry+8 > each || key+8 > each {
		return errNotBuilt
	}
	b, err := c.table(table, int(min(size, 256<<10)/each*each))
	if err != nil {
		return err
	}
	for b = slices.Clone(b); len(b) > 0; b = b[each:] {
		if at := binary.LittleEndian.Uint64(b[entry:]); at != 0 {
			c.secured(at + hook)
			c.secured(binary.LittleEndian.Uint64(b[key:]) + function)
		}
	}
	return nil
}

// secured looks at one hook: security modules are part of the kernel, so nobody else's code belongs there.
func (c *control) secured(pointer uint64) {
	target, err := c.space.U64(pointer)
	if err != nil || target == 0 || c.code.at(target).owner == ownerKernel && c.whole(target) {
		return
	}
	c.found(Finding{Kind: "lsm.hook", Subject: c.symbol(pointer), Severity: High,
		Detail: "a security hook calls " + c.where(target), Evidence: []Evidence{pointerAt(pointer, target, "")}})
}

// chains are notifier chains that are worth being on: for who wants to see keys, survive a reboot, hide a module or
// catch the kernel's own traps. Those that a kernel lacks are left out.
var chains = []struct{ name, typ string }{
	{"die_chain", "atomic"}, {"panic_notifier_list", "atomic"}, {"restart_handler_list", "atomic"},
	{"keyboard_notifier_list", "atomic"}, {"vt_notifier_list", "atomic"}, {"netlink_chain", "blocking"},
	{"reboot_notifier_list", "blocking"}, {"module_notify_list", "blocking"}, {"usb_notifier_list", "blocking"},
	{"inetaddr_chain", "blocking"}, {"oom_notify_list", "blocking"}, {"pm_chain_head", "blocking"},
	{"munmap_notifier", "blocking"}, {"task_exit_notifier", "blocking"}, {"crypto_chain", "blocking"},
	{"netdev_chain", "raw"}, {"cpu_chain", "raw"}, {"tracepoint_notify_list", "blocking"}, {"task_free_notifier", "atomic"},
	{"xaction_notifier_list", "atomic"}, {"clockevents_chain", "raw"}, {"acpi_chain_head", "blocking"},
}

const maxNotifiers = 512

func (c *control) notifiers() error {
	for _, chain := range chains {
		head := c.known(chain.name)
		offset, err := c.profile.Offset(chain.typ+"_notifier_head", "head")
		if head == 0 || err != nil {
			continue
		}
		c.notifierChain(chain.name, head+offset)
	}
	return nil
}

func (c *control) notifierChain(name string, pointer uint64) {
	r := c.resolver()
	call, next := r.field("notifier_block", "notifier_call"), r.field("notifier_block", "next")
	if r.err != nil {
		return
	}
	for range maxNotifiers {
		block, err := c.space.U64(pointer)
		if err != nil || block == 0 {
			return
		}
		target, err := c.space.U64(block + call)
		if err != nil {
			return
		}
		c.hooked("notifier.hook", name, "the notifier chain "+name, block+call, target)
		pointer = block + next
	}
}
