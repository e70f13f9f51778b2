package introspect

import (
	"bytes"
	"cmp"
	"encoding/binary"
	"fmt"
	"slices"

	"vigia/internal/event"
)

// owner is whose code lies at an address.
type owner uint8

const (
	ownerNone   owner = iota // nobody's
	ownerKernel              // the kernel's own text
	ownerFreed               // the kernel's text that only the boot needs: its memory is something else by now
	ownerModule              // a module's that is on the kernel's list, built with the kernel and signed
	ownerAlien               // a module's that was not
	ownerMade                // code that the kernel makes at run time: BPF programs, ftrace's trampolines
)

// code is a run of addresses with an owner.
type code struct {
	start, end uint64
	owner      owner
	name       string // of the module, or of what was made
	module     uint64 // its struct module
}

// Bits of module.taints (include/linux/panic.h): a module whose place was not in the kernel's own tree, or whose
// signature was missing or wrong.
const (
	taintOutOfTree = 1 << 12
	taintUnsigned  = 1 << 13
)

// codeLayout is where the fields lie that tell whose code is where.
type codeLayout struct {
	list, name, nameSize, state, taints uint64
	base                                []area // base and size of each text of a module
	all                                 []area // of everything of it
	kallsyms                            uint64
	symtab, numSymtab, strtab           uint64
	ksymNode, ksymStart, ksymEnd, ksym  uint64
	opsNode, opsTrampoline, opsSize     uint64
	slotPages, slotNode, slotInsns      uint64
	noMade                              bool // the kernel makes no code, or says too little of it
}

func (g *Guest) codeLayout() (*codeLayout, error) {
	if g.codes != nil {
		return g.codes, nil
	}
	r, l := &resolver{p: g.profile}, &codeLayout{}
	l.list, l.state, l.taints = r.field("module", "list"), r.field("module", "state"), r.field("module", "taints")
	name, err := g.profile.Field("module", "name")
	if err != nil {
		return nil, err
	}
	l.name, l.nameSize = name.Offset, min(name.Count, 64)
	if mem, err := g.profile.Field("module", "mem"); err == nil {
		base, size := r.field("module_memory", "base"), r.field("module_memory", "size")
		text, _ := g.profile.Enum("MOD_TEXT")
		init, _ := g.profile.Enum("MOD_INIT_TEXT")
		for i := range min(mem.Count, 16) {
			a := area{mem.Offset + i*mem.Size + base, mem.Offset + i*mem.Size + size}
			l.all = append(l.all, a)
			if int64(i) == text || int64(i) == init {
				l.base = append(l.base, a)
			}
		}
	} else {
		for _, part := range []string{"core_layout", "init_layout"} {
			base := r.field("module", part+".base")
			l.base = append(l.base, area{base, r.field("module", part+".text_size")})
			l.all = append(l.all, area{base, r.field("module", part+".size")})
		}
	}
	// Names within modules make a finding better to read; without them it is none the worse.
	l.kallsyms = r.optional("module", "kallsyms")
	l.symtab, l.numSymtab = r.optional("mod_kallsyms", "symtab"), r.optional("mod_kallsyms", "num_symtab")
	l.strtab = r.optional("mod_kallsyms", "strtab")
	made := &resolver{p: g.profile}
	l.ksymNode, l.ksym = made.field("bpf_ksym", "lnode"), made.field("bpf_ksym", "name")
	l.ksymStart, l.ksymEnd = made.field("bpf_ksym", "start"), made.field("bpf_ksym", "end")
	l.opsNode, l.opsTrampoline = made.field("ftrace_ops", "list"), made.field("ftrace_ops", "trampoline")
	l.opsSize = made.field("ftrace_ops", "trampoline_size")
	l.slotPages = made.field("kprobe_insn_cache", "pages")
	l.slotNode, l.slotInsns = made.field("kprobe_insn_page", "list"), made.field("kprobe_insn_page", "insns")
	l.noMade = made.err != nil
	if r.err != nil {
		return nil, r.err
	}
	g.codes = l
	return l, nil
}

// codeMap says whose code is where, at the moment it was made.
type codeMap struct {
	runs []code // by address; they do not overlap in a sane kernel
	data []code // all that belongs to modules, their code too
}

func (g *Guest) codeMap() (*codeMap, error) {
	l, err := g.codeLayout()
	if err != nil {
		return nil, err
	}
	m := &codeMap{}
	for _, s := range []struct {
		from, to string
		owner    owner
	}{{"_text", "_etext", ownerKernel}, {"_sinittext", "_einittext", ownerFreed}} {
		from, err1 := g.profile.Symbol(s.from)
		to, err2 := g.profile.Symbol(s.to)
		if err1 == nil && err2 == nil {
			m.runs = append(m.runs, code{start: from + g.boot.Slide, end: to + g.boot.Slide, owner: s.owner})
		}
	}
	head, err := g.profile.Symbol("modules")
	if err != nil {
		return nil, err
	}
	base, modules := len(m.runs), 0
	err = steady(func() error {
		m.runs, m.data, modules = m.runs[:base], m.data[:0], 0
		return g.walk(head+g.boot.Slide, func(node uint64) error {
			if modules++; modules > maxModules {
				return ErrEndless
			}
			return g.moduleCode(m, l, node-l.list)
		})
	})
	if err != nil {
		return nil, err
	}
	g.madeCode(m, l)
	order := func(a, b code) int { return cmp.Compare(a.start, b.start) }
	slices.SortFunc(m.runs, order)
	slices.SortFunc(m.data, order)
	return m, nil
}

const (
	maxModules    = 4096
	maxModuleSize = 256 << 20
	maxMade       = 1 << 14 // BPF programs and trampolines
)

