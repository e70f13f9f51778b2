package introspect

import (
	"slices"
	"testing"

	"vigia/internal/kernel"
)

func TestModules(t *testing.T) {
	want := map[string][]string{
		"6.1":  {"dummy", "virtio_net", "net_failover", "failover", "virtio_pci", "virtio_pci_legacy_dev", "virtio_pci_modern_dev", "virtio", "virtio_ring"},
		"6.12": {"dummy"},
	}
	sizes := map[string]uint64{"6.1": 16384, "6.12": 12288} // of dummy, as the guest's /proc/modules said
	onRecordings(t, func(t *testing.T, r *recorded, p *kernel.Profile) {
		version := p.Version()[:len("6.1")]
		if p.Version()[3] != '.' {
			version = p.Version()[:len("6.12")]
		}
		list, err := attach(t, r, p).Modules()
		if err != nil {
			t.Fatal(err)
		}
		var names []string
		for _, m := range list {
			names = append(names, m.Name)
			if m.State != "live" || m.Address < 0xffffffffc0000000 || m.Size == 0 {
				t.Errorf("%+v", m)
			}
		}
		if !slices.Equal(names, want[version]) || list[0].Size != sizes[version] {
			t.Errorf("modules %v, the first of %d bytes; want %v, %d", names, list[0].Size, want[version], sizes[version])
		}
	})
}

func TestSockets(t *testing.T) {
	onRecordings(t, func(t *testing.T, r *recorded, p *kernel.Profile) {
		list, err := attach(t, r, p).Sockets()
		if err != nil {
			t.Fatal(err)
		}
		var dialed Socket
		for _, s := range list {
			if len(beyondRecorded(s.Unknown)) > 0 {
				t.Errorf("%+v", s)
			}
			if s.Protocol == "tcp" && s.Remote == "127.0.0.1:8080" {
				dialed = s
			}
		}
		has := func(protocol, local, remote, state, comm string) {
			t.Helper()
			if !slices.ContainsFunc(list, func(s Socket) bool {
				return s.Protocol == protocol && s.Local == local && s.Remote == remote && s.State == state && s.Comm == comm
			}) {
				t.Errorf("no %s socket of %s at %q to %q, %s", protocol, comm, local, remote, state)
			}
		}
		has("tcp", "0.0.0.0:22", "", "listen", "sshd")
		has("tcp6", "[::]:22", "", "listen", "sshd")
		has("mptcp", "127.0.0.1:8080", "", "listen", "memprog")
		has("mptcp6", "[::1]:8081", "", "listen", "memprog")
		has("tcp", "127.0.0.1:8080", dialed.Local, "established", "memprog")
		has("udp", "0.0.0.0:5353", "", "unconnected", "memprog")
		has("unix", "/run/thing.sock", "", "listen", "memprog")
		has("unix", "", "/run/thing.sock", "established", "memprog")
		has("unix", "@hidden", "", "listen", "memprog")
		has("unix", "/run/dbus/system_bus_socket", "", "listen", "dbus-daemon")
	})
}

func TestFiles(t *testing.T) {
	onRecordings(t, func(t *testing.T, r *recorded, p *kernel.Profile) {
		g := attach(t, r, p)
		list, err := g.Files(0)
		if err != nil {
			t.Fatal(err)
		}
		has := func(comm, typ, path string) File {
			t.Helper()
			i := slices.IndexFunc(list, func(f File) bool { return f.Comm == comm && f.Type == typ && f.Path == path })
			if i < 0 {
				t.Fatalf("no %s %q of %s", typ, path, comm)
			}
			return list[i]
		}
		has("tail", "file", "/etc/passwd")
		has("tail", "other", "anon_inode:inotify")
		has("memprog", "other", "anon_inode:[eventpoll]")
		has("sh", "character", "/dev/ttyS0")
		ghost := has("memprog", "file", "/memfd:ghost (deleted)")
		if !slices.ContainsFunc(list, func(f File) bool { return f.Type == "pipe" && len(f.Path) > len("pipe:[]") }) {
			t.Error("no pipe")
		}
		own, err := g.Files(ghost.PID)
		if err != nil || len(own) == 0 || slices.ContainsFunc(own, func(f File) bool { return f.PID != ghost.PID }) {
			t.Errorf("files of pid %d: %v %v", ghost.PID, own, err)
		}
	})
}

func TestSystem(t *testing.T) {
	onRecordings(t, func(t *testing.T, r *recorded, p *kernel.Profile) {
		g := attach(t, r, p)
		s, err := g.System()
		if err != nil {
			t.Fatal(err)
		}
		if s.Cmdline != "console=ttyS0 quiet no_timer_check root=/dev/nvme0n1 ro init=/sbin/tiny-init " || s.Taint != 0 || s.Levels != 5 ||
			s.Slide == 0 || s.Processes != len(processes(t, g)) || s.Forks < 100 || s.Uptime < 5 || s.Uptime > 120 || s.Time.Year() != 2026 || len(s.Unknown) > 0 {
			t.Errorf("%+v", s)
		}
	})
}

func TestPanicked(t *testing.T) {
	onRecordings(t, func(t *testing.T, r *recorded, p *kernel.Profile) {
		g := attach(t, r, p)
		if !slices.ContainsFunc(p.SymbolsNamed("panic_cpu"), func(kernel.Symbol) bool { return true }) {
			t.Skip("recorded without panic_cpu")
		}
		if yes, err := g.Panicked(); yes || err != nil {
			t.Errorf("a sound kernel: %v, %v", yes, err)
		}
		addr, err := p.Symbol("panic_cpu")
		if err != nil {
			t.Fatal(err)
		}
		pa := g.boot.Phys + addr - g.link.text
		r.put(pa&^7, 0) // processor 0
		if yes, err := g.Panicked(); !yes || err != nil {
			t.Errorf("a kernel that panicked: %v, %v", yes, err)
		}
	})
}

// TestManyViews: each view has its own allowance of reads.
func TestManyViews(t *testing.T) {
	r, p := load(t, recordings[0])
	g := attach(t, r, p)
	g.limit = 10_000
	for range 50 {
		for _, p := range processes(t, g) {
			if _, err := g.Detail(TaskTime{Task: p.Task, StartTime: p.StartTime}); err != nil {
				t.Fatal(err)
			}
		}
	}
}

// TestStill: a guest that stands still is looked for again, and found where it was.
func TestStill(t *testing.T) {
	onRecordings(t, func(t *testing.T, r *recorded, p *kernel.Profile) {
		g := attach(t, r, p)
		want := processes(t, g)
		if g.link.jiffies == 0 {
			t.Skip("recorded without jiffies_64")
		}
		g.tickAt = g.tickAt.Add(-2 * stillFor)
		before := r.reads
		if got := processes(t, g); len(got) != len(want) || r.reads-before < 2*len(got) {
			t.Errorf("%d processes, want %d", len(got), len(want))
		}
	})
}
