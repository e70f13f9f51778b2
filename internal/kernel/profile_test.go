package kernel

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func TestFields(t *testing.T) {
	p := synthProfile(t)
	for path, want := range map[string]Field{
		"state":         {Offset: 0, Size: 4, Count: 1, Kind: KindInt},
		"whole":         {Offset: 8, Size: 8, Count: 1, Kind: KindInt},
		"left":          {Offset: 8, Size: 4, Count: 1, Kind: KindInt},
		"right":         {Offset: 16, Size: 8, Count: 1, Kind: KindInt},
		"tasks":         {Offset: 24, Size: 16, Count: 1, Kind: KindStruct},
		"tasks.prev":    {Offset: 32, Size: 8, Count: 1, Kind: KindPointer},
		"comm":          {Offset: 40, Size: 1, Count: 16, Kind: KindInt},
		"low":           {Offset: 56, Size: 4, Count: 1, Kind: KindInt, BitShift: 0, BitSize: 1},
		"high":          {Offset: 56, Size: 4, Count: 1, Kind: KindInt, BitShift: 1, BitSize: 3},
		"usage.counter": {Offset: 60, Size: 4, Count: 1, Kind: KindInt},
		"grid":          {Offset: 64, Size: 16, Count: 4, Kind: KindStruct},
		"grid.next":     {Offset: 64, Size: 8, Count: 1, Kind: KindPointer},
	} {
		got, err := p.Field("task_struct", path)
		if err != nil {
			t.Errorf("%s: %v", path, err)
		}
		name := p.TypeOf(got)
		if got.typ = 0; got != want {
			t.Errorf("%s: %+v, want %+v", path, got, want)
		}
		if wantName := map[string]string{"tasks": "list_head", "tasks.prev": "list_head", "grid": "list_head"}[path]; wantName != "" && name != wantName {
			t.Errorf("%s is a %q, want %q", path, name, wantName)
		}
	}
	for _, path := range []string{"", ".", "nothing", "tasks.nothing", "state.x", "tasks.next.prev", "tasks.", "right.left"} {
		if _, err := p.Field("task_struct", path); !errors.Is(err, ErrUnsupported) {
			t.Errorf("%q: %v", path, err)
		}
	}
	for typ, want := range map[string]uint64{"task_struct": 128, "list_head": 16, "atomic_t": 4, "same": 8} {
		if got, err := p.Size(typ); got != want || err != nil {
			t.Errorf("size of %s: %d, %v; want %d", typ, got, err, want)
		}
	}
	if _, err := p.Size(""); !errors.Is(err, ErrUnsupported) {
		t.Errorf("size of nothing: %v", err)
	}
	// Two structs share a name: where they agree there is an answer.
	if off, err := p.Offset("same", "a"); off != 0 || err != nil {
		t.Errorf("same.a: %d, %v", off, err)
	}
	if _, err := p.Offset("same", "b"); !errors.Is(err, ErrUnsupported) || !strings.Contains(err.Error(), "unambiguous field same.b") {
		t.Errorf("same.b: %v", err)
	}
	for name, want := range map[string]int64{"PIDTYPE_PID": 0, "PIDTYPE_MAX": 4, "MINUS": -1, "WIDE": 1 << 40} {
		if got, err := p.Enum(name); got != want || err != nil {
			t.Errorf("%s = %d, %v; want %d", name, got, err, want)
		}
	}
	if _, err := p.Enum("PIDTYPE"); !errors.Is(err, ErrUnsupported) {
		t.Errorf("%v", err)
	}
}

func TestSymbols(t *testing.T) {
	p := synthProfile(t)
	for i, s := range synthSymbols(700, false) {
		got := p.SymbolIndex(i)
		if got.Addr != s.addr || got.Kind != s.kind || got.Name != string(s.name) {
			t.Fatalf("symbol %d: %+v", i, got)
		}
		if addr, err := p.Symbol(got.Name); got.Name != "twice" && (addr != s.addr || err != nil) {
			t.Fatalf("%s: %#x %v", got.Name, addr, err)
		}
		if at, off, ok := p.SymbolAt(s.addr + 3); !ok || off != 3 || at.Addr != s.addr {
			t.Fatalf("at %#x: %+v %d %v", s.addr+3, at, off, ok)
		}
	}
	if _, err := p.Symbol("twice"); !errors.Is(err, ErrUnsupported) || len(p.SymbolsNamed("twice")) != 2 {
		t.Errorf("a name that two share: %v, %v", p.SymbolsNamed("twice"), err)
	}
	if _, err := p.Symbol("nothing"); err == nil || err.Error() != "kernel not supported: no symbol nothing" {
		t.Errorf("%v", err)
	}
	start, end, err := p.Text()
	if start != synthText || end != synthText+0x900000 || err != nil {
		t.Errorf("%#x %#x %v", start, end, err)
	}
	if !p.PerCPU(0x100) || p.PerCPU(synthText) || p.PerCPU(0x20000) {
		t.Error("per-CPU addresses are not told from others")
	}
	if (p.SymbolIndex(-1) != Symbol{}) || (p.SymbolIndex(700) != Symbol{}) {
		t.Error("symbols out of range")
	}
}

