package kernel

import (
	"cmp"
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
	b.sites()
	if b.err != nil {
		return nil, b.err
	}
	return LoadReference(refFormat.pack(b.out[:]))
}

// maxSites bounds the places that a kernel writes over. A distribution's has some 150,000.
const maxSites = 2 << 20

// refBuilder gathers the sections of a reference.
type refBuilder struct {
	v    *vmlinux
	p    *Profile
	out  [refCount][]byte
	head refHead
	list []Site
	alts []Alternative
	err  error
}

// symbol returns an address that must be there.
func (b *refBuilder) symbol(name string) uint64 {
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
	h.base, h.rodata = b.symbol("_text"), b.symbol("__start_rodata")
	etext, erodata := b.symbol("_etext"), b.symbol("__end_rodata")
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

// add notes a site, if it lies in what is kept.
func (b *refBuilder) add(s Site) {
	if len(b.list) < maxSites && s.Len > 0 && b.original(s.Addr, s.Len) != nil {
		b.list = append(b.list, s)
	}
}

// original returns the file's bytes of text or of the code of alternatives.
func (b *refBuilder) original(addr uint64, n int) []byte {
	for _, s := range []Segment{{b.head.base, b.out[refSecText]}, {b.head.replacement, b.out[refSecReplacement]}} {
		if data, ok := within(s.Data, addr-s.Addr, uint64(n)); ok && addr >= s.Addr {
			return data
		}
	}
	return nil
}

// places calls visit with each address of a table of offsets that count from themselves.
func (b *refBuilder) places(t Segment, visit func(addr uint64)) {
	for i := 0; i+4 <= len(t.Data); i += 4 {
		off := int32(binary.LittleEndian.Uint32(t.Data[i:]))
		visit(t.Addr + uint64(i) + uint64(int64(off)))
	}
}

// sites reads the kernel's own tables.
func (b *refBuilder) sites() {
	b.places(b.table(".retpoline_sites", "", ""), b.retpoline)
	b.places(b.table(".return_sites", "", ""), func(addr uint64) { b.add(Site{Addr: addr, Len: 5, Kind: SiteReturn}) })
	b.places(b.table(".ibt_endbr_seal", "", ""), func(addr uint64) { b.add(Site{Addr: addr, Len: 4, Kind: SiteEndbr}) })
	b.places(b.table(".smp_locks", "__smp_locks", "__smp_locks_end"), func(addr uint64) { b.add(Site{Addr: addr, Len: 1, Kind: SiteLock}) })
	b.paravirt(b.table(".parainstructions", "__parainstructions", "__parainstructions_end"))
	b.jumps(b.table("", "__start___jump_table", "__stop___jump_table"))
	b.statics(b.table("", "__start_static_call_sites", "__stop_static_call_sites"))
	b.trampolines()
	b.ftrace(b.table("", "__start_mcount_loc", "__stop_mcount_loc"))
	b.constants()
	b.alternatives(b.table(".altinstructions", "__alt_instructions", "__alt_instructions_end"))
	slices.SortStableFunc(b.list, func(x, y Site) int { return cmp.Or(cmp.Compare(x.Addr, y.Addr), cmp.Compare(x.Kind, y.Kind)) })
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
}

// table returns a section, or what lies between two symbols.
func (b *refBuilder) table(section, start, stop string) Segment {
	if section != "" {
		if s := b.v.section(section); s.Data != nil {
			return s
		}
	}
	from, to := b.optional(start), b.optional(stop)
	data, ok := b.v.at(from)
	if !ok || to < from || to-from > uint64(len(data)) {
		return Segment{}
	}
	return Segment{from, data[:to-from]}
}

// thunkRegisters are the registers of the retpoline thunks, in the order of their numbers.
var thunkRegisters = [...]string{"rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi", "r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15"}

func (b *refBuilder) retpoline(addr uint64) {
	code := b.original(addr, 6)
	if code == nil {
		return
	}
	s := Site{Addr: addr, Len: 5, Kind: SiteRetpoline}
	at := 1
	if code[0] == 0x0f || code[0] == 0x2e { // Jcc, or a call with a prefix
		s.Len, at = 6, 2
	}
	target := addr + uint64(s.Len) + uint64(int64(int32(binary.LittleEndian.Uint32(code[at:]))))
	for i, name := range thunkRegisters {
		if b.optional("__x86_indirect_thunk_"+name) == target {
			s.Aux = uint16(i)
			b.add(s)
			return
		}
	}
}

func (b *refBuilder) paravirt(t Segment) {
	ops := b.optional("pv_ops")
	for i := 0; i+10 <= len(t.Data); i += 16 {
		r := t.Data[i:]
		b.add(Site{Addr: binary.LittleEndian.Uint64(r), Kind: SiteParavirt, Len: int(r[9]), A: ops + 8*uint64(r[8])})
	}
}

func (b *refBuilder) jumps(t Segment) {
	for i := 0; i+16 <= len(t.Data); i += 16 {
		at := t.Addr + uint64(i)
		addr := at + uint64(int64(int32(binary.LittleEndian.Uint32(t.Data[i:]))))
		target := at + 4 + uint64(int64(int32(binary.LittleEndian.Uint32(t.Data[i+4:]))))
		b.add(Site{Addr: addr, A: target, Kind: SiteJump, Len: JumpLength(b.original(addr, 5))})
	}
}

// JumpLength tells a jump label of two bytes from one of five; 0: it is none.
func JumpLength(code []byte) int {
	switch {
	case len(code) < 5:
		return 0
	case code[0] == 0xeb, code[0] == 0x66 && code[1] == 0x90:
		return 2
	case code[0] == 0xe9, code[0] == 0x0f && code[1] == 0x1f:
		return 5
	}
	return 0
}

const staticKeyFlags = 3 // the low bits of a key's address: a tail call, and one in init code

func (b *refBuilder) statics(t Segment) {
	for i := 0; i+8 <= len(t.Data); i += 8 {
		at := t.Addr + uint64(i)
		addr := at + uint64(int64(int32(binary.LittleEndian.Uint32(t.Data[i:]))))
		key := at + 4 + uint64(int64(int32(binary.LittleEndian.Uint32(t.Data[i+4:]))))
		b.add(StaticSite(addr, key, b.original(addr, 6)))
	}
}

// StaticSite describes a place that makes a static call, from its entry and its code.
func StaticSite(addr, key uint64, code []byte) Site {
	s := Site{Addr: addr, A: key &^ staticKeyFlags, Aux: uint16(key & StaticTail), Kind: SiteStatic, Len: 5}
	if len(code) >= 6 && code[0] == 0x0f && code[1]&0xf0 == 0x80 {
		s.Len = 6
	}
	return s
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

func (b *refBuilder) ftrace(t Segment) {
	for i := 0; i+8 <= len(t.Data); i += 8 {
		b.add(Site{Addr: binary.LittleEndian.Uint64(t.Data[i:]), Kind: SiteFtrace, Len: 5})
	}
}

// constants are those of asm/runtime-const.h: a section of places for each variable.
func (b *refBuilder) constants() {
	for _, s := range b.v.sections {
		for _, k := range []struct {
			prefix string
			kind   SiteKind
			n      int
		}{{"runtime_ptr_", SitePointer, 8}, {"runtime_shift_", SiteShift, 1}} {
			name, ok := strings.CutPrefix(s.Name, k.prefix)
			if !ok {
				continue
			}
			b.places(b.v.section(s.Name), func(addr uint64) {
				s := Site{Addr: addr, A: b.optional(name), Kind: k.kind, Len: k.n}
				if s.A == 0 {
					s.Aux = ConstantUnnamed
				}
				b.add(s)
			})
		}
	}
}

// altLayout is how a kernel's struct alt_instr is laid out.
type altLayout struct{ size, flags, notBit int }

// alternativeLayout returns the layout: until 6.3 a feature's highest bit says "not", since then flags do.
func alternativeLayout(newer bool) altLayout {
	if newer {
		return altLayout{size: 14, flags: 10}
	}
	return altLayout{size: 12}
}

// DecodeAlternative reads one entry, at address at, of a table of size-byte entries.
func decodeAlternative(e []byte, at uint64, l altLayout) Alternative {
	le := binary.LittleEndian
	a := Alternative{Addr: at + uint64(int64(int32(le.Uint32(e)))), Replacement: at + 4 + uint64(int64(int32(le.Uint32(e[4:])))),
		Feature: le.Uint16(e[8:]), Len: int(e[l.size-2]), ReplacementLen: int(e[l.size-1])}
	if l.flags != 0 {
		flags := le.Uint16(e[l.flags:])
		a.Not, a.DirectCall = flags&1 != 0, flags&2 != 0
	} else {
		a.Not, a.Feature = a.Feature&(1<<15) != 0, a.Feature&^(1<<15)
	}
	return a
}

// alternatives reads .altinstructions. Entries whose places overlap make one site: the kernel puts them in one after
// another.
func (b *refBuilder) alternatives(t Segment) {
	l := alternativeLayout(b.head.flags&refNewAlternatives != 0)
	for i := 0; i+l.size <= len(t.Data); i += l.size {
		a := decodeAlternative(t.Data[i:], t.Addr+uint64(i), l)
		if text := uint64(len(b.out[refSecText])); a.Addr-b.head.base < text {
			b.alts = append(b.alts, a)
		}
	}
	sites, alts := GroupAlternatives(b.alts)
	for _, s := range sites {
		b.add(s)
	}
	le := binary.LittleEndian
	for _, a := range alts {
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

// GroupAlternatives sorts entries by place, keeping the order of those that overlap, and makes one site of these.
func GroupAlternatives(list []Alternative) ([]Site, []Alternative) {
	list = slices.Clone(list)
	slices.SortStableFunc(list, func(x, y Alternative) int { return cmp.Compare(x.Addr, y.Addr) })
	var sites []Site
	for i, a := range list {
		end := a.Addr + uint64(a.Len)
		if n := len(sites); n > 0 && a.Addr < sites[n-1].Addr+uint64(sites[n-1].Len) {
			s := &sites[n-1]
			s.Aux++
			s.Len = max(s.Len, int(end-s.Addr))
			continue
		}
		sites = append(sites, Site{Addr: a.Addr, A: uint64(i), Aux: 1, Kind: SiteAlternative, Len: a.Len})
	}
	return sites, list
}