func (g *Guest) moduleCode(m *codeMap, l *codeLayout, at uint64) error {
	r := reader{s: g.space}
	if r.u32(at+l.state) == moduleUnformed {
		return nil
	}
	name := g.scratch[:l.nameSize]
	r.bytes(at+l.name, name)
	taints := r.u64(at + l.taints)
	c := code{owner: ownerModule, name: event.Text(untilNUL(name)), module: at}
	if taints&(taintOutOfTree|taintUnsigned) != 0 {
		c.owner = ownerAlien
	}
	add := func(list *[]code, areas []area) {
		for _, a := range areas {
			base, size := r.u64(at+a.base), uint64(r.u32(at+a.size))
			if r.err == nil && base != 0 && size != 0 && size <= maxModuleSize {
				c.start, c.end = base, base+size
				*list = append(*list, c)
			}
		}
	}
	add(&m.runs, l.base)
	add(&m.data, l.all)
	if r.err != nil {
		return ErrTorn
	}
	return nil
}

// madeCode adds the code that the kernel makes as it runs, from its own lists: BPF programs and their trampolines, the
// function tracer's trampolines, and the pages that probes keep instructions in. The lists change under RCU; what is
// missed in one sample is there in the next.
func (g *Guest) madeCode(m *codeMap, l *codeLayout) {
	add := func(start, size uint64, name string) error {
		if len(m.runs) > maxMade {
			return ErrEndless
		}
		if size != 0 && size <= maxModuleSize {
			m.runs = append(m.runs, code{start: start, end: start + size, owner: ownerMade, name: name})
		}
		return nil
	}
	made := func(list string, offset uint64, visit func(at uint64) error) {
		head, err := g.profile.Symbol(list)
		if err == nil && !l.noMade {
			_ = g.walk(head+g.boot.Slide, func(node uint64) error { return visit(node - offset) })
		}
	}
	made("bpf_kallsyms", l.ksymNode, func(at uint64) error {
		r := reader{s: g.space}
		start, end := r.u64(at+l.ksymStart), r.u64(at+l.ksymEnd)
		name := g.scratch[:64]
		r.bytes(at+l.ksym, name)
		if r.err != nil {
			return ErrTorn
		}
		return add(start, end-start, event.Text(untilNUL(name)))
	})
	made("ftrace_ops_trampoline_list", l.opsNode, func(at uint64) error {
		r := reader{s: g.space}
		start, size := r.u64(at+l.opsTrampoline), r.u64(at+l.opsSize)
		if r.err != nil {
			return ErrTorn
		}
		return add(start, size, "trampoline of ftrace")
	})
	for _, cache := range []string{"kprobe_insn_slots", "kprobe_optinsn_slots"} {
		head, err := g.profile.Symbol(cache)
		if err != nil || l.noMade {
			continue
		}
		_ = g.walk(head+g.boot.Slide+l.slotPages, func(node uint64) error {
			start, err := g.space.U64(node - l.slotNode + l.slotInsns)
			if err != nil {
				return ErrTorn
			}
			return add(start, 4096, "instructions of probes")
		})
	}
}

// at returns whose code lies at an address.
func (m *codeMap) at(va uint64) code { return find(m.runs, va) }

// within returns which module something lies in, code or data.
func (m *codeMap) within(va uint64) code { return find(m.data, va) }

func find(runs []code, va uint64) code {
	i, exact := slices.BinarySearchFunc(runs, va, func(c code, va uint64) int { return cmp.Compare(c.start, va) })
	if !exact {
		i--
	}
	if i < 0 || va >= runs[i].end {
		return code{}
	}
	return runs[i]
}

// symbol names an address of the kernel's image: "commit_creds", "commit_creds+0x10".
func (g *Guest) symbol(va uint64) string {
	s, offset, ok := g.profile.SymbolAt(va - g.boot.Slide)
	if !ok {
		return fmt.Sprintf("%#x", va)
	}
	if offset == 0 {
		return s.Name
	}
	return fmt.Sprintf("%s+%#x", s.Name, offset)
}

// maxModuleSymbols bounds what is read of a module's symbols.
const maxModuleSymbols = 1 << 14

// moduleSymbol names an address in a module by the module's own symbols; empty where they do not tell. They are what
// the module says of itself.
func (g *Guest) moduleSymbol(c code, va uint64) string {
	l := g.codes
	if l.kallsyms == noField || l.symtab == noField || l.strtab == noField || l.numSymtab == noField {
		return ""
	}
	r := reader{s: g.space}
	syms := r.u64(c.module + l.kallsyms)
	table, n, text := r.u64(syms+l.symtab), min(uint64(r.u32(syms+l.numSymtab)), maxModuleSymbols), r.u64(syms+l.strtab)
	if r.err != nil || n == 0 {
		return ""
	}
	const size = 24 // of Elf64_Sym: name u32, info u8, other u8, section u16, value u64, size u64
	buf := make([]byte, n*size)
	r.bytes(table, buf)
	if r.err != nil {
		return ""
	}
	var best, name uint64
	for ; len(buf) > 0; buf = buf[size:] {
		value := binary.LittleEndian.Uint64(buf[8:])
		if value <= va && value > best && value >= c.start {
			best, name = value, uint64(binary.LittleEndian.Uint32(buf))
		}
	}
	if best == 0 {
		return ""
	}
	b, _ := g.space.CString(text+name, 128)
	b = bytes.TrimSpace(b)
	if len(b) == 0 {
		return ""
	}
	if best == va {
		return event.Text(b)
	}
	return fmt.Sprintf("%s+%#x", event.Text(b), va-best)
}
