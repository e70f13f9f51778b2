package introspect

import (
	"errors"
	"slices"
	"strings"
	"testing"
	"time"

	"vigia/internal/kernel"
	"vigia/internal/memory"
)

// recordings are two real guests, Debian's 6.1 with 256 MiB and 6.12 with 3 GiB of RAM (so with the hole), both with
// KASLR, five levels of tables and two CPUs. In each the same things run: a program of nine or ten threads, one of which
// has burnt a second and ended; a copy of it run from a memfd under a kernel thread's name; another as user 1000;
// a deleted executable; one on a bind mount of a tmpfs; an sshd with a title of its own; a zombie.
var recordings = []string{"6.1.ram.xz", "6.12.ram.xz"}

// notRecorded are the fields for which these recordings have no types: what a kernel lacks is unknown, and the rest as ever. The
// recordings of the whole scene (scene_test.go) have all.
var notRecorded = []string{"groups", "namespaces", "namespace_pid", "cgroup", "net_namespace"}

func beyondRecorded(unknown []string) []string {
	return slices.DeleteFunc(slices.Clone(unknown), func(name string) bool { return slices.Contains(notRecorded, name) })
}

// onRecordings runs a test on each recording.
func onRecordings(t *testing.T, test func(t *testing.T, r *recorded, p *kernel.Profile)) {
	for _, name := range recordings {
		t.Run(strings.TrimSuffix(name, ".ram.xz"), func(t *testing.T) {
			r, p := load(t, name)
			test(t, r, p)
		})
	}
}

func attach(t testing.TB, mem Physical, p *kernel.Profile) *Guest {
	t.Helper()
	g, err := Attach(mem, p)
	if err != nil {
		t.Fatal(err)
	}
	return g
}

func processes(t testing.TB, g *Guest) []Process {
	t.Helper()
	list, err := g.Processes()
	if err != nil {
		t.Fatal(err)
	}
	return list
}

// pick returns the one process that fits.
func pick(t *testing.T, list []Process, what string, fits func(p *Process) bool) Process {
	t.Helper()
	var found []Process
	for i := range list {
		if fits(&list[i]) {
			found = append(found, list[i])
		}
	}
	if len(found) != 1 {
		t.Fatalf("%s: %d processes, want one", what, len(found))
	}
	return found[0]
}

