package introspect

import "encoding/binary"

// hashed calls visit with each node of an hlist, the list in a bucket of a hash table. head is the address of its head.
func (c *control) hashed(head uint64, visit func(node uint64) error) error {
	pointer := head
	for range maxNodes {
		node, err := c.space.U64(pointer)
		if err != nil {
			return ErrTorn
		}
		if node&1 != 0 || node == 0 { // the tables of sockets mark their ends with odd numbers
			return nil
		}
		if back, err := c.space.U64(node + 8); err != nil || back != pointer {
			return ErrTorn
		}
		if err := visit(node); err != nil {
			return err
		}
		pointer = node
	}
	return ErrTorn
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

// array calls visit with each pointer in an xarray (include/linux/xarray.h), whose head pointer lies at head.
func (c *control) array(head uint64, visit func(pointer uint64) error) error {
	slots, err := c.profile.Field("xa_node", "slots")
	if err != nil {
		return errNotBuilt
	}
	top, err := c.space.U64(head)
	if err != nil {
		return ErrTorn
	}
	pending, n := []uint64{top}, 0
	b := make([]byte, min(slots.Count, 64)*8)
	for len(pending) > 0 {
		entry := pending[len(pending)-1]
		pending = pending[:len(pending)-1]
		switch {
		case entry == 0 || entry&3 == 2 && entry < 4096: // a mark of the array's own
		case entry&3 == 2: // a node
			if n++; n > maxNodes {
				return ErrTorn
			}
			if c.space.Read(entry-2+slots.Offset, b) != nil {
				return ErrTorn
			}
			for i := 0; i < len(b); i += 8 {
				if e := binary.LittleEndian.Uint64(b[i:]); e != 0 {
					pending = append(pending, e)
				}
			}
			if len(pending) > maxNodes {
				return ErrTorn
			}
		case entry&3 == 0:
			if err := visit(entry); err != nil {
				return err
			}
		}
	}
	return nil
}

// loose follows a circular list by its next pointers alone, as the kernel does, up to most elements: what changes too
// often to be whole, and where one look more or less does no harm.
func (c *control) loose(head uint64, most int, visit func(node uint64)) error {
	node, err := c.space.U64(head)
	for n := 0; err == nil && node != head && n < most; n++ {
		at := node
		node, err = c.space.U64(at)
		if err == nil {
			visit(at)
		}
	}
	if c.meter.left <= 0 {
		return ErrEndless
	}
	return nil
}

// pointersIn splits what was read into pointers; they outlive the memory that was read to.
func pointersIn(b []byte) []uint64 {
	list := make([]uint64, 0, len(b)/8)
	for ; len(b) >= 8; b = b[8:] {
		list = append(list, binary.LittleEndian.Uint64(b))
	}
	return list
}
