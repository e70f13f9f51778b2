package introspect

import (
	"encoding/binary"
	"fmt"
	"strings"
)

// operations checks a table of functions that an object points to: file_operations, proto_ops and their like. The table
// must lie in the kernel's image or in a module that is on the kernel's list, and each code pointer in it must lead to
// known code. pointer is where the table's address was read.
//
// Rootkits change a table in place, or make a copy of it, change that, and turn one object to it.
func (c *control) operations(subject string, pointer, table, size uint64) {
	if table == 0 || c.checked[table] {
		return
	}
	c.checked[table] = true
	switch in := c.code.within(table); {
	case c.inImage(table):
		// A table is a thing of its own, and not made at run time: a copy in a place that nothing uses is neither.
		if s, offset, ok := c.profile.SymbolAt(table - c.boot.Slide); !ok || offset != 0 && s.Name != holder || strings.ContainsRune("Bb", rune(s.Kind)) {
			c.found(Finding{Kind: "operations.changed", Subject: subject, Severity: Critical,
				Detail:   "its table of functions lies within " + c.symbol(table) + ", which is none",
				Evidence: []Evidence{pointerAt(pointer, table, "pointer to the table")}})
			return
		}
	case in.owner == ownerModule:
	case in.owner == ownerAlien:
		c.found(Finding{Kind: "operations.changed", Subject: subject, Severity: High,
			Detail:   "its table of functions lies in module " + in.name,
			Evidence: []Evidence{pointerAt(pointer, table, "pointer to the table")}})
		return
	default:
		c.found(Finding{Kind: "operations.changed", Subject: subject, Severity: Critical,
			Detail:   fmt.Sprintf("its table of functions lies at %#x, in no known module", table),
			Evidence: []Evidence{pointerAt(pointer, table, "pointer to the table")}})
		return
	}
	b, err := c.table(table, int(min(size, maxOperations)))
	if err != nil {
		return
	}
	for i := 0; i+8 <= len(b); i += 8 {
		target := binary.LittleEndian.Uint64(b[i:])
		if c.isCode(target) && c.judge(target) != Info {
			at := table + uint64(i)
			c.found(Finding{Kind: "operations.changed", Subject: c.thing(table), Severity: c.judge(target),
				Detail:   fmt.Sprintf("a function of %s, the table of %s, is %s", c.thing(table), subject, c.where(target)),
				Evidence: []Evidence{pointerAt(at, target, "in the table")}})
		}
	}
}

const maxOperations = 4096 // bytes of a table

// holder is a variable that has tables as its parts.
const holder = "net_hotdata"

// isCode says that a value can be called: it leads to known code, or to a page that the kernel may execute.
func (c *control) isCode(v uint64) bool {
	if v < kernelHalf {
		return false
	}
	if c.code.at(v).owner != ownerNone {
		return true
	}
	page, err := c.space.Walk(v)
	return err == nil && !page.NoExec
}

// kernelHalf is where the addresses of the kernel begin, with five levels of tables too.
const kernelHalf = 0xff00000000000000

// inImage says that something is part of the kernel's image, its memory for the boot left out.
func (c *control) inImage(va uint64) bool {
	return va >= c.image.start && va < c.image.end && (va < c.image.initStart || va >= c.image.initEnd)
}