func TestEncodeOpen(t *testing.T) {
	p := synthProfile(t)
	path := filepath.Join(t.TempDir(), "profile")
	var b bytes.Buffer
	if err := p.Encode(&b); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, b.Bytes(), 0o600); err != nil {
		t.Fatal(err)
	}
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	o, err := Open(f)
	f.Close()
	if err != nil {
		t.Fatal(err)
	}
	if err := o.Verify(); err != nil {
		t.Error(err)
	}
	if off, err := o.Offset("task_struct", "tasks.prev"); off != 32 || err != nil || string(o.Banner()) != synthBanner {
		t.Errorf("%d %v %q", off, err, o.Banner())
	}
	if err := o.Close(); err != nil {
		t.Error(err)
	}
	if _, err := o.Offset("task_struct", "tasks"); !errors.Is(err, ErrUnsupported) {
		t.Errorf("after Close: %v", err)
	}
	empty, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	defer empty.Close()
	if _, err := Open(empty); !errors.Is(err, ErrProfile) {
		t.Errorf("an empty file: %v", err)
	}
}

// ask puts every question to a profile.
func ask(p *Profile) {
	for i := range min(p.NumSymbols(), 50) {
		s := p.SymbolIndex(i)
		_, _ = p.Symbol(s.Name)
		_, _, _ = p.SymbolAt(s.Addr)
	}
	for _, typ := range []string{"task_struct", "same", "list_head", "atomic_t", "signal_struct", ""} {
		_, _ = p.Size(typ)
		for _, path := range []string{"tasks", "tasks.next", "high", "grid.next.prev", "se.sum_exec_runtime", "."} {
			f, _ := p.Field(typ, path)
			_ = p.TypeOf(f)
		}
	}
	_, _ = p.Enum("WIDE")
	_, _, _ = p.Text()
	_, _ = p.Version(), p.PerCPU(1)
	_, _ = p.Reduce([]string{"_text"}, []string{"task_struct"})
}

// TestDamage flips every bit in turn: in header and section table Load sees it, in the rest Verify does, and nothing
// that is asked panics.
func TestDamage(t *testing.T) {
	data := build(t, synthVmlinux(synthKallsyms(synthSymbols(300, false), offsetsFirst), synthBTF(t))).data
	head := headerSize + (secCount-1)*sectionSize
	for i := range data {
		b := bytes.Clone(data)
		b[i] ^= 1 << (i % 8)
		p, err := Load(b)
		if i < head && !(i >= 24 && i < 28) {
			if !errors.Is(err, ErrProfile) {
				t.Fatalf("a flip in byte %d of the header is not seen: %v", i, err)
			}
			continue
		}
		if err == nil {
			if i%16 == 0 {
				ask(p)
			}
			err = p.Verify()
		}
		if !errors.Is(err, ErrProfile) {
			t.Fatalf("a flip in byte %d is not seen: %v", i, err)
		}
	}
	for n := range min(len(data), 2000) {
		if _, err := Load(data[:n]); !errors.Is(err, ErrProfile) {
			t.Fatalf("the first %d bytes: %v", n, err)
		}
	}
}

func TestReduce(t *testing.T) {
	p := synthProfile(t)
	r, err := p.Reduce([]string{"_text", "twice", "WIDE", "none"}, []string{"task_struct", "same"})
	if err != nil {
		t.Fatal(err)
	}
	for _, path := range []string{"tasks.prev", "usage.counter", "high", "right"} {
		want, _ := p.Field("task_struct", path)
		got, err := r.Field("task_struct", path)
		want.typ, got.typ = 0, 0
		if got != want || err != nil {
			t.Errorf("%s: %+v, %v; want %+v", path, got, err, want)
		}
	}
	if v, err := r.Enum("WIDE"); v != 1<<40 || err != nil || r.NumSymbols() != 3 || r.Has("atomic_t", "x") || string(r.Banner()) != synthBanner {
		t.Errorf("%d %v, %d symbols", v, err, r.NumSymbols())
	}
	if err := r.Verify(); err != nil || len(r.data) > len(p.data)/2 {
		t.Errorf("%d bytes of %d, %v", len(r.data), len(p.data), err)
	}
}

func FuzzLoad(f *testing.F) {
	p := synthProfile(f)
	r, err := p.Reduce([]string{"_text", "_etext", "__per_cpu_end"}, []string{"task_struct", "same"})
	if err != nil {
		f.Fatal(err)
	}
	f.Add(r.data)
	f.Fuzz(func(t *testing.T, b []byte) {
		// With the checksum made right, so that it is not all that is tried.
		if len(b) >= headerSize {
			s := bytes.Clone(b)
			if n := headerSize + int(s[28])*sectionSize; n <= len(s) {
				sum := headerSum(s[:n])
				s[12], s[13], s[14], s[15] = byte(sum), byte(sum>>8), byte(sum>>16), byte(sum>>24)
			}
			b = s
		}
		if p, err := Load(b); err == nil {
			ask(p)
			_ = p.Verify()
		} else if !errors.Is(err, ErrProfile) {
			t.Error(err)
		}
	})
}

// FuzzBTF reads types from any bytes; what is read is a profile that answers.
func FuzzBTF(f *testing.F) {
	f.Add(synthBTF(f))
	f.Fuzz(func(t *testing.T, raw []byte) {
		table, err := readBTF(raw)
		if err != nil {
			return
		}
		b := &builder{text: []byte{0}, seen: map[string]uint32{}}
		if err := b.types(table); err != nil {
			return
		}
		b.out[secText] = b.text
		p, err := Load(pack(&b.out))
		if err != nil {
			t.Fatal(err)
		}
		ask(p)
		if err := p.Verify(); err != nil {
			t.Error(err)
		}
	})
}
