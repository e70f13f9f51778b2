package kernel

import (
	"cmp"
	"debug/elf"
	"encoding/binary"
	"slices"
	"strings"
)

// maxSites bounds the places that a kernel writes over. A distribution's has some 150,000.
const maxSites = 2 << 20

// siteReader reads the tables of places that a kernel writes over, of the kernel itself or of a module.
type siteReader struct {
	symbol   func(name string) uint64 // 0 where there is none
	section  func(name string) Segment
	sections []*elf.Section
	at       func(addr uint64) ([]byte, bool) // nil: there are no tables between symbols
	code     []Segment
	newer    bool // alternatives have flags
	list     []Site
	alts     []Alternative
}

// add notes a site, if it lies in what is kept.
func (b *siteReader) add(s Site) {
	if len(b.list) < maxSites && s.Len > 0 && b.original(s.Addr, s.Len) != nil {
		b.list = append(b.list, s)
	}
}

// original returns the file's bytes of code.
func (b *siteReader) original(addr uint64, n int) []byte {
	for _, s := range b.code {
		if data, ok := within(s.Data, addr-s.Addr, uint64(n)); ok && addr >= s.Addr {
			return data
		}
	}
	return nil
}

// places calls visit with each address of a table of offsets that count from themselves.
func (b *siteReader) places(t Segment, visit func(addr uint64)) {
	for i := 0; i+4 <= len(t.Data); i += 4 {
		off := int32(binary.LittleEndian.Uint32(t.Data[i:]))
		visit(t.Addr + uint64(i) + uint64(int64(off)))
	}
}

// sites reads the kernel's own tables.
func (b *siteReader) read() {
	b.places(b.table(".retpoline_sites", "", ""), b.retpoline)
	b.places(b.table(".return_sites", "", ""), func(addr uint64) { b.add(Site{Addr: addr, Len: 5, Kind: SiteReturn}) })
	b.places(b.table(".ibt_endbr_seal", "", ""), func(addr uint64) { b.add(Site{Addr: addr, Len: 4, Kind: SiteEndbr}) })
	b.places(b.table(".smp_locks", "__smp_locks", "__smp_locks_end"), func(addr uint64) { b.add(Site{Addr: addr, Len: 1, Kind: SiteLock}) })
	b.paravirt(b.table(".parainstructions", "__parainstructions", "__parainstructions_end"))
	b.jumps(b.table("__jump_table", "__start___jump_table", "__stop___jump_table"))
	b.statics(b.table(".static_call_sites", "__start_static_call_sites", "__stop_static_call_sites"))
	b.ftrace(b.table("__mcount_loc", "__start_mcount_loc", "__stop_mcount_loc"))
	b.constants()
	b.alternatives(b.table(".altinstructions", "__alt_instructions", "__alt_instructions_end"))
}

// sort puts the sites in order.
func (b *siteReader) sort() {
	slices.SortStableFunc(b.list, func(x, y Site) int { return cmp.Or(cmp.Compare(x.Addr, y.Addr), cmp.Compare(x.Kind, y.Kind)) })
}

// table returns a section, or what lies between two symbols.
func (b *siteReader) table(section, start, stop string) Segment {
	if section != "" {
		if s := b.section(section); s.Data != nil {
			return s
		}
	}
	if b.at == nil {
		return Segment{}
	}
	from, to := b.symbol(start), b.symbol(stop)
	data, ok := b.at(from)
	if !ok || to < from || to-from > uint64(len(data)) {
		return Segment{}
	}
	return Segment{from, data[:to-from]}
}

// thunkRegisters are the registers of the retpoline thunks, in the order of their numbers.
var thunkRegisters = [...]string{"rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi", "r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15"}

func (b *siteReader) retpoline(addr uint64) {
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
		if b.symbol("__x86_indirect_thunk_"+name) == target {
			s.Aux = uint16(i)
			b.add(s)
			return
		}
	}
}

func (b *siteReader) paravirt(t Segment) {
	ops := b.symbol("pv_ops")
	for i := 0; i+10 <= len(t.Data); i += 16 {
		r := t.Data[i:]
		b.add(Site{Addr: binary.LittleEndian.Uint64(r), Kind: SiteParavirt, Len: int(r[9]), A: ops + 8*uint64(r[8])})
	}
}

func (b *siteReader) jumps(t Segment) {
	for i := 0; i+16 <= len(t.Data); i += 16 {
		at := t.Addr + uint64(i)
		addr := at + uint64(int64(int32(binary.LittleEndian.Uint32(t.Data[i:]))))
		target := at + 4 + uint64(int64(int32(binary.LittleEndian.Uint32(t.Data[i+4:]))))
		b.add(Site{Addr: addr, A: target, Kind: SiteJump, Len: jumpLength(b.original(addr, 5))})
	}
}

// jumpLength tells a jump label of two bytes from one of five; 0: it is none.
func jumpLength(code []byte) int {
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

func (b *siteReader) statics(t Segment) {
	for i := 0; i+8 <= len(t.Data); i += 8 {
		at := t.Addr + uint64(i)
		addr := at + uint64(int64(int32(binary.LittleEndian.Uint32(t.Data[i:]))))
		key := at + 4 + uint64(int64(int32(binary.LittleEndian.Uint32(t.Data[i+4:]))))
		b.add(staticSite(addr, key, b.original(addr, 6)))
	}
}

// staticSite describes a place that makes a static call, from its entry and its code.
func staticSite(addr, key uint64, code []byte) Site {
	s := Site{Addr: addr, A: key &^ staticKeyFlags, Aux: uint16(key & StaticTail), Kind: SiteStatic, Len: 5}
	if len(code) >= 6 && code[0] == 0x0f && code[1]&0xf0 == 0x80 {
		s.Len = 6
	}
	return s
}

func (b *siteReader) ftrace(t Segment) {
	for i := 0; i+8 <= len(t.Data); i += 8 {
		b.add(Site{Addr: binary.LittleEndian.Uint64(t.Data[i:]), Kind: SiteFtrace, Len: 5})
	}
}

// constants are those of asm/runtime-const.h: a section of places for each variable.
func (b *siteReader) constants() {
	for _, s := range b.sections {
		for _, k := range []struct {
			prefix string
			kind   SiteKind
			n      int
		}{{"runtime_ptr_", SitePointer, 8}, {"runtime_shift_", SiteShift, 1}} {
			name, ok := strings.CutPrefix(s.Name, k.prefix)
			if !ok {
				continue
			}
			b.places(b.section(s.Name), func(addr uint64) {
				s := Site{Addr: addr, A: b.symbol(name), Kind: k.kind, Len: k.n}
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

// decodeAlternative reads one entry, at address at, of a table of size-byte entries.
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
func (b *siteReader) alternatives(t Segment) {
	l := alternativeLayout(b.newer)
	var list []Alternative
	for i := 0; i+l.size <= len(t.Data); i += l.size {
		a := decodeAlternative(t.Data[i:], t.Addr+uint64(i), l)
		if b.original(a.Addr, a.Len) != nil {
			list = append(list, a)
		}
	}
	sites, alts := groupAlternatives(list)
	for _, s := range sites {
		b.add(s)
	}
	b.alts = alts
}

// groupAlternatives sorts entries by place, keeping the order of those that overlap, and makes one site of these.
func groupAlternatives(list []Alternative) ([]Site, []Alternative) {
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