func TestProcesses(t *testing.T) {
	onRecordings(t, func(t *testing.T, r *recorded, p *kernel.Profile) {
		list := processes(t, attach(t, r, p))
		pids := map[int64]bool{0: true}
		for _, p := range list {
			if pids[p.PID] {
				t.Errorf("pid %d is listed twice", p.PID)
			}
			pids[p.PID] = true
		}
		for _, p := range list {
			if !pids[p.PPID] {
				t.Errorf("pid %d: its parent %d is not listed", p.PID, p.PPID)
			}
			if len(beyondRecorded(p.Unknown)) > 0 || len(p.Unknown) == 0 {
				t.Errorf("pid %d %s: %v unknown", p.PID, p.Comm, p.Unknown)
			}
			if p.Kernel && (p.Cmdline != "" || p.Exe != "" || p.PID != 2 && p.PPID != 2) {
				t.Errorf("kernel thread %+v", p)
			}
			if p.Start.Before(time.Date(2026, 11, 22, 0, 0, 0, 0, time.UTC)) || p.Start.After(time.Date(2026, 11, 23, 0, 0, 0, 0, time.UTC)) {
				t.Errorf("pid %d started at %v", p.PID, p.Start)
			}
		}
		many := pick(t, list, "program", func(p *Process) bool { return p.Comm == "memprog" && p.UID == 0 })
		if many.Exe != "/tmp/memprog" || many.Cmdline != "/tmp/memprog" || many.Threads < 9 || many.Threads > 12 || many.State != "S" || many.Kernel {
			t.Errorf("program: %+v", many)
		}
		if many.CPUSeconds < 1 || many.CPUSeconds > 10 {
			t.Errorf("a thread of the program burnt one second and ended: %v seconds", many.CPUSeconds)
		}
		user := pick(t, list, "user's", func(p *Process) bool { return p.UID == 1000 })
		if user.EUID != 1000 || user.SUID != 1000 || user.FSUID != 1000 || user.GID != 1001 || user.EGID != 1001 || user.SGID != 1001 ||
			user.FSGID != 1001 || user.PPID != many.PID || user.Cmdline != "memprog idle with  spaces  end" {
			t.Errorf("user's: %+v", user)
		}
		ghost := pick(t, list, "memfd", func(p *Process) bool { return p.Exe == "/memfd:ghost (deleted)" })
		if ghost.Kernel || ghost.Cmdline != "[kworker/9:9] idle" || ghost.PPID != many.PID {
			t.Errorf("memfd: %+v", ghost)
		}
		gone := pick(t, list, "deleted", func(p *Process) bool { return p.Comm == "gone" })
		if gone.Exe != "/tmp/gone (deleted)" || gone.Cmdline != "/tmp/gone 1000" {
			t.Errorf("deleted: %+v", gone)
		}
		mounted := pick(t, list, "mounted", func(p *Process) bool { return p.Comm == "inmnt" })
		if mounted.Exe != "/tmp/b/inmnt" {
			t.Errorf("on a bind mount: %+v", mounted)
		}
		sshd := pick(t, list, "sshd", func(p *Process) bool { return p.Comm == "sshd" })
		if sshd.Cmdline != "sshd: /usr/sbin/sshd [listener] 0 of 10-100 startups" || sshd.Exe != "/usr/sbin/sshd" {
			t.Errorf("with a title: %+v", sshd)
		}
		zombie := pick(t, list, "zombie", func(p *Process) bool { return p.State == "Z" })
		if zombie.Comm != "sleep" || zombie.Exe != "" || zombie.Cmdline != "" || zombie.Kernel {
			t.Errorf("zombie: %+v", zombie)
		}
		first, second := list[0], list[1]
		if first.PID != 1 || first.Exe != "/usr/bin/dash" || first.Kernel || second.PID != 2 || second.Comm != "kthreadd" || !second.Kernel {
			t.Errorf("the first two: %+v %+v", first, second)
		}
	})
}

func TestCPUAgreesWithProcesses(t *testing.T) {
	onRecordings(t, func(t *testing.T, r *recorded, p *kernel.Profile) {
		g := attach(t, r, p)
		list := processes(t, g)
		times, err := g.CPU(nil)
		if err != nil || len(times) != len(list) {
			t.Fatalf("%d times for %d processes: %v", len(times), len(list), err)
		}
		for i, p := range list {
			c := times[i]
			if c.PID != p.PID || c.Task != p.Task || c.StartTime != p.StartTime || c.Kernel != p.Kernel || string(c.Comm()) != p.Comm || float64(c.CPU)/1e9 != p.CPUSeconds {
				t.Errorf("%+v\n%+v", p, c)
			}
		}
		again, err := g.CPU(times[:0])
		if err != nil || &again[0] != &times[0] {
			t.Errorf("the second sample does not use the first one's memory: %v", err)
		}
	})
}

// TestAbsentPage takes the page of a command line away, as swapping does: it is unknown, or as long as what is there.
func TestAbsentPage(t *testing.T) {
	onRecordings(t, func(t *testing.T, r *recorded, p *kernel.Profile) {
		g := attach(t, r, p)
		gone := pick(t, processes(t, g), "deleted", func(p *Process) bool { return p.Comm == "gone" })
		l := g.layout
		mm, _ := g.space.U64(gone.Task + l.task.mm)
		start, _ := g.space.U64(mm + l.mm.argStart)
		pgd, _ := g.space.U64(mm + l.mm.pgd)
		root, err := g.space.Translate(pgd)
		if err != nil {
			t.Fatal(err)
		}
		user := memory.NewSpace(r, root, g.boot.Levels)
		pa, err := user.Translate(start)
		if err != nil {
			t.Fatal(err)
		}
		// The entry that maps the page is the one that holds its address: clear it.
		for at, line := range r.lines {
			for i := 0; i < lineSize; i += 8 {
				var e uint64
				for j := range 8 {
					e |= uint64(line[i+j]) << (8 * j)
				}
				if e&^(1<<63)&^0xfff == pa&^0xfff && e&1 != 0 {
					clear(line[i : i+8])
					t.Logf("entry at %#x", at+uint64(i))
				}
			}
		}
		after := pick(t, processes(t, g), "deleted", func(p *Process) bool { return p.Comm == "gone" })
		if after.Cmdline != "" || !slices.Contains(after.Unknown, "cmdline") || after.Exe != gone.Exe {
			t.Errorf("%+v", after)
		}
	})
}

