package kernel

import (
	"bytes"
	"debug/elf"
	"encoding/binary"
	"errors"
	"fmt"
	"slices"
	"strings"
)

// ErrModule: the bytes are not a module of a Linux kernel for x86-64, or it does not fit what is asked of it.
var ErrModule = errors.New("bad kernel module")

// Limits of a module's file. The largest that distributions have is some 10 MB.
const (
	maxModuleFile    = 64 << 20
	maxModuleParts   = 4096
	maxModuleSymbols = 1 << 18
	maxModuleRelocs  = 1 << 20
)

// ModuleFile is a module as it lies on disk.
type ModuleFile struct {
	elf   *elf.File
	image []byte
	syms  []elf.Symbol
}

// ParseModule reads a module's file, unpacked. It keeps b.
func ParseModule(b []byte) (m *ModuleFile, err error) {
	if len(b) > maxModuleFile {
		return nil, fmt.Errorf("%w: %d bytes", ErrTooLarge, len(b))
	}
	f, err := elf.NewFile(bytes.NewReader(b))
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrModule, err)
	}
	if f.Machine != elf.EM_X86_64 || f.Class != elf.ELFCLASS64 || f.Type != elf.ET_REL || len(f.Sections) > maxModuleParts {
		return nil, fmt.Errorf("%w: ELF for %v with %d sections", ErrModule, f.Machine, len(f.Sections))
	}
	for _, s := range f.Sections {
		if s.Type == elf.SHT_SYMTAB && s.FileSize > maxModuleSymbols*elf.Sym64Size || s.Flags&elf.SHF_COMPRESSED != 0 {
			return nil, fmt.Errorf("%w: section %s", ErrModule, s.Name)
		}
	}
	m = &ModuleFile{elf: f, image: b}
	if m.syms, err = f.Symbols(); err != nil {
		return nil, fmt.Errorf("%w: %w", ErrModule, err)
	}
	return m, nil
}

// Export returns which section a symbol that the module defines for others lies in, and where within it.
func (m *ModuleFile) Export(name string) (section string, value uint64, ok bool) {
	for _, s := range m.syms {
		if s.Name == name && s.Section > elf.SHN_UNDEF && int(s.Section) < len(m.elf.Sections) && elf.ST_BIND(s.Info) == elf.STB_GLOBAL {
			return m.elf.Sections[s.Section].Name, s.Value, true
		}
	}
	return "", 0, false
}

// Placed is a module's code and read-only data at the addresses where it is loaded. Package patch takes it as an Object.
type Placed struct {
	Code, Rodata []Segment
	sites        []Site
	alts         []Alternative
}

// Original fills b with what the file has at addr; false where it has nothing there.
func (p *Placed) Original(addr uint64, b []byte) bool {
	for _, list := range [][]Segment{p.Code, p.Rodata} {
		for _, s := range list {
			if data, ok := within(s.Data, addr-s.Addr, uint64(len(b))); ok && addr >= s.Addr {
				copy(b, data)
				return true
			}
		}
	}
	return false
}

// NumSites, Site and Alternatives are the places that the kernel writes over.
func (p *Placed) NumSites() int { return len(p.sites) }

// Site returns the i-th place by address.
func (p *Placed) Site(i int) Site { return p.sites[i] }

// Alternatives returns n entries from the first on; nil where there are not so many.
func (p *Placed) Alternatives(first uint64, n int) []Alternative {
	if first > uint64(len(p.alts)) || uint64(n) > uint64(len(p.alts))-first {
		return nil
	}
	return append([]Alternative(nil), p.alts[first:first+uint64(n)]...)
}

// Where says where things are that a module refers to: its own sections, and symbols of the kernel and other modules.
type Where struct {
	Section func(name string) (uint64, bool)
	Symbol  func(name string) (uint64, bool)
	Kernel  func(name string) uint64 // symbols of the kernel alone; 0 where there is none
	Key     func(addr uint64) uint64 // of a static call: itself, or that of the trampoline at addr
	Newer   bool                     // alternatives as of Linux 6.4
}

// Place moves a module to where it is loaded, as the kernel's loader does.
func (m *ModuleFile) Place(w Where) (*Placed, error) {
	l := &placing{ModuleFile: m, where: w, data: map[string]Segment{}}
	if err := l.load(); err != nil {
		return nil, err
	}
	if err := l.relocate(); err != nil {
		return nil, err
	}
	p := &Placed{}
	for _, s := range m.elf.Sections {
		seg, ok := l.data[s.Name]
		switch {
		case !ok || len(seg.Data) == 0:
		case s.Flags&elf.SHF_EXECINSTR != 0:
			p.Code = append(p.Code, seg)
		case strings.HasPrefix(s.Name, ".rodata"):
			p.Rodata = append(p.Rodata, seg)
		}
	}
	b := siteReader{symbol: w.Kernel, section: func(name string) Segment { return l.data[name] }, code: p.Code, newer: w.Newer}
	b.read()
	// With one CPU the kernel takes LOCK prefixes out of a module's .text alone, and leaves those of its cold functions
	// (arch/x86/kernel/module.c, module_finalize: the bounds that it gives to alternatives_smp_module_add).
	text := l.data[".text"]
	b.list = slices.DeleteFunc(b.list, func(s Site) bool { return s.Kind == SiteLock && (s.Addr < text.Addr || s.Addr >= text.End()) })
	b.list = append(b.list, l.empty...)
	b.sort()
	for i := range b.list {
		if s := &b.list[i]; s.Kind == SiteStatic {
			s.A = w.Key(s.A)
		}
	}
	p.sites, p.alts = b.list, b.alts
	return p, nil
}

