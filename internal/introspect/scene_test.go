package introspect

import (
	"errors"
	"os"
	"slices"
	"strings"
	"testing"

	"vigia/internal/kernel"
	"vigia/internal/memory"
)

// The recordings of the scene are made like the others, by TestRecordScene: two guests, Debian's 6.1 and 6.12 with 256 MiB,
// in which the same things run: a process that holds a socket of every sort, one that is in a TIME_WAIT, one not yet accepted, a
// page of anonymous code, and a mapped file without a name; its children, one as user 1234 with groups, one in namespaces
// of its own, one in a user namespace, one as user 33 with an ambient capability; a process in a container's
// control group, an sshd in its service's, and a listener in a network namespace.
var scenes = []string{"scene-6.1.ram.xz", "scene-6.12.ram.xz"}

var sceneSymbols = append([]string{"tcp_hashinfo", "udp_table", "udplite_table", "raw_v4_hashinfo", "raw_v6_hashinfo", "net_namespace_list"}, recordedSymbols...)

var sceneTypes = append([]string{"group_info", "nsproxy", "mnt_namespace", "net", "uts_namespace", "ipc_namespace", "cgroup_namespace", "time_namespace",
	"upid", "pid_namespace", "user_namespace", "css_set", "cgrp_cset_link", "cgroup", "kernfs_node", "maple_range_64", "maple_arange_64",
	"vm_area_struct", "super_block", "file_system_type", "ns_common", "proc_ns_operations", "sock_common", "inet_hashinfo", "inet_ehash_bucket",
	"inet_listen_hashbucket", "udp_table", "udp_hslot", "raw_hashinfo", "packet_sock"}, recordedTypes...)

func TestRecordScene(t *testing.T) {
	out := os.Getenv("VIGIA_RECORD_SCENE")
	if out == "" {
		t.Skip("VIGIA_RECORD_SCENE names no file to record to")
	}
	_, p, m := live(t)
	p, err := p.Reduce(sceneSymbols, sceneTypes)
	if err != nil {
		t.Fatal(err)
	}
	r := &recorder{RAM: m, lines: make(map[uint64][]byte)}
	g := attach(t, r, p)
	banner := make([]byte, len(p.Banner()))
	_ = r.ReadPhys(g.boot.Phys+g.link.banner-g.link.text, banner)
	list := processes(t, g)
	_, err1 := g.CPU(nil)
	_, err2 := g.Modules()
	_, err3 := g.Sockets()
	_, err4 := g.Files(0)
	_, err5 := g.System()
	_, _ = g.Panicked()
	t.Log(err1, err2, err3, err4, err5)
	for _, p := range list {
		if slices.Contains([]string{"scene", "sshd", "gone"}, p.Comm) {
			if _, err := g.Maps(p.PID); err != nil {
				t.Fatal(err)
			}
		}
	}
	writeRecording(t, out, p, r)
}

func onScenes(t *testing.T, test func(t *testing.T, r *recorded, p *kernel.Profile)) {
	for _, name := range scenes {
		t.Run(strings.TrimSuffix(strings.TrimPrefix(name, "scene-"), ".ram.xz"), func(t *testing.T) {
			r, p := load(t, name)
			test(t, r, p)
		})
	}
}

var _ memory.Sized = (*recorded)(nil)

// capability bits (capability.h)
const (
	netBindService = 1 << 10
	fullSet        = 1<<41 - 1
)

func TestSceneCredentials(t *testing.T) {
	onScenes(t, func(t *testing.T, r *recorded, p *kernel.Profile) {
		list := processes(t, attach(t, r, p))
		for _, p := range list {
			if len(p.Unknown) > 0 {
				t.Errorf("pid %d %s: %v unknown", p.PID, p.Comm, p.Unknown)
			}
		}
		root := pick(t, list, "scene", func(p *Process) bool { return p.Cmdline == "scene" })
		if c := root.Capabilities; c.Effective != fullSet || c.Permitted != fullSet || c.Bounding != fullSet || c.Inheritable != 0 || c.Ambient != 0 || len(root.Groups) != 0 {
			t.Errorf("root's: %+v", root)
		}
		user := pick(t, list, "user", func(p *Process) bool { return p.UID == 1234 })
		if !slices.Equal(user.Groups, []uint32{7, 42, 100}) || user.GID != 2345 || user.Capabilities != (Capabilities{Bounding: fullSet}) {
			t.Errorf("user's: %+v", user)
		}
		ambient := pick(t, list, "ambient", func(p *Process) bool { return p.UID == 33 })
		if ambient.Capabilities != (Capabilities{netBindService, netBindService, netBindService, fullSet, netBindService}) {
			t.Errorf("with an ambient capability: %+v", ambient.Capabilities)
		}
		inner := pick(t, list, "in another user namespace", func(p *Process) bool { return p.Namespaces.User != root.Namespaces.User })
		if inner.Cmdline != "/proc/self/exe child userns" || inner.Namespaces.User == 0 || inner.Namespaces.PID != root.Namespaces.PID {
			t.Errorf("in another user namespace: %+v", inner.Namespaces)
		}
	})
}

