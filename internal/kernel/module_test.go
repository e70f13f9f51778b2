package kernel

import (
	"bytes"
	"encoding/binary"
	"errors"
	"io/fs"
	"os"
	"testing"
)

// smallModule makes a module's file: code with a return, a call of another's function, and the table that lists the return; cold code; and
// the table of LOCK prefixes, of which each has one.
func smallModule(testing.TB) []byte {
	le := binary.LittleEndian
	type section struct {
		name       string
		typ, flags uint64
		link, info uint32
		entry      uint64
		data       []byte
	}
	rela := func(off uint64, sym, typ uint64, addend int64) []byte {
		b := le.AppendUint64(nil, off)
		b = le.AppendUint64(b, sym<<32|typ)
		return le.AppendUint64(b, uint64(addend))
	}
	symbol := func(name uint32, info byte, shndx uint16, value uint64) []byte {
		b := append(le.AppendUint32(nil, name), info, 0)
		b = le.AppendUint64(le.AppendUint16(b, shndx), value)
		return le.AppendUint64(b, 0)
	}
	symbols := append(symbol(0, 0, 0, 0), symbol(0, 3, 1, 0)...) // the section of code
	symbols = append(append(symbols, symbol(1, 0x10, 0, 0)...), symbol(8, 0x12, 1, 0)...)
	symbols = append(symbols, symbol(0, 3, 8, 0)...) // the section of cold code
	list := []section{
		{},
		{".text", 1, 6, 0, 0, 0, []byte{0xe8, 0, 0, 0, 0, 0xe9, 0, 0, 0, 0}},
		{".rela.text", 4, 0x40, 5, 1, 24, append(rela(1, 2, 4, -4), rela(6, 2, 4, -4)...)},
		{".return_sites", 1, 2, 0, 0, 0, make([]byte, 4)},
		{".rela.return_sites", 4, 0x40, 5, 3, 24, rela(0, 1, 2, 5)},
		{".symtab", 2, 0, 6, 2, 24, symbols},
		{".strtab", 3, 0, 0, 0, 0, []byte("\x00printk\x00init\x00")},
		{".BTF", 1, 0, 0, 0, 0, bytes.Repeat([]byte("types"), 100)},
		{".text.unlikely", 1, 6, 0, 0, 0, []byte{0x90, 0xf0, 0x90}},
		{".smp_locks", 1, 2, 0, 0, 0, make([]byte, 8)},
		{".rela.smp_locks", 4, 0x40, 5, 9, 24, append(rela(0, 1, 2, 4), rela(4, 4, 2, 1)...)},
		{".shstrtab", 3, 0, 0, 0, 0, nil},
	}
	names := []byte{0}
	var at []uint32
	for _, s := range list {
		at = append(at, uint32(len(names)))
		names = append(append(names, s.name...), 0)
	}
	list[len(list)-1].data = names
	out := make([]byte, 64)
	var headers []byte
	for i, s := range list {
		h := le.AppendUint32(le.AppendUint32(nil, at[i]), uint32(s.typ))
		for _, v := range []uint64{s.flags, 0, uint64(len(out)), uint64(len(s.data))} {
			h = le.AppendUint64(h, v)
		}
		h = le.AppendUint32(le.AppendUint32(h, s.link), s.info)
		h = le.AppendUint64(le.AppendUint64(h, 1), s.entry)
		headers = append(headers, h...)
		out = append(out, s.data...)
	}
	copy(out, "\x7fELF\x02\x01\x01")
	le.PutUint16(out[16:], 1)  // relocatable
	le.PutUint16(out[18:], 62) // x86-64
	le.PutUint32(out[20:], 1)
	le.PutUint64(out[0x28:], uint64(len(out)))
	le.PutUint16(out[0x34:], 64)
	le.PutUint16(out[0x3a:], 64)
	le.PutUint16(out[0x3c:], uint16(len(list)))
	le.PutUint16(out[0x3e:], uint16(len(list)-1))
	return append(out, headers...)
}

type place map[string]uint64

func everywhere() Where {
	next := place{}
	return Where{
		Section: func(name string) (uint64, bool) {
			if next[name] == 0 {
				next[name] = 0xffffffffc0000000 + uint64(len(next)+1)<<16
			}
			return next[name], true
		},
		Symbol: func(string) (uint64, bool) { return 0xffffffff81001000, true },
		Kernel: func(string) uint64 { return 0 },
		Key:    func(addr uint64) uint64 { return addr },
	}
}