// placing is the work of Place.
type placing struct {
	*ModuleFile
	where Where
	data  map[string]Segment
	empty []Site // references to sections without bytes: where those are nobody says
}

// tables are the sections that say which places the kernel writes over.
var moduleTables = map[string]bool{".retpoline_sites": true, ".return_sites": true, ".ibt_endbr_seal": true, ".smp_locks": true,
	".parainstructions": true, "__jump_table": true, ".static_call_sites": true, "__mcount_loc": true, ".altinstructions": true}

// wanted: code that stays, read-only data, tables.
func wanted(s *elf.Section) bool {
	if s.Flags&elf.SHF_ALLOC == 0 || s.Type == elf.SHT_NOBITS || strings.HasPrefix(s.Name, ".init") {
		return false
	}
	return s.Flags&elf.SHF_EXECINSTR != 0 || strings.HasPrefix(s.Name, ".rodata") && s.Flags&elf.SHF_WRITE == 0 || moduleTables[s.Name]
}

// load copies the sections that are wanted.
func (l *placing) load() error {
	for _, s := range l.elf.Sections {
		if !wanted(s) || s.FileSize == 0 {
			continue
		}
		data, ok := within(l.image, s.Offset, s.FileSize)
		addr, known := l.where.Section(s.Name)
		if _, twice := l.data[s.Name]; !ok || !known || twice {
			return fmt.Errorf("%w: section %s is not where it should be", ErrModule, s.Name)
		}
		l.data[s.Name] = Segment{addr, bytes.Clone(data)}
	}
	return nil
}

// relocate applies the relocations of what was loaded (arch/x86/kernel/module.c: apply_relocate_add).
func (l *placing) relocate() error {
	le, budget := binary.LittleEndian, maxModuleRelocs
	for _, rela := range l.elf.Sections {
		if rela.Type != elf.SHT_RELA || int(rela.Info) >= len(l.elf.Sections) {
			continue
		}
		target := l.elf.Sections[rela.Info]
		seg, ok := l.data[target.Name]
		table, ok2 := within(l.image, rela.Offset, rela.FileSize)
		if !ok || !ok2 || !wanted(target) {
			continue
		}
		for ; len(table) >= 24; table = table[24:] {
			if budget--; budget < 0 {
				return fmt.Errorf("%w: more than %d relocations", ErrTooLarge, maxModuleRelocs)
			}
			info := le.Uint64(table[8:])
			typ := elf.R_X86_64(uint32(info))
			value, err := l.symbolAt(int(info >> 32))
			if errors.Is(err, errEmpty) {
				l.unknown(target, seg.Addr+le.Uint64(table), typ)
				continue
			}
			if err == nil {
				err = apply(seg, le.Uint64(table), typ, value+le.Uint64(table[16:]))
			}
			if err != nil {
				return err
			}
		}
	}
	return nil
}

// errEmpty: a symbol lies in a section without bytes, which the kernel does not list.
var errEmpty = errors.New("in an empty section")

// unknown notes a reference in code to an empty section.
func (l *placing) unknown(s *elf.Section, addr uint64, typ elf.R_X86_64) {
	site := Site{Addr: addr, Kind: SiteEmpty, Len: 4}
	switch typ {
	case elf.R_X86_64_64:
		site.Len = 8
	case elf.R_X86_64_PC32, elf.R_X86_64_PLT32:
		site.Aux = EmptyRelative
	}
	if !moduleTables[s.Name] {
		l.empty = append(l.empty, site)
	}
}

// symbolAt returns the address of a symbol of the module's table.
func (l *placing) symbolAt(i int) (uint64, error) {
	if i == 0 {
		return 0, nil
	}
	if i < 0 || i > len(l.syms) {
		return 0, fmt.Errorf("%w: symbol %d", ErrModule, i)
	}
	s := l.syms[i-1] // debug/elf leaves the first, empty one out
	switch {
	case s.Section == elf.SHN_UNDEF:
		if v, ok := l.where.Symbol(s.Name); ok {
			return v, nil
		}
		if elf.ST_BIND(s.Info) == elf.STB_WEAK {
			return 0, nil
		}
		return 0, fmt.Errorf("%w: it needs %q", ErrModule, s.Name)
	case s.Section == elf.SHN_ABS:
		return s.Value, nil
	case int(s.Section) >= len(l.elf.Sections):
		return 0, fmt.Errorf("%w: symbol %q", ErrModule, s.Name)
	}
	base, ok := l.where.Section(l.elf.Sections[s.Section].Name)
	if !ok && l.elf.Sections[s.Section].Size == 0 {
		return 0, errEmpty
	}
	if !ok {
		return 0, fmt.Errorf("%w: section %s is nowhere", ErrModule, l.elf.Sections[s.Section].Name)
	}
	return base + s.Value, nil
}

// apply writes one relocation.
func apply(seg Segment, off uint64, typ elf.R_X86_64, value uint64) error {
	n := uint64(4)
	switch typ {
	case elf.R_X86_64_NONE:
		return nil
	case elf.R_X86_64_64:
		n = 8
	case elf.R_X86_64_PC64:
		n, value = 8, value-seg.Addr-off
	case elf.R_X86_64_PC32, elf.R_X86_64_PLT32:
		value -= seg.Addr + off
	case elf.R_X86_64_32, elf.R_X86_64_32S:
	default:
		return fmt.Errorf("%w: relocation %v", ErrModule, typ)
	}
	at, ok := within(seg.Data, off, n)
	if !ok {
		return fmt.Errorf("%w: relocation at %#x", ErrModule, off)
	}
	if n == 8 {
		binary.LittleEndian.PutUint64(at, value)
	} else {
		binary.LittleEndian.PutUint32(at, uint32(value))
	}
	return nil
}