func TestSceneNamespaces(t *testing.T) {
	onScenes(t, func(t *testing.T, r *recorded, p *kernel.Profile) {
		list := processes(t, attach(t, r, p))
		init, own := list[0].Namespaces, pick(t, list, "spaces", func(p *Process) bool { return p.Cmdline == "/proc/self/exe child spaces" })
		// The first namespaces have numbers fixed by the kernel (include/linux/proc_ns.h).
		if init.UTS != 0xEFFFFFFE || init.User != 0xEFFFFFFD || init.PID != 0xEFFFFFFC || init.IPC != 0xEFFFFFFF || init.Cgroup != 0xEFFFFFFB || init.Time != 0xEFFFFFFA ||
			init.Net == 0 || init.Mnt == 0 {
			t.Errorf("init's: %+v", init)
		}
		n := own.Namespaces
		if own.NamespacePID != 1 || own.PID == 1 || n.PID == init.PID || n.Net == init.Net || n.Mnt == init.Mnt || n.UTS == init.UTS || n.IPC == init.IPC || n.User != init.User || n.Cgroup != init.Cgroup {
			t.Errorf("in its own: pid %d, %d inside, %+v", own.PID, own.NamespacePID, n)
		}
		for _, p := range list {
			if p.Namespaces.PID == init.PID && p.NamespacePID != p.PID {
				t.Errorf("pid %d is %d in the first namespace", p.PID, p.NamespacePID)
			}
		}
	})
}

func TestSceneCgroups(t *testing.T) {
	const id = "0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef"
	onScenes(t, func(t *testing.T, r *recorded, p *kernel.Profile) {
		list := processes(t, attach(t, r, p))
		contained := pick(t, list, "contained", func(p *Process) bool { return p.Cmdline == "busybox sleep 12345" })
		if contained.Cgroup != "/system.slice/docker-"+id+".scope" || contained.Container != id || contained.Runtime != "docker" || contained.Unit != "docker-"+id+".scope" {
			t.Errorf("in a container: %q %q %q %q", contained.Cgroup, contained.Container, contained.Runtime, contained.Unit)
		}
		sshd := pick(t, list, "sshd", func(p *Process) bool { return p.Comm == "sshd" })
		if sshd.Cgroup != "/system.slice/ssh.service" || sshd.Unit != "ssh.service" || sshd.Container != "" {
			t.Errorf("in a service: %q %q %q", sshd.Cgroup, sshd.Unit, sshd.Container)
		}
		if list[0].Cgroup != "/" || list[0].Unit != "" {
			t.Errorf("init: %q %q", list[0].Cgroup, list[0].Unit)
		}
	})
}

func TestContainersByPath(t *testing.T) {
	id := strings.Repeat("0123456789abcdef", 4)
	for path, want := range map[string][3]string{
		"/": {}, "": {}, "/user.slice/user-1000.slice/session-3.scope": {"", "", "session-3.scope"},
		"/docker/" + id:                            {id, "docker", ""},
		"/docker/short":                            {},
		"/machine.slice/libpod-" + id + ".scope":   {id, "podman", "libpod-" + id + ".scope"},
		"/machine.slice/libpod-conmon-x.scope":     {"", "", "libpod-conmon-x.scope"},
		"/lxc.payload.web/init.scope":              {"web", "lxc", "init.scope"},
		"/lxc/web/system.slice/ssh.service":        {"web", "lxc", "ssh.service"},
		"/kubepods/burstable/pod12-34/" + id:       {id, "kubernetes", ""},
		"/x/cri-containerd-" + id + ".scope":       {id, "containerd", "cri-containerd-" + id + ".scope"},
		"/machine.slice/machine-box.scope/payload": {"box", "systemd-nspawn", "machine-box.scope"},
	} {
		container, runtime, unit := whose(path)
		if got := [3]string{container, runtime, unit}; got != want {
			t.Errorf("%s: %q, want %q", path, got, want)
		}
	}
}

