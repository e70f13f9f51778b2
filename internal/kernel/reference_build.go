package kernel

import (
	"debug/elf"
	"encoding/binary"
	"fmt"
	"io"
	"slices"
	"strings"
)

// BuildReference reads a kernel file as Build does, whose profile it takes.
func BuildReference(r io.ReaderAt, size int64, p *Profile) (*Reference, error) {
	v, err := readVmlinux(r, size)
	if err != nil {
		return nil, err
	}
	return v.reference(p)
}

func (v *vmlinux) reference(p *Profile) (*Reference, error) {
	b := &refBuilder{v: v, p: p}
	if err := b.parts(); err != nil {
		return nil, err
	}
	b.relocs()
	b.siteReader = siteReader{symbol: b.optional, section: v.section, sections: v.sections, newer: b.head.flags&refNewAlternatives != 0,
		at: v.at, code: []Segment{{b.head.base, b.out[refSecText]}, {b.head.replacement, b.out[refSecReplacement]}}}
	b.read()
	b.trampolines()
	b.encodeSites()
	if b.err != nil {
		return nil, b.err
	}
	return LoadReference(refFormat.pack(b.out[:]))
}

// refBuilder gathers the sections of a reference.
type refBuilder struct {
	siteReader
	v    *vmlinux
	p    *Profile
	out  [refCount][]byte
	head refHead
	err  error
}

// need returns an address that must be there.
func (b *refBuilder) need(name string) uint64 {
	addr, err := b.p.Symbol(name)
	if err != nil && b.err == nil {
		b.err = err
	}
	return addr
}

// optional returns an address, 0 where the kernel has no such symbol.
func (b *refBuilder) optional(name string) uint64 {
	addr, _ := b.p.Symbol(name)
	return addr
}

// parts takes text, read-only data and the code of alternatives.
func (b *refBuilder) parts() error {
	h := &b.head
	h.base, h.rodata = b.need("_text"), b.need("__start_rodata")
	etext, erodata := b.need("_etext"), b.need("__end_rodata")
	if b.err != nil {
		return b.err
	}
	h.afterInit, h.afterInitEnd = b.optional("__start_ro_after_init"), b.optional("__end_ro_after_init")
	h.jumps, h.jumpsEnd = b.optional("__start___jump_table"), b.optional("__stop___jump_table")
	if b.p.Has("alt_instr", "flags") {
		h.flags |= refNewAlternatives
	}
	// The last page of the text is executable to its end.
	b.out[refSecText] = b.v.span(h.base, (etext+4095)&^4095)
	// Behind the read-only data, up to the end of its page, memory is as the boot left it.
	if data, ok := b.v.at(h.rodata); ok && erodata > h.rodata {
		b.out[refSecRodata] = data[:min(uint64(len(data)), erodata-h.rodata)]
	}
	if s := b.v.section(".altinstr_replacement"); s.Data != nil {
		h.replacement, b.out[refSecReplacement] = s.Addr, s.Data
	} else {
		h.replacement = h.base
	}
	if b.out[refSecText] == nil || b.out[refSecRodata] == nil {
		return missing("bytes of", "text")
	}
	b.out[refSecBanner] = b.p.Banner()
	for _, f := range h.fields() {
		b.out[refSecHead] = binary.LittleEndian.AppendUint64(b.out[refSecHead], *f)
	}
	return nil
}

// section returns a section by name; without data where there is none.
func (v *vmlinux) section(name string) Segment {
	for _, s := range v.sections {
		if s.Name == name && s.Type != elf.SHT_NOBITS && s.Flags&elf.SHF_COMPRESSED == 0 {
			if data, ok := within(v.image, s.Offset, s.FileSize); ok {
				return Segment{s.Addr, data}
			}
		}
	}
	return Segment{}
}

// span returns the image's bytes from one address up to another; what lies in no segment (the rest of a page) is zero.
func (v *vmlinux) span(from, to uint64) []byte {
	if to <= from || to-from > maxVmlinux {
		return nil
	}
	out := make([]byte, to-from)
	data, ok := v.at(from)
	if !ok {
		return nil
	}
	copy(out, data)
	return out
}

// relocs reads what the kernel's build appends to the ELF file for KASLR (arch/x86/tools/relocs.c): three lists of
// addresses, cut to 32 bits, each with a zero before it: 8-byte ones, those that shrink, 4-byte ones. Linux 6.15 has
// no list of those that shrink.
func (b *refBuilder) relocs() {
	image := b.v.image
	tail := image[min(b.v.end, uint64(len(image))):]
	var lists [][]uint32
	for i := len(tail) % 4; i+4 <= len(tail); i += 4 {
		v := binary.LittleEndian.Uint32(tail[i:])
		if v == 0 {
			lists = append(lists, nil)
		} else if n := len(lists); n > 0 {
			lists[n-1] = append(lists[n-1], v)
		}
	}
	kinds := []RelocKind{RelocAbs64, RelocNeg32, RelocAbs32}
	switch len(lists) {
	case 0:
		return // not relocatable
	case 2:
		kinds = []RelocKind{RelocAbs64, RelocAbs32}
	case 3:
	default:
		b.err = fmt.Errorf("%w: %d lists of relocations", ErrNotKernel, len(lists))
		return
	}
	var all []uint32
	for i, list := range lists {
		for _, v := range list {
			if off := uint64(int64(int32(v))) - b.head.base; off < maxVmlinux {
				all = append(all, uint32(off)<<2|uint32(kinds[i]))
			}
		}
	}
	slices.Sort(all)
	out := make([]byte, 0, 4*len(all))
	for _, v := range all {
		out = binary.LittleEndian.AppendUint32(out, v)
	}
	b.out[refSecRelocs] = out
}

// trampolines are the static calls' own jumps, by the names that their macros give them.
func (b *refBuilder) trampolines() {
	const prefix, key = "__SCT__", "__SCK__"
	n := b.p.NumSymbols()
	for i := range n {
		s := b.p.SymbolIndex(i)
		if name, ok := strings.CutPrefix(s.Name, prefix); ok {
			if k := b.optional(key + name); k != 0 {
				b.add(Site{Addr: s.Addr, A: k, Aux: StaticTail | StaticTrampoline, Kind: SiteStatic, Len: 5})
			}
		}
	}
}

// encodeSites writes sites and alternatives as records, in order.
func (b *refBuilder) encodeSites() {
	b.sort()
	b.encodeRecords()
}

func (b *refBuilder) encodeRecords() {
	le := binary.LittleEndian
	for _, s := range b.list {
		rec := le.AppendUint32(nil, uint32(s.Addr-b.head.base))
		a := uint32(s.A)
		if s.Kind != SiteAlternative {
			a = uint32(s.A - b.head.base)
		}
		rec = le.AppendUint32(rec, a)
		rec = le.AppendUint16(append(rec, byte(s.Kind), byte(s.Len)), s.Aux)
		b.out[refSecSites] = append(b.out[refSecSites], append(rec, 0, 0, 0, 0)...)
	}
	for _, a := range b.alts {
		rec := le.AppendUint32(nil, uint32(a.Addr-b.head.base))
		rec = le.AppendUint32(rec, uint32(a.Replacement-b.head.base))
		rec = le.AppendUint16(rec, a.Feature)
		rec = append(rec, byte(a.Len), byte(a.ReplacementLen), 0, 0, 0, 0)
		if a.Not {
			rec[12] |= 1
		}
		if a.DirectCall {
			rec[12] |= 2
		}
		b.out[refSecAlternatives] = append(b.out[refSecAlternatives], rec...)
	}
}