func TestPlaceModule(t *testing.T) {
	m, err := ParseModule(smallModule(t))
	if err != nil {
		t.Fatal(err)
	}
	p, err := m.Place(everywhere())
	if err != nil {
		t.Fatal(err)
	}
	// The LOCK prefix of cold code stays as it is, with one CPU too.
	if len(p.Code) != 2 || p.NumSites() != 2 || p.Site(0).Kind != SiteLock || p.Site(0).Addr != p.Code[0].Addr+4 || p.Site(1).Kind != SiteReturn {
		t.Fatalf("%d runs of code, places %+v", len(p.Code), p.sites)
	}
	b := p.Code[0].Data
	if to := p.Code[0].Addr + 5 + uint64(int64(int32(binary.LittleEndian.Uint32(b[1:])))); to != 0xffffffff81001000 {
		t.Errorf("the call leads to %#x", to)
	}
	for i := range p.NumSites() {
		b := make([]byte, p.Site(i).Len)
		if !p.Original(p.Site(i).Addr, b) {
			t.Errorf("%+v lies in no code", p.Site(i))
		}
	}
}

// TestModulePack: a module comes out as good as it went in: its code lies and refers as that of the whole file.
func TestModulePack(t *testing.T) {
	f, err := os.Create(t.TempDir() + "/pack")
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	whole := smallModule(t)
	n, err := PackModules(f, []string{"kernel/net/core/fail-over.ko", "modules.dep", "bad.ko"}, func(file string) ([]byte, error) {
		if file == "bad.ko" {
			return []byte("no module"), nil
		}
		return whole, nil
	})
	if err != nil || n != 1 {
		t.Fatal(n, err)
	}
	st, _ := f.Stat()
	p, err := OpenModulePack(f, st.Size())
	if err != nil {
		t.Fatal(err)
	}
	b, err := p.Module("fail_over")
	if err != nil {
		t.Fatal(err)
	}
	code := func(b []byte) *Placed {
		m, err := ParseModule(b)
		if err != nil {
			t.Fatal(err)
		}
		p, err := m.Place(everywhere())
		if err != nil {
			t.Fatal(err)
		}
		return p
	}
	x, y := code(whole), code(b)
	if len(x.Code) != len(y.Code) || !bytes.Equal(x.Code[0].Data, y.Code[0].Data) || x.NumSites() != y.NumSites() {
		t.Error("what was packed is not what came out")
	}
	if _, err := p.Module("other"); !errors.Is(err, fs.ErrNotExist) {
		t.Error(err)
	}
	if int64(len(whole)) < st.Size() {
		t.Errorf("%d bytes of %d", st.Size(), len(whole))
	}
}

func FuzzModule(f *testing.F) {
	whole := smallModule(f)
	f.Add(whole)
	small, err := stripModule(whole)
	if err != nil {
		f.Fatal(err)
	}
	f.Add(small)
	f.Add([]byte("\x7fELF"))
	f.Fuzz(func(t *testing.T, b []byte) {
		m, err := ParseModule(b)
		if err != nil {
			return
		}
		if p, err := m.Place(everywhere()); err == nil {
			for i := range p.NumSites() {
				s := p.Site(i)
				if s.Kind == SiteAlternative && len(p.Alternatives(s.A, int(s.Aux))) != int(s.Aux) {
					t.Errorf("%+v", s)
				}
			}
		}
		_, _, _ = m.Export("init_module")
	})
}

func FuzzReference(f *testing.F) {
	var s [refCount][]byte
	s[refSecHead] = make([]byte, headRecord)
	s[refSecText], s[refSecSites], s[refSecAlternatives], s[refSecRelocs] = make([]byte, 64), make([]byte, 2*siteRecord), make([]byte, altRecord), make([]byte, 8)
	f.Add(refFormat.pack(s[:]))
	f.Add([]byte(refMagic))
	f.Fuzz(func(t *testing.T, b []byte) {
		r, err := LoadReference(b)
		if err != nil {
			return
		}
		_ = r.Verify()
		for i := range min(r.NumSites(), 1000) {
			s := r.Site(i)
			_ = r.Alternatives(s.A, int(s.Aux))
		}
		_, _ = r.Relocs(r.Base(), r.Base()+100)
		_, _ = r.Text().End(), r.Rodata().End()
	})
}