func TestUnsupportedIsNamed(t *testing.T) {
	r, p := load(t, recordings[0])
	types := slices.DeleteFunc(slices.Clone(recordedTypes), func(s string) bool { return s == "cred" })
	p, err := p.Reduce(recordedSymbols, types)
	if err != nil {
		t.Fatal(err)
	}
	g := attach(t, r, p)
	for name, view := range map[string]func() error{
		"processes": func() error { _, err := g.Processes(); return err },
		"cpu":       func() error { _, err := g.CPU(nil); return err },
		"files":     func() error { _, err := g.Files(0); return err },
		"sockets":   func() error { _, err := g.Sockets(); return err },
	} {
		if err := view(); !errors.Is(err, kernel.ErrUnsupported) || !strings.Contains(err.Error(), "no type cred") {
			t.Errorf("%s without struct cred: %v", name, err)
		}
	}
	if list, err := g.Modules(); err != nil || len(list) == 0 {
		t.Errorf("modules without struct cred: %d, %v", len(list), err)
	}
	sys, err := g.System()
	if err != nil || sys.Cmdline == "" || sys.Uptime == 0 || !slices.Contains(sys.Unknown, "processes") ||
		!slices.ContainsFunc(sys.Missing, func(s string) bool {
			return strings.HasPrefix(s, "processes: ") && strings.HasSuffix(s, "no type cred")
		}) {
		t.Errorf("the kernel without struct cred: %+v, %v", sys, err)
	}
	p, _ = p.Reduce([]string{"_text"}, nil)
	if _, err = Attach(r, p); !errors.Is(err, kernel.ErrUnsupported) {
		t.Errorf("Attach without symbols: %v", err)
	}
}

// TestWithoutTypes: a kernel without BTF is found all the same, by its own page tables.
func TestWithoutTypes(t *testing.T) {
	onRecordings(t, func(t *testing.T, r *recorded, p *kernel.Profile) {
		whole := attach(t, r, p).Boot()
		p, err := p.Reduce(recordedSymbols, nil)
		if err != nil {
			t.Fatal(err)
		}
		g := attach(t, r, p)
		if b := g.Boot(); b.Phys != whole.Phys || b.Slide != whole.Slide || b.Levels != whole.Levels {
			t.Errorf("found at %+v, want %+v", b, whole)
		}
		sys, err := g.System()
		if err != nil || sys.Cmdline == "" || len(sys.Missing) < 4 {
			t.Errorf("%+v, %v", sys, err)
		}
		if _, err := g.Modules(); !errors.Is(err, kernel.ErrUnsupported) {
			t.Errorf("modules: %v", err)
		}
	})
}

func TestDetail(t *testing.T) {
	onRecordings(t, func(t *testing.T, r *recorded, p *kernel.Profile) {
		g := attach(t, r, p)
		list := processes(t, g)
		times, err := g.CPU(nil)
		if err != nil {
			t.Fatal(err)
		}
		for i, sample := range times {
			got, err := g.Detail(sample)
			if err != nil || got.PID != list[i].PID || got.Cmdline != list[i].Cmdline || got.Exe != list[i].Exe || got.Start != list[i].Start {
				t.Errorf("%+v, %v; want %+v", got, err, list[i])
			}
		}
		ended := times[len(times)-1]
		ended.StartTime--
		if _, err := g.Detail(ended); !errors.Is(err, ErrTorn) {
			t.Errorf("another process at the same address: %v", err)
		}
		ended.Task = 0x1234
		if _, err := g.Detail(ended); !errors.Is(err, ErrTorn) {
			t.Errorf("no process: %v", err)
		}
	})
}