func TestSceneSockets(t *testing.T) {
	onScenes(t, func(t *testing.T, r *recorded, p *kernel.Profile) {
		g := attach(t, r, p)
		list, err := g.Sockets()
		if err != nil {
			t.Fatal(err)
		}
		init := processes(t, g)[0].Namespaces.Net
		has := func(protocol, local, remote, state, owner, comm string, net bool) {
			t.Helper()
			if !slices.ContainsFunc(list, func(s Socket) bool {
				return s.Protocol == protocol && s.Local == local && (remote == "?" || s.Remote == remote) && s.State == state && s.Owner == owner && s.Comm == comm && (s.Net == init) == net
			}) {
				t.Errorf("no %s socket of %q (%s) at %q to %q, %s", protocol, comm, owner, local, remote, state)
			}
		}
		has("tcp", "127.0.0.1:7001", "", "listen", "process", "scene", true)
		has("tcp6", "[::]:7002", "", "listen", "process", "scene", true)
		has("tcp6", "[::1]:7002", "?", "established", "none", "", true) // in the listener's queue
		has("udp", "0.0.0.0:7004", "", "unconnected", "process", "scene", true)
		has("udp6", "[::1]:7005", "", "unconnected", "process", "scene", true)
		has("raw", "0.0.0.0:1", "", "unconnected", "process", "scene", true)
		has("raw6", "[::]:58", "", "unconnected", "process", "scene", true)
		has("packet", "0x0003", "", "", "process", "scene", true)
		has("unix", "/run/scene.sock", "", "listen", "process", "scene", true)
		has("unix", "@scene-abstract", "", "listen", "process", "scene", true)
		has("unix", "/run/scene.sock", "", "established", "none", "", true)
		has("tcp6", "[::]:9999", "", "listen", "process", "busybox", false)
		tables, err := g.SocketsByTables()
		if err != nil {
			t.Fatal(err)
		}
		files, err := g.SocketsByFiles()
		if err != nil {
			t.Fatal(err)
		}
		known := map[uint64]string{}
		for _, s := range tables {
			known[s.Sock] = s.Protocol + s.Local + s.Remote
		}
		for _, s := range files {
			bound := s.Local != "" && s.Protocol != "netlink"
			if text := s.Protocol + s.Local + s.Remote; bound && known[s.Sock] != text {
				t.Errorf("%s is in no table, or there it is %q", text, known[s.Sock])
			}
		}
	})
	// One of the two had a connection that was over, still.
	r, p := load(t, scenes[0])
	list, err := attach(t, r, p).Sockets()
	if err != nil || !slices.ContainsFunc(list, func(s Socket) bool {
		return s.Protocol == "tcp" && s.Remote == "127.0.0.1:7003" && s.State == "time-wait" && s.Owner == "none" && slices.Equal(s.Unknown, []string{"uid"})
	}) {
		t.Errorf("no TIME_WAIT, %v", err)
	}
}

