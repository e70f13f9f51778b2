package kernel

import (
	"os"
	"testing"
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

func TestBuildReal(t *testing.T) {
	f, size := realKernel(t)
	p, err := Build(f, size)
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("%s: %d symbols, %d types, %d fields, %d bytes", p.Version(), p.NumSymbols(), len(p.s[secTypes])/typeRecord, len(p.s[secFields])/fieldRecord, len(p.data))
	for _, n := range []string{"init_task", "linux_banner", "init_top_pgt", "_text", "__pgtable_l5_enabled", "__per_cpu_offset", "tk_core"} {
		a, err := p.Symbol(n)
		t.Logf("%s %#x %v", n, a, err)
	}
	for _, n := range []string{"tasks", "se.sum_exec_runtime", "real_parent", "pid", "comm", "mm", "__state", "sched_reset_on_fork"} {
		a, err := p.Field("task_struct", n)
		t.Logf("%s %+v %v", n, a, err)
	}
	if err := p.Verify(); err != nil {
		t.Error(err)
	}
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
