package introspect

import (
	"encoding/binary"
	"fmt"
	"slices"

	"vigia/internal/event"
)

// CheckNetwork lists the netfilter hooks of every network namespace, and reports whoever else sees packets and is neither the
// kernel nor a module that was built with it: packet types, protocols, devices' receive handlers.
func (g *Guest) CheckNetwork() ([]Finding, error) { return g.look((*control).network) }

const (
	maxNamespaces = 4096
	maxHooks      = 1024 // of one kind in one namespace
	maxDevices    = 1 << 14
	packetBuckets = 16 // PTYPE_HASH_SIZE
)

// netfilterPoints are where packets meet hooks, by number (include/uapi/linux/netfilter*.h).
var netfilterPoints = map[string][]string{
	"hooks_ipv4":   {"prerouting", "input", "forward", "output", "postrouting"},
	"hooks_ipv6":   {"prerouting", "input", "forward", "output", "postrouting"},
	"hooks_arp":    {"input", "output", "forward"},
	"hooks_bridge": {"prerouting", "input", "forward", "output", "postrouting"},
}

func (c *control) network() error {
	head, err := c.symbolAddr("net_namespace_list")
	if err != nil {
		return err
	}
	link, err := c.profile.Offset("net", "list")
	if err != nil {
		return errNotBuilt
	}
	n := 0
	err = c.walk(head, func(node uint64) error {
		if n++; n > maxNamespaces {
			return ErrEndless
		}
		c.netfilter(node - link)
		return c.devices(node - link)
	})
	if err != nil {
		return err
	}
	return c.packets()
}

func (c *control) netfilter(net uint64) {
	for _, family := range []string{"hooks_ipv4", "hooks_ipv6", "hooks_arp", "hooks_bridge"} {
		f, err := c.profile.Field("net", "nf."+family)
		if err != nil {
			continue
		}
		for i := range min(f.Count, 16) {
			point := fmt.Sprint(i)
			if names := netfilterPoints[family]; int(i) < len(names) {
				point = names[i]
			}
			c.netfilterHooks(net+f.Offset+i*8, family[len("hooks_"):]+" "+point)
		}
	}
}

// netfilterHooks lists what is called at one point: struct nf_hook_entries.
func (c *control) netfilterHooks(pointer uint64, point string) {
	entries, err := c.space.U64(pointer)
	if err != nil || entries == 0 {
		return
	}
	r := c.resolver()
	count, hooks, hook := r.field("nf_hook_entries", "num_hook_entries"), r.field("nf_hook_entries", "hooks"), r.field("nf_hook_entry", "hook")
	size, err := c.profile.Size("nf_hook_entry")
	n, err2 := c.space.U16(entries + count)
	if r.err != nil || err != nil || err2 != nil {
		return
	}
	for i := range uint64(min(n, maxHooks)) {
		at := entries + hooks + i*size + hook
		if target, err := c.space.U64(at); err == nil && target != 0 {
			c.hook("netfilter.hook", point, "netfilter: "+point, at, target)
		}
	}
}

// devices looks at the network devices of a namespace.
func (c *control) devices(net uint64) error {
	r := c.resolver()
	head, link, name := r.field("net", "dev_base_head"), r.field("net_device", "dev_list"), r.field("net_device", "name")
	ops, receive, taps := r.field("net_device", "netdev_ops"), r.field("net_device", "rx_handler"), r.field("net_device", "ptype_all")
	ingress := r.optional("net_device", "nf_hooks_ingress")
	size, err := c.profile.Size("net_device_ops")
	if r.err != nil || err != nil {
		return errNotBuilt
	}
	n := 0
	return c.walk(net+head, func(node uint64) error {
		if n++; n > maxDevices {
			return ErrEndless
		}
		dev := node - link
		read := reader{s: c.space}
		b := make([]byte, 16)
		read.bytes(dev+name, b)
		table, handler := read.u64(dev+ops), read.u64(dev+receive)
		if read.err != nil {
			return ErrTorn
		}
		subject := "device " + event.Text(untilNUL(b))
		c.operations(subject, dev+ops, table, size)
		c.hooked("packet.hook", subject, "each packet received by "+subject, dev+receive, handler)
		if ingress != noField {
			c.netfilterHooks(dev+ingress, "ingress of "+subject)
		}
		return c.taps(dev+taps, subject)
	})
}

// packets looks at whoever gets packets by their type, and at the protocols above IP.
func (c *control) packets() error {
	head := c.known("ptype_all")
	if hot := c.known("net_hotdata"); head == 0 && hot != 0 { // since 6.9
		if off, err := c.profile.Offset("net_hotdata", "ptype_all"); err == nil {
			head = hot + off
		}
	}
	if head != 0 {
		if err := c.taps(head, "all packets"); err != nil {
			return err
		}
	}
	if table := c.known("ptype_base"); table != 0 {
		for i := range uint64(packetBuckets) {
			if err := c.taps(table+i*16, "packets by type"); err != nil {
				return err
			}
		}
	}
	size, err := c.profile.Size("net_protocol")
	if err != nil {
		return nil
	}
	for _, name := range []string{"inet_protos", "inet6_protos"} {
		table := c.known(name)
		if table == 0 {
			continue
		}
		b, err := c.table(table, 256*8)
		if err != nil {
			return err
		}
		b = slices.Clone(b)
		for i := range 256 {
			if p := binary.LittleEndian.Uint64(b[i*8:]); p != 0 {
				c.operations(fmt.Sprintf("%s[%d]", name, i), table+uint64(i)*8, p, size)
			}
		}
	}
	return nil
}

func (c *control) taps(head uint64, what string) error {
	r := c.resolver()
	link, function := r.field("packet_type", "list"), r.field("packet_type", "func")
	if r.err != nil {
		return errNotBuilt
	}
	n := 0
	return c.walk(head, func(node uint64) error {
		if n++; n > maxHooks {
			return ErrEndless
		}
		at := node - link + function
		target, err := c.space.U64(at)
		if err != nil {
			return ErrTorn
		}
		c.hooked("packet.hook", what, "a packet handler for "+what, at, target)
		return nil
	})
}
