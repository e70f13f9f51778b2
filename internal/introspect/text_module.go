package introspect

import (
	"cmp"
	"errors"
	"fmt"
	"io/fs"
	"slices"
	"strings"

	"vigia/internal/kernel"
	"vigia/internal/kernel/patch"
)

// Kinds of findings of modules' code.
const (
	KindModuleText    = "module.text"    // differs from the module's file
	KindModuleUnknown = "module.unknown" // no file of that name came with the image
)

// ModuleFiles gives the files of modules that came with the guest's image, from where the guest can't write.
type ModuleFiles interface {
	// Module returns a module's file, unpacked, by the name that the kernel knows it by; fs.ErrNotExist where the image
	// has none.
	Module(name string) ([]byte, error)
}

// loadedModule is a module in the guest's memory.
type loadedModule struct {
	code
	sections map[string]uint64
	file     *kernel.ModuleFile
	err      error // why it has none
}

const (
	maxSectAttrs     = 1024
	maxSectName      = 128
	kernelTextWindow = 0xffffffff80000000
)

// modules compares the code of all modules with their files.
func (t *textCheck) modules(files ModuleFiles) error {
	var loaded []*loadedModule
	err := t.view(func() error {
		var err error
		loaded, err = t.loaded()
		t.textSound.forget(loaded)
		return err
	})
	if err != nil {
		return err
	}
	var rest []*loadedModule
	for _, m := range loaded {
		same := false
		err := t.view(func() error {
			if same = t.sameModule(m); !same {
				delete(t.textSound.modules, m.module)
			}
			return nil
		})
		if err != nil {
			return err
		}
		if !same {
			rest = append(rest, m)
		}
	}
	known := false
	for _, m := range rest {
		m.read(files)
		if errors.Is(m.err, fs.ErrNotExist) {
			t.found = append(t.found, Finding{Kind: KindModuleUnknown, Subject: m.name, Severity: Medium,
				Detail: "the image has no module of this name: its code can't be compared", Evidence: []Evidence{{Address: m.start}}})
			continue
		}
		if m.err != nil {
			return fmt.Errorf("module %s: %w", m.name, m.err)
		}
		known = true
	}
	if !known {
		return nil
	}
	for _, m := range loaded { // what one exports another may refer to
		m.read(files)
	}
	for _, m := range rest {
		if m.file == nil {
			continue
		}
		if err := t.view(func() error { return t.module(m, loaded) }); err != nil {
			return err
		}
	}
	return nil
}

// read reads a module's file, once.
func (m *loadedModule) read(files ModuleFiles) {
	if m.file != nil || m.err != nil {
		return
	}
	var b []byte
	if b, m.err = files.Module(m.name); m.err == nil {
		m.file, m.err = kernel.ParseModule(b)
	}
}

// loaded lists the modules that are live, with where their sections lie.
func (t *textCheck) loaded() ([]*loadedModule, error) {
	var list []*loadedModule
	r, l := &resolver{p: t.profile}, t.codes
	sects := r.field("module", "sect_attrs")
	num, attrs := r.field("module_sect_attrs", "nsections"), r.field("module_sect_attrs", "attrs")
	name, address := r.field("module_sect_attr", "battr.attr.name"), r.field("module_sect_attr", "address")
	size, err := t.profile.Size("module_sect_attr")
	percpu := r.optional("module", "percpu")
	if r.err != nil || err != nil {
		return nil, errors.Join(r.err, err)
	}
	for _, c := range t.code.runs {
		if c.owner != ownerModule && c.owner != ownerAlien || slices.ContainsFunc(list, func(m *loadedModule) bool { return m.module == c.module }) {
			continue
		}
		if state, err := t.space.U32(c.module + l.state); err != nil || state != 0 {
			continue // coming or going: its code is still being written
		}
		m := &loadedModule{code: c, sections: map[string]uint64{}}
		rd := reader{s: t.space}
		m.start, m.end = rd.u64(c.module+l.base[0].base), 0
		m.end = m.start + uint64(rd.u32(c.module+l.base[0].size))
		at := rd.u64(c.module + sects)
		n := min(uint64(rd.u32(at+num)), maxSectAttrs)
		for i := range n {
			p := rd.u64(at + attrs + i*size + name)
			s, _ := t.space.CString(p, maxSectName)
			m.sections[string(s)] = rd.u64(at + attrs + i*size + address)
		}
		if percpu != noField {
			m.sections[".data..percpu"] = rd.u64(c.module + percpu)
		}
		if rd.err != nil {
			return nil, ErrTorn
		}
		list = append(list, m)
	}
	return list, nil
}

