package kernel

import (
	"bytes"
	"os"
	"path/filepath"
	"testing"

	"github.com/cilium/ebpf/btf"
)

// realKernel opens the kernel file of VIGIA_TEST_KERNEL, or skips.
func realKernel(t testing.TB) (*os.File, int64) {
	t.Helper()
	path := os.Getenv("VIGIA_TEST_KERNEL")
	if path == "" {
		t.Skip("VIGIA_TEST_KERNEL names no kernel file: the tests on a whole kernel are left out")
	}
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	st, err := f.Stat()
	if err != nil {
		t.Fatal(err)
	}
	return f, st.Size()
}

// TestReal holds a real kernel's profile to what another reader of BTF finds, for every named struct.
func TestReal(t *testing.T) {
	f, size := realKernel(t)
	p, err := Build(f, size)
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("%s: %d symbols, %d types, %d fields, %d bytes", p.Version(), p.NumSymbols(), len(p.s[secTypes])/typeRecord, len(p.s[secFields])/fieldRecord, len(p.data))
	if err := p.Verify(); err != nil {
		t.Error(err)
	}
	for _, name := range []string{"_text", "init_task", "linux_banner", "init_top_pgt", "__per_cpu_offset"} {
		if addr, err := p.Symbol(name); addr < kernelSpace || err != nil {
			t.Errorf("%s: %#x, %v", name, addr, err)
		}
	}
	image, err := vmlinuxOf(f, size)
	if err != nil {
		t.Fatal(err)
	}
	v, err := openVmlinux(image)
	if err != nil {
		t.Fatal(err)
	}
	spec, err := btf.LoadSpecFromReader(bytes.NewReader(v.btf))
	if err != nil {
		t.Fatal(err)
	}
	structs, fields := 0, 0
	for typ, err := range spec.All() {
		if err != nil {
			t.Fatal(err)
		}
		s, ok := typ.(*btf.Struct)
		if !ok || s.Name == "" {
			continue
		}
		if all, _ := spec.AnyTypesByName(s.Name); len(all) != 1 {
			continue // several of the name: Field may refuse
		}
		structs++
		if got, err := p.Size(s.Name); got != uint64(s.Size) || err != nil {
			t.Errorf("%s: %d bytes, %v; want %d", s.Name, got, err, s.Size)
		}
		fields += compareFields(t, p, s.Name, s.Members, 0, 0)
	}
	t.Logf("%d structs, %d fields compared", structs, fields)
	if structs < 1000 || fields < 10000 {
		t.Errorf("%d structs and %d fields are too few", structs, fields)
	}
}

// compareFields compares a struct's members, those of anonymous ones in their place.
func compareFields(t *testing.T, p *Profile, name string, members []btf.Member, base btf.Bits, depth int) (n int) {
	for _, m := range members {
		if m.Name == "" {
			var inner []btf.Member
			switch x := btf.UnderlyingType(m.Type).(type) {
			case *btf.Struct:
				inner = x.Members
			case *btf.Union:
				inner = x.Members
			}
			if depth < maxNesting {
				n += compareFields(t, p, name, inner, base+m.Offset, depth+1)
			}
			continue
		}
		f, err := p.Field(name, m.Name)
		if at := f.Offset*8 + uint64(f.BitShift); err != nil || at != uint64(base+m.Offset) || f.BitSize != uint8(m.BitfieldSize) {
			t.Errorf("%s.%s: bit %d, %v; want %d", name, m.Name, at, err, base+m.Offset)
		}
		if size, err := btf.Sizeof(m.Type); err == nil && f.Kind != KindOther && f.Size*f.Count != uint64(size) {
			t.Errorf("%s.%s: %d times %d bytes, want %d", name, m.Name, f.Count, f.Size, size)
		}
		n++
	}
	return n
}

func BenchmarkBuild(b *testing.B) {
	f, size := realKernel(b)
	b.ReportAllocs()
	for b.Loop() {
		if _, err := Build(f, size); err != nil {
			b.Fatal(err)
		}
	}
}

// BenchmarkOpen is a warm start: map, check, and look up what a process list takes.
func BenchmarkOpen(b *testing.B) {
	path := cached(b)
	for b.Loop() {
		f, err := os.Open(path)
		if err != nil {
			b.Fatal(err)
		}
		p, err := Open(f)
		f.Close()
		if err != nil {
			b.Fatal(err)
		}
		for _, name := range []string{"init_task", "_text", "linux_banner", "init_top_pgt", "tk_core"} {
			if _, err := p.Symbol(name); err != nil {
				b.Fatal(err)
			}
		}
		for range 3 {
			for _, path := range []string{"tasks", "pid", "tgid", "comm", "flags", "__state", "exit_state", "real_parent", "mm", "signal", "se.sum_exec_runtime", "stack_canary"} {
				if _, err := p.Offset("task_struct", path); err != nil {
					b.Fatal(err)
				}
			}
		}
		if err := p.Close(); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkVerify(b *testing.B) {
	f, err := os.Open(cached(b))
	if err != nil {
		b.Fatal(err)
	}
	defer f.Close()
	p, err := Open(f)
	if err != nil {
		b.Fatal(err)
	}
	defer p.Close()
	for b.Loop() {
		if err := p.Verify(); err != nil {
			b.Fatal(err)
		}
	}
}

// cached builds a real profile into a file.
func cached(b *testing.B) string {
	f, size := realKernel(b)
	p, err := Build(f, size)
	if err != nil {
		b.Fatal(err)
	}
	path := filepath.Join(b.TempDir(), "profile")
	out, err := os.Create(path)
	if err != nil {
		b.Fatal(err)
	}
	defer out.Close()
	if err := p.Encode(out); err != nil {
		b.Fatal(err)
	}
	return path
}