func TestSceneMaps(t *testing.T) {
	onScenes(t, func(t *testing.T, r *recorded, p *kernel.Profile) {
		g := attach(t, r, p)
		list := processes(t, g)
		maps := func(what string, fits func(p *Process) bool) []Region {
			regions, err := g.Maps(pick(t, list, what, fits).PID)
			if err != nil || len(regions) < 10 {
				t.Fatalf("%s: %d regions, %v", what, len(regions), err)
			}
			for i, m := range regions {
				if i > 0 && m.Start < regions[i-1].End || m.End <= m.Start || len(m.Unknown) > 0 {
					t.Errorf("%s: %+v", what, m)
				}
			}
			return regions
		}
		scene := maps("scene", func(p *Process) bool { return p.Cmdline == "scene" })
		has := func(regions []Region, want Region) {
			t.Helper()
			if !slices.ContainsFunc(regions, func(m Region) bool {
				return m.Permissions == want.Permissions && m.File == want.File && m.Kind == want.Kind && slices.Equal(m.Marks, want.Marks)
			}) {
				t.Errorf("no region like %+v", want)
			}
		}
		has(scene, Region{Permissions: "rwxp", Kind: "anonymous", Marks: []string{"anonymous-executable", "writable-executable"}})
		has(scene, Region{Permissions: "r--s", File: "/run/gone (deleted)", Kind: "file"})
		has(scene, Region{Permissions: "r-xp", File: "/usr/local/bin/scene", Kind: "file"})
		has(scene, Region{Permissions: "r-xp", Kind: "vdso"})
		has(scene, Region{Permissions: "rw-p", Kind: "stack"})
		gone := maps("gone", func(p *Process) bool { return p.Comm == "gone" })
		has(gone, Region{Permissions: "r-xp", File: "/tmp/gone (deleted)", Kind: "file", Marks: []string{"deleted-executable"}})
		has(gone, Region{Permissions: "rw-p", Kind: "heap"})
		sshd := maps("sshd", func(p *Process) bool { return p.Comm == "sshd" })
		if i := slices.IndexFunc(sshd, func(m Region) bool { return len(m.Marks) > 0 }); i >= 0 {
			t.Errorf("nothing about an sshd deserves a look: %+v", sshd[i])
		}
		if regions, err := g.Maps(2); err != nil || len(regions) != 0 {
			t.Errorf("a kernel thread: %v, %v", regions, err)
		}
		if _, err := g.Maps(31337); !errors.Is(err, ErrNoProcess) {
			t.Errorf("no such process: %v", err)
		}
	})
}

func TestSceneFiles(t *testing.T) {
	onScenes(t, func(t *testing.T, r *recorded, p *kernel.Profile) {
		list, err := attach(t, r, p).Files(0)
		if err != nil {
			t.Fatal(err)
		}
		has := func(want File) {
			t.Helper()
			if !slices.ContainsFunc(list, func(f File) bool {
				return f.Comm == want.Comm && f.Type == want.Type && f.Path == want.Path && f.Mode == want.Mode && f.Position == want.Position &&
					f.Deleted == want.Deleted && f.Filesystem == want.Filesystem && len(f.Unknown) == 0
			}) {
				t.Errorf("no file like %+v", want)
			}
		}
		has(File{Comm: "scene", Type: "file", Path: "/run/gone (deleted)", Mode: "rw", Position: 4, Deleted: true, Filesystem: "tmpfs"})
		has(File{Comm: "scene", Type: "file", Path: "/etc/passwd", Mode: "r", Filesystem: "ext4"})
		has(File{Comm: "scene", Type: "file", Path: "/run/scene.log", Mode: "w", Position: 12, Filesystem: "tmpfs"})
		if !slices.ContainsFunc(list, func(f File) bool { return f.Path == "anon_inode:[pidfd]" }) {
			t.Error("no pidfd")
		}
	})
}

// TestMapleTreeInCircles: a tree made to lead back to itself ends, and so does one whose nodes claim to be dead.
func TestMapleTreeInCircles(t *testing.T) {
	onScenes(t, func(t *testing.T, r *recorded, p *kernel.Profile) {
		g := attach(t, r, p)
		scene := pick(t, processes(t, g), "scene", func(p *Process) bool { return p.Cmdline == "scene" })
		if _, err := g.Maps(scene.PID); err != nil {
			t.Fatal(err)
		}
		mm, _ := g.space.U64(scene.Task + g.layout.task.mm)
		root, _ := g.space.U64(mm + g.maps.tree)
		node := root &^ mapleMask
		slots := g.maps.slotsArange
		pa, err := g.space.Translate(node)
		if err != nil || root>>3&15 != mapleArange {
			t.Fatalf("the root %#x is no inner node: %v", root, err)
		}
		for i := range uint64(8) {
			r.put(pa+slots+8*i, root)
		}
		if list, err := g.Maps(scene.PID); !errors.Is(err, ErrTorn) {
			t.Errorf("a circle: %d regions, %v", len(list), err)
		}
		r.put(pa, node)
		if list, err := g.Maps(scene.PID); !errors.Is(err, ErrTorn) {
			t.Errorf("a dead root: %d regions, %v", len(list), err)
		}
	})
}
