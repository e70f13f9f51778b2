package introspect

import (
	"encoding/binary"
	"fmt"
	"slices"
	"strings"
)

// CheckStatic goes through all data of the kernel's image, of each CPU's own variables and of the modules, for pointers to
// code that is nobody's, or a module's that was not built with the kernel: hooks that are in no table one has thought of.
func (g *Guest) CheckStatic() ([]Finding, error) { return g.look((*control).static) }

const staticChunk = 64 << 10

// bounds are variables that say where modules and made code begin and end: no pointers to code, even where code is there.
var bounds = []string{"mod_tree", "address_markers", "kcore_modules", "execmem_info"}

func (c *control) static() error {
	for _, part := range [][2]string{{"__start_rodata", "__end_rodata"}, {"_sdata", "_edata"}, {"__bss_start", "__bss_stop"}} {
		from, to := c.known(part[0]), c.known(part[1])
		if from == 0 || to <= from || to-from > maxSlide {
			continue
		}
		// Of the variables that an encrypted guest shares with its host, the kernel frees what it does not use: it is anybody's memory.
		freed, end := c.known("__start_bss_decrypted_unused"), c.known("__end_bss_decrypted")
		if freed >= from && freed < end && end <= to {
			c.pointers(from, freed, c.symbol)
			from = end
		}
		c.pointers(from, to, c.symbol)
	}
	if size := c.perCPUSize(); size != 0 {
		err := c.eachCPU(func(cpu int, offset uint64) error {
			c.pointers(offset, offset+size, func(at uint64) string {
				s, off, _ := c.profile.SymbolAt(at - offset)
				if strings.Contains(s.Name, "stack") {
					return stale
				}
				return fmt.Sprintf("%s+%#x of CPU %d", s.Name, off, cpu)
			})
			return nil
		})
		if err != nil {
			return err
		}
	}
	for _, m := range c.code.data {
		if m.owner == ownerModule {
			c.pointers(m.start, m.end, func(at uint64) string {
				if c.fromInit(at) {
					return stale
				}
				return c.thing(at)
			})
		}
	}
	if c.meter.left <= 0 {
		return ErrEndless
	}
	return nil
}

func (c *control) perCPUSize() uint64 {
	end, err := c.profile.Symbol("__per_cpu_end")
	if err != nil || end > 16<<20 {
		return 0
	}
	return end
}

// pointers goes through memory; name says what lies where.
func (c *control) pointers(from, to uint64, name func(at uint64) string) {
	const page = 4096
	for at := from; at < to; {
		n := min(to-at, staticChunk-at%page)
		b, err := c.table(at, int(n))
		if err != nil { // page by page
			n = min(to-at, page-at%page)
			if b, err = c.table(at, int(n)); err != nil {
				at += n
				continue
			}
		}
		for i := 0; i+8 <= len(b); i += 8 {
			if v := binary.LittleEndian.Uint64(b[i:]); v >= modulesFrom && v < modulesTo && (v < c.image.start || v >= c.image.end) {
				c.pointer(at+uint64(i), v, name)
			}
		}
		at += n
	}
}

// stale in place of a name says that what lies there may be left from before.
const stale = ""

// fromInit says that a word of a module's data may be a pointer into the code for its start, whose memory was freed and is
// another module's now. Such code begins its memory, and so does the first function of the other.
func (c *control) fromInit(at uint64) bool {
	v, err := c.space.U64(at)
	if err != nil {
		return true
	}
	start := v &^ 4095
	if in := c.code.at(v); in.owner != ownerNone {
		start = in.start
	}
	return v-start < 64
}

// filler says that memory for code holds none: it is filled with int3 or zeros until there is some.
func (c *control) filler(va uint64) bool {
	b, err := c.space.U8(va)
	return err != nil || b == 0xcc || b == 0
}

// pointer looks at a pointer into where modules and made code are.
func (c *control) pointer(at, v uint64, name func(at uint64) string) {
	c.looked++
	in := c.code.at(v)
	switch in.owner {
	case ownerNone:
		if c.code.within(v).owner != ownerNone || !c.isCode(v) || c.filler(v) {
			return // data, or nothing
		}
	case ownerAlien:
	default:
		return
	}
	subject := name(at)
	if whole, _, _ := strings.Cut(subject, "+"); subject == stale || slices.Contains(bounds, whole) {
		return
	}
	f := Finding{Kind: "pointer.hook", Subject: subject, Severity: Critical, Evidence: []Evidence{pointerAt(at, v, "")},
		Detail: fmt.Sprintf("%s points to code at %#x that no known module owns", subject, v)}
	if in.owner == ownerAlien {
		f.Severity, f.Detail = Medium, subject+" points to "+c.where(v)
	}
	c.found(f)
}