// module compares one module. What can't be placed where the guest says that it is was moved, or is another.
func (t *textCheck) module(m *loadedModule, all []*loadedModule) error {
	placed, err := m.file.Place(kernel.Where{
		Section: func(name string) (uint64, bool) { v, ok := m.sections[name]; return v, ok },
		Symbol:  func(name string) (uint64, bool) { return t.exported(name, all) },
		Kernel:  t.kernelSymbol, Key: t.staticKey, Newer: t.mode.New,
	})
	if err != nil {
		t.found = append(t.found, Finding{Kind: KindModuleText, Subject: m.name, Severity: High, Evidence: []Evidence{{Address: m.start}},
			Detail: "what is loaded under this name is not laid out as the module's file: " + err.Error()})
		return nil
	}
	t.stats.Modules++
	x := patch.Expect{Object: placed, Mode: &t.mode, Names: &t.names, Env: t}
	parts := append(slices.Clone(placed.Code), placed.Rodata...)
	slices.SortFunc(parts, func(a, b kernel.Segment) int { return cmp.Compare(a.Addr, b.Addr) })
	before, sites, changed := len(t.changes), t.stats.Sites, t.stats.Changed
	t.seen = sightOf{}
	for _, s := range parts {
		t.part(&x, s)
	}
	t.gaps(m, placed.Code)
	for _, c := range t.changes[before:] {
		t.found = append(t.found, t.moduleFinding(m, placed, c))
	}
	t.changes = t.changes[:before]
	if t.stats.Changed == changed && !t.seen.probed && t.meter.left > 0 {
		t.textSound.modules[m.module] = soundModule{t.textSound.identity(m), t.seen, t.stats.Sites - sites}
	}
	return nil
}

// part compares a section of a module whole: none is large.
func (t *textCheck) part(x *patch.Expect, s kernel.Segment) {
	n := len(s.Data)
	t.got, t.want = slices.Grow(t.got[:0], n)[:n], slices.Grow(t.want[:0], n)[:n]
	t.readWhole(s.Addr, t.got)
	t.saw(s.Addr, t.got)
	if x.Window(s.Addr, t.got, t.want) {
		t.seen.probed = t.probed(s.Addr, t.got, t.want) || t.seen.probed
		t.differ(s.Addr, t.got, t.want)
	}
	t.stats.Bytes += n
	t.stats.Sites += x.Object.NumSites()
}

// gaps makes sure that the executable pages of a module hold nothing but its sections: what lies between is zero.
func (t *textCheck) gaps(m *loadedModule, code []kernel.Segment) {
	at := m.start
	slices.SortFunc(code, func(a, b kernel.Segment) int { return cmp.Compare(a.Addr, b.Addr) })
	check := func(to uint64) {
		for end := at; at < to && to-at <= maxModuleSize && t.meter.left > 0; at = end {
			end = min(at+textWindow, to)
			n := int(end - at)
			t.got, t.want = slices.Grow(t.got[:0], n)[:n], slices.Grow(t.want[:0], n)[:n]
			clear(t.want)
			t.readWhole(at, t.got)
			t.saw(at, t.got)
			t.differ(at, t.got, t.want)
		}
	}
	for _, s := range code {
		if s.Addr >= m.start && s.End() <= m.end {
			check(s.Addr)
			at = max(at, s.End())
		}
	}
	check((m.end + 4095) &^ 4095)
}

// kernelSymbol returns the run-time address of a symbol of the kernel's; 0 where it has none or several.
func (t *textCheck) kernelSymbol(name string) uint64 {
	addr, err := t.profile.Symbol(name)
	if err != nil {
		return 0
	}
	if t.profile.PerCPU(addr) {
		return addr
	}
	return addr + t.boot.Slide
}

// staticKey returns the key of a static call, where a module names its trampoline: keys that modules may not change are
// not exported.
func (t *textCheck) staticKey(addr uint64) uint64 {
	s, offset, ok := t.profile.SymbolAt(addr - t.boot.Slide)
	name, is := strings.CutPrefix(s.Name, "__SCT__")
	if key := t.kernelSymbol("__SCK__" + name); ok && is && offset == 0 && key != 0 {
		return key
	}
	return addr
}

// exported returns what a module finds under a name: the kernel's symbol, or another module's.
func (t *textCheck) exported(name string, all []*loadedModule) (uint64, bool) {
	if entry, err := t.profile.Symbol("__ksymtab_" + name); err == nil {
		// struct kernel_symbol: where the value lies, counted from here.
		var b [4]byte
		if t.object.Original(entry+t.boot.Slide, b[:]) {
			link := entry + uint64(int64(int32(uint32(b[0])|uint32(b[1])<<8|uint32(b[2])<<16|uint32(b[3])<<24)))
			if link < kernelTextWindow {
				return link, true // a per-CPU symbol
			}
			return link + t.boot.Slide, true
		}
	}
	for _, m := range all {
		if m.file == nil {
			continue
		}
		if section, value, ok := m.file.Export(name); ok {
			if base, ok := m.sections[section]; ok {
				return base + value, true
			}
		}
	}
	v := t.kernelSymbol(name)
	return v, v != 0
}

func (t *textCheck) moduleFinding(m *loadedModule, placed *kernel.Placed, c change) Finding {
	subject := m.name
	if s := t.moduleSymbol(m.code, c.addr); s != "" {
		subject += ": " + s
	}
	return Finding{Kind: KindModuleText, Subject: subject, Severity: Critical,
		Detail:   fmt.Sprintf("the module differs in %s from its file and from all that the kernel itself writes", count(c.n)),
		Evidence: []Evidence{{Address: c.addr, Bytes: c.got, Expected: c.want, Note: siteAt(placed, c.addr)}}}
}

// count says how many bytes.
func count(n int) string {
	if n == 1 {
		return "a byte"
	}
	return fmt.Sprintf("%d bytes", n)
}
