// Package patch knows what a kernel writes over its own code, and so what must stand at each byte of it while it runs.
//
// A running x86 kernel's text is not its file's: KASLR moves it, and the kernel then rewrites some 150,000 places of it
// for the CPU it finds itself on (retpolines, returns, alternatives, LOCK prefixes, sealed ENDBR, constants), and some
// as it runs (jump labels, static calls, calls of the function tracer). Leaving those places out of a comparison would
// leave an intruder 150,000 places to write to. So what the kernel writes is computed here, from the kernel's own
// tables, and compared byte by byte:
//
//   - what depends on the CPU is one choice for the whole kernel, a [Mode]: whoever changes a single place is found,
//     since it does not fit the others;
//   - what changes as the kernel runs has few legal forms at each place: a jump label is a NOP or a jump to its one
//     target, a static call calls what its key names, and so on.
//
// An [Object] is the kernel or one module. [Expect.Window] gives what must be in a stretch of it.
//
// Sources: arch/x86/kernel/alternative.c, static_call.c, jump_label.c, ftrace.c, module.c, paravirt.c of Linux 6.1 and
// 6.12; arch/x86/include/asm/runtime-const.h; tools/objtool; Intel SDM volume 2 (instruction formats).
package patch

import (
	"encoding/binary"
	"sort"

	"vigia/internal/kernel"
)

// Object is the code and read-only data of one kernel or module, at its run-time addresses.
type Object interface {
	// Original fills b with the file's bytes at addr, moved to where they run; false where it has none there.
	Original(addr uint64, b []byte) bool
	// NumSites and Site give the places that are written over, by address.
	NumSites() int
	Site(i int) kernel.Site
	// Alternatives returns n entries from the first on.
	Alternatives(first uint64, n int) []kernel.Alternative
}

// Kernel is the Object of a kernel itself.
type Kernel struct {
	Ref   *kernel.Reference
	Slide uint64
}

// NumSites and the rest make a Kernel an Object.
func (k Kernel) NumSites() int { return k.Ref.NumSites() }

// Site returns the i-th place that is written over.
func (k Kernel) Site(i int) kernel.Site {
	s := k.Ref.Site(i)
	s.Addr += k.Slide
	if s.Kind != kernel.SiteAlternative {
		s.A += k.Slide
	}
	return s
}

// Alternatives returns n entries from the first on.
func (k Kernel) Alternatives(first uint64, n int) []kernel.Alternative {
	list := k.Ref.Alternatives(first, n)
	for i := range list {
		list[i].Addr += k.Slide
		list[i].Replacement += k.Slide
	}
	return list
}

// Original fills b with what the kernel file has at a run-time address, moved by the slide.
func (k Kernel) Original(addr uint64, b []byte) bool {
	link := addr - k.Slide
	for _, s := range [...]kernel.Segment{k.Ref.Text(), k.Ref.Rodata(), k.Ref.Replacement()} {
		if off := link - s.Addr; link >= s.Addr && off < uint64(len(s.Data)) && uint64(len(b)) <= uint64(len(s.Data))-off {
			copy(b, s.Data[off:])
			k.move(link, b)
			return true
		}
	}
	return false
}

// move applies the relocations of a stretch; those that begin before it too.
func (k Kernel) move(link uint64, b []byte) {
	if k.Slide == 0 {
		return
	}
	le := binary.LittleEndian
	first, end := k.Ref.Relocs(link-7, link+uint64(len(b)))
	for i := first; i < end; i++ {
		addr, kind := k.Ref.Reloc(i)
		n, slide := 4, k.Slide
		switch kind {
		case kernel.RelocAbs64:
			n = 8
		case kernel.RelocNeg32:
			slide = -slide
		}
		if addr >= link && addr+uint64(n) <= link+uint64(len(b)) {
			at := b[addr-link:]
			if n == 8 {
				le.PutUint64(at, le.Uint64(at)+slide)
			} else {
				le.PutUint32(at, le.Uint32(at)+uint32(slide))
			}
			continue
		}
		k.moveEdge(addr, n, slide, link, b)
	}
}

// moveEdge applies a relocation that lies partly outside of b.
func (k Kernel) moveEdge(addr uint64, n int, slide, link uint64, b []byte) {
	var whole [8]byte
	for _, s := range [...]kernel.Segment{k.Ref.Text(), k.Ref.Rodata(), k.Ref.Replacement()} {
		if off := addr - s.Addr; addr >= s.Addr && off+uint64(n) <= uint64(len(s.Data)) {
			copy(whole[:n], s.Data[off:])
		}
	}
	v := binary.LittleEndian.Uint64(whole[:]) + slide
	for i := range uint64(n) {
		if at := addr + i - link; at < uint64(len(b)) {
			b[at] = byte(v >> (8 * i))
		}
	}
}

// FirstSite returns the number of the first site at or behind addr.
func FirstSite(o Object, addr uint64) int {
	return sort.Search(o.NumSites(), func(i int) bool { return o.Site(i).Addr >= addr })
}
