package introspect

import (
	"fmt"
	"os"
	"strings"
	"testing"
	"time"

	"vigia/internal/kernel"
	"vigia/internal/memory"
)

// live attaches to a guest that runs now: VIGIA_TEST_KERNEL is its kernel file, VIGIA_TEST_RAM its RAM file, on a
// q35 machine. These tests show what they see; what must hold is tested on the recorded memory and in test/.
func live(t testing.TB) (*Guest, *kernel.Profile, *memory.RAM) {
	t.Helper()
	image, ram := os.Getenv("VIGIA_TEST_KERNEL"), os.Getenv("VIGIA_TEST_RAM")
	if image == "" || ram == "" {
		t.Skip("VIGIA_TEST_KERNEL and VIGIA_TEST_RAM name no running guest: the tests on one are left out")
	}
	kf, err := os.Open(image)
	if err != nil {
		t.Fatal(err)
	}
	defer kf.Close()
	st, err := kf.Stat()
	if err != nil {
		t.Fatal(err)
	}
	p, err := kernel.Build(kf, st.Size())
	if err != nil {
		t.Fatal(err)
	}
	f, err := os.Open(ram)
	if err != nil {
		t.Fatal(err)
	}
	if st, err = f.Stat(); err != nil {
		t.Fatal(err)
	}
	m, err := memory.Map(f, memory.Q35Layout(uint64(st.Size())))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { m.Close() })
	g, err := Attach(m, p)
	if err != nil {
		t.Fatal(err)
	}
	return g, p, m
}

func TestLiveProcesses(t *testing.T) {
	g, _, _ := live(t)
	list, err := g.Processes()
	if err != nil {
		t.Fatal(err)
	}
	fmt.Printf("%+v\n", g.Boot())
	for _, p := range list {
		fmt.Printf("%5d %5d %5d %s %2d %8.2f %s %-16s %s | %s %v\n", p.PID, p.PPID, p.UID, p.State, p.Threads, p.CPUSeconds, p.Start.Format("15:04:05.00"), p.Comm, p.Exe, p.Cmdline, p.Unknown)
	}
}

func TestLiveViews(t *testing.T) {
	g, _, _ := live(t)
	sys, err := g.System()
	fmt.Printf("%+v %v\n", sys, err)
	modules, err := g.Modules()
	fmt.Println(len(modules), err)
	for _, m := range modules {
		fmt.Printf("%+v\n", m)
	}
	sockets, err := g.Sockets()
	fmt.Println(len(sockets), err)
	for _, s := range sockets {
		fmt.Printf("%+v\n", s)
	}
	files, err := g.Files(0)
	fmt.Println(len(files), err)
	for _, f := range files {
		fmt.Printf("%+v\n", f)
	}
}

func BenchmarkLiveCPU(b *testing.B) {
	g, _, _ := live(b)
	var list []TaskTime
	b.ReportAllocs()
	for b.Loop() {
		var err error
		if list, err = g.CPU(list[:0]); err != nil {
			b.Fatal(err)
		}
	}
	b.ReportMetric(float64(len(list)), "tasks")
}

func BenchmarkLiveProcesses(b *testing.B) {
	g, _, _ := live(b)
	b.ReportAllocs()
	for b.Loop() {
		if _, err := g.Processes(); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkLiveAttach(b *testing.B) {
	_, p, m := live(b)
	for b.Loop() {
		if _, err := Attach(m, p); err != nil {
			b.Fatal(err)
		}
	}
}

// TestLiveSteady watches a guest for some seconds: every sample works, CPU time never runs backwards, and a process
// that is in one sample and the next-but-one is in the one between.
func TestLiveSteady(t *testing.T) {
	g, _, _ := live(t)
	type key struct{ task, start uint64 }
	var last, before map[key]uint64
	samples, flickers, backwards, unknown, tasks := 0, 0, 0, 0, 0
	seen := map[key]bool{}
	var list []TaskTime
	for end := time.Now().Add(8 * time.Second); time.Now().Before(end); samples++ {
		var err error
		if list, err = g.CPU(list[:0]); err != nil {
			t.Fatalf("sample %d: %v", samples, err)
		}
		now := make(map[key]uint64, len(list))
		for _, p := range list {
			k := key{p.Task, p.StartTime}
			now[k], seen[k] = p.CPU, true
			if p.CPU < last[k] {
				backwards++
				t.Logf("sample %d: pid %d %s: %d ns, before %d", samples, p.PID, p.Comm(), p.CPU, last[k])
			}
			if _, ok := before[k]; ok && last[k] == 0 {
				if _, ok := last[k]; !ok {
					flickers++
					t.Logf("sample %d: pid %d %s was not in the last one", samples, p.PID, p.Comm())
				}
			}
		}
		before, last, tasks = last, now, tasks+len(list)
		if samples%10 == 0 {
			full, err := g.Processes()
			if err != nil {
				t.Fatal(err)
			}
			for _, p := range full {
				if len(p.Unknown) > 0 {
					unknown++
				}
			}
		}
	}
	t.Logf("%d samples of %d tasks, %d different; %d flickers, %d backwards, %d with something unknown", samples, tasks/samples, len(seen), flickers, backwards, unknown)
	if flickers+backwards > 0 {
		t.Error("a list was not whole")
	}
}

// TestLiveProcess reads the same guest through its QEMU's memory, as a clone's is read: VIGIA_TEST_QEMU is its pid.
func TestLiveProcess(t *testing.T) {
	g, p, m := live(t)
	pid := os.Getenv("VIGIA_TEST_QEMU")
	if pid == "" {
		t.Skip("VIGIA_TEST_QEMU names no QEMU: reading through its memory is left out")
	}
	maps, err := os.ReadFile("/proc/" + pid + "/maps")
	if err != nil {
		t.Fatal(err)
	}
	var base uint64
	for line := range strings.Lines(string(maps)) {
		if strings.Contains(line, os.Getenv("VIGIA_TEST_RAM")) {
			if _, err := fmt.Sscanf(line, "%x-", &base); err != nil {
				t.Fatal(err)
			}
			break
		}
	}
	mem, err := os.Open("/proc/" + pid + "/mem")
	if err != nil {
		t.Fatal(err)
	}
	defer mem.Close()
	ram, err := memory.NewProcess(mem, base, m.Regions())
	if err != nil {
		t.Fatal(err)
	}
	began := time.Now()
	c, err := Attach(ram, p)
	if err != nil {
		t.Fatal(err)
	}
	attached := time.Now()
	want, got := processes(t, g), processes(t, c)
	listed := time.Now()
	if _, err := c.CPU(nil); err != nil {
		t.Fatal(err)
	}
	t.Logf("attach %v, list %v, CPU time %v", attached.Sub(began), listed.Sub(attached), time.Since(listed))
	if len(want) != len(got) || c.Boot() != g.Boot() {
		t.Errorf("%d processes, the mapping has %d", len(got), len(want))
	}
}

func TestLiveCheck(t *testing.T) {
	g, _, _ := live(t)
	c := NewChecker(g, nil)
	for _, full := range []bool{false, true} {
		r, err := c.Run(full)
		if err != nil {
			t.Fatal(err)
		}
		fmt.Printf("full %v: %v\n", full, r.Took)
		for _, f := range r.Findings {
			fmt.Printf("%+v\n", f)
		}
		for _, v := range r.Views {
			fmt.Printf("%+v\n", v)
		}
	}
}
