package jail

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

// fakeHost lays out a cgroup file system: files by path, and the text of /proc/self/cgroup.
func fakeHost(t *testing.T, membership string, files map[string]string) (root, proc string) {
	t.Helper()
	root, proc = t.TempDir(), t.TempDir()
	os.WriteFile(filepath.Join(proc, "cgroup"), []byte(membership), 0o644)
	for name, content := range files {
		p := filepath.Join(root, name)
		os.MkdirAll(filepath.Dir(p), 0o755)
		os.WriteFile(p, []byte(content), 0o644)
	}
	return root, proc
}

var fullLimits = Limits{Memory: 1 << 30, CPUs: 1.5, PIDs: 100, IOBytes: 1 << 20, IODevice: "8:0"}

// Version 1: each controller has its own tree.
func TestGroupVersion1(t *testing.T) {
	root, proc := fakeHost(t, "3:memory:/svc\n2:cpu,cpuacct:/\n1:pids:/svc\n", map[string]string{
		"memory/svc/cgroup.procs": "", "cpu/cgroup.procs": "", "pids/svc/cgroup.procs": "",
	})
	g := newGroup(t, root, proc)
	wantFile(t, root, "memory/svc/vigia-t/web/memory.limit_in_bytes", "1073741824")
	wantFile(t, root, "cpu/vigia-t/web/cpu.cfs_quota_us", "150000")
	wantFile(t, root, "pids/svc/vigia-t/web/pids.max", "100")
	if why := lacking(g.Measures)["io limit"]; !strings.Contains(why, "no io controller") {
		t.Errorf("nobody is told that there is no io limit: %v", g.Measures)
	}
	if err := g.add(1234); err != nil {
		t.Fatal(err)
	}
	wantFile(t, root, "memory/svc/vigia-t/web/cgroup.procs", "1234")
}

// Version 2, delegated: one tree. The controllers are handed down on the way.
func TestGroupVersion2(t *testing.T) {
	root, proc := fakeHost(t, "0::/user.slice/vigia.service\n", map[string]string{
		"user.slice/vigia.service/cgroup.controllers":             "cpu io memory pids\n",
		"user.slice/vigia.service/cgroup.subtree_control":         "cpu io memory pids\n",
		"user.slice/vigia.service/vigia-t/cgroup.subtree_control": "",
	})
	g := newGroup(t, root, proc)
	dir := "user.slice/vigia.service/vigia-t/web/"
	wantFile(t, root, dir+"memory.max", "1073741824")
	wantFile(t, root, dir+"memory.oom.group", "1")
	wantFile(t, root, dir+"cpu.max", "150000 100000")
	wantFile(t, root, dir+"pids.max", "100")
	wantFile(t, root, dir+"io.max", "8:0 rbps=1048576 wbps=1048576")
	if lack := lacking(g.Measures); len(lack) > 0 {
		t.Errorf("%v", lack)
	}
	if len(g.dirs) != 1 {
		t.Errorf("directories %v", g.dirs)
	}
}

// A hybrid host: version 2 beside version 1, with a controller each.
func TestGroupHybrid(t *testing.T) {
	root, proc := fakeHost(t, "1:memory:/\n0::/\n", map[string]string{
		"memory/cgroup.procs": "", "unified/cgroup.controllers": "hugetlb\n", "unified/cgroup.subtree_control": "",
	})
	g := newGroup(t, root, proc)
	if slices.ContainsFunc(g.Measures, func(m Measure) bool { return m.Name == "memory limit" && !m.InForce }) {
		t.Errorf("%v", g.Measures)
	}
	if len(lacking(g.Measures)) != 3 {
		t.Errorf("%v", g.Measures)
	}
}

// Started by systemd with DelegateSubgroup=daemon, or found again after stepping aside: machines go beside the daemon.
func TestGroupBesideTheDaemon(t *testing.T) {
	root, proc := fakeHost(t, "0::/vigia.service/daemon\n", map[string]string{
		"vigia.service/daemon/cgroup.controllers":      "",
		"vigia.service/cgroup.controllers":             "cpu io memory pids\n",
		"vigia.service/cgroup.subtree_control":         "cpu io memory pids\n",
		"vigia.service/vigia-t/cgroup.subtree_control": "",
	})
	newGroup(t, root, proc)
	wantFile(t, root, "vigia.service/vigia-t/web/pids.max", "100")
}

// The kernel's own rule of version 2, no processes in an inner group: this process steps aside.
func TestStepAside(t *testing.T) {
	const mount = "/sys/fs/cgroup/unified"
	have, err := os.ReadFile(mount + "/cgroup.controllers")
	if err != nil || !strings.Contains(string(have), "hugetlb") || os.Getuid() != 0 {
		t.Skip("needs root and a version 2 tree with hugetlb beside version 1")
	}
	if sub, _ := os.ReadFile(mount + "/cgroup.subtree_control"); !strings.Contains(string(sub), "hugetlb") {
		if err := os.WriteFile(mount+"/cgroup.subtree_control", []byte("+hugetlb"), 0); err != nil {
			t.Skip(err)
		}
		defer os.WriteFile(mount+"/cgroup.subtree_control", []byte("-hugetlb"), 0)
	}
	inner := fmt.Sprintf("%s/vigia-test-aside-%d", mount, os.Getpid())
	self := []byte(fmt.Sprint(os.Getpid()))
	if err := os.Mkdir(inner, 0o755); err != nil {
		t.Skip(err)
	}
	defer os.Remove(inner)
	defer os.Remove(inner + "/" + daemonLeaf)
	if err := os.WriteFile(inner+"/cgroup.procs", self, 0); err != nil {
		t.Fatal(err)
	}
	defer os.WriteFile(mount+"/cgroup.procs", self, 0)

	tree, err := OpenTree("/sys/fs/cgroup", "/proc/self", "vigia-t")
	if err != nil {
		t.Fatal(err)
	}
	defer tree.Remove()
	g := &Group{Name: "web"}
	defer g.Remove()
	s := setting{controller: "hugetlb", name: "huge page limit", v2: []pair{{"hugetlb.2MB.max", "0"}}}
	if _, err := tree.apply(g, s); err != nil {
		t.Fatal(err)
	}
	p, err := QEMU{Binary: captive, Args: []string{"try", "sleep"}, Group: g}.Start(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	in, _ := os.ReadFile(fmt.Sprintf("/proc/%d/cgroup", p.PID))
	p.Kill()
	<-p.Done()
	p.Close()
	if !strings.Contains(string(in), "/vigia-t/web\n") {
		t.Errorf("it is in %s", in)
	}
	again, err := OpenTree("/sys/fs/cgroup", "/proc/self", "vigia-t")
	if err != nil || again.unified != tree.unified {
		t.Errorf("found again at %s, was at %s: %v", again.unified, tree.unified, err)
	}
}

// No right to anything: every limit is told to be off, with what to do.
func TestGroupWithoutRights(t *testing.T) {
	root, proc := fakeHost(t, "0::/session\n", map[string]string{"session/cgroup.controllers": "cpu memory pids\n"})
	os.WriteFile(filepath.Join(root, "session/vigia-t"), nil, 0o600) // in the way, which stops even root
	g := newGroup(t, root, proc)
	lack := lacking(g.Measures)
	if len(lack) != 4 || !strings.Contains(lack["memory limit"], "Delegate=yes") {
		t.Errorf("%v", lack)
	}
}

func TestGroupNames(t *testing.T) {
	tree := &Tree{dir: "vigia-t"}
	for _, name := range []string{"", "..", ".x", "a/b", "a\nb", "a\x00"} {
		if _, err := tree.New(name, Limits{}); err == nil {
			t.Errorf("%q is taken for a name", name)
		}
	}
}

func newGroup(t *testing.T, root, proc string) *Group {
	t.Helper()
	tree, err := OpenTree(root, proc, "vigia-t")
	if err != nil {
		t.Fatal(err)
	}
	g, err := tree.New("web", fullLimits)
	if err != nil {
		t.Fatal(err)
	}
	return g
}

func wantFile(t *testing.T, root, name, want string) {
	t.Helper()
	got, err := os.ReadFile(filepath.Join(root, name))
	if err != nil || strings.TrimSpace(string(got)) != want {
		t.Errorf("%s is %q (%v), want %q", name, got, err, want)
	}
}

// On this host, whatever it is: what is said to be in force stops a process that goes beyond, and nothing is left.
func TestGroupInForce(t *testing.T) {
	dir := fmt.Sprintf("vigia-test-%d", os.Getpid())
	tree, err := OpenTree("/sys/fs/cgroup", "/proc/self", dir)
	if err != nil {
		t.Skip(err)
	}
	defer func() {
		if err := tree.Remove(); err != nil {
			t.Error(err)
		}
	}()
	for _, c := range []struct {
		limit   string
		limits  Limits
		attempt string
	}{
		{"memory limit", Limits{Memory: 64 << 20}, "eat"},
		{"thread limit", Limits{PIDs: 40}, "threads"},
	} {
		t.Run(c.limit, func(t *testing.T) { tryLimit(t, tree, c.limit, c.limits, c.attempt) })
	}
}

func tryLimit(t *testing.T, tree *Tree, limit string, limits Limits, attempt string) {
	g, err := tree.New(attempt, limits)
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := g.Remove(); err != nil {
			t.Error(err)
		}
	}()
	if why := lacking(g.Measures)[limit]; why != "" {
		t.Skipf("this host has no %s: %s", limit, why)
	}
	log, err := os.Create(filepath.Join(t.TempDir(), "log"))
	if err != nil {
		t.Fatal(err)
	}
	defer log.Close()
	p, err := QEMU{Binary: captive, Args: []string{"try", attempt}, Group: g, Stdout: log, Stderr: log}.Start(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer p.Close()
	exit := p.Exit()
	said, _ := os.ReadFile(log.Name())
	if exit.Code == 0 && exit.Signal == 0 {
		t.Errorf("it went beyond its %s: %s %.200s", limit, exit, said)
	}
	left, err := Leftovers(Search{State: "none", Tree: tree, Known: func(string, int) bool { return false }, Keep: func(string) bool { return false }})
	if err != nil || len(left) == 0 || left[0].Kind != "cgroup" || left[0].Name != attempt {
		t.Errorf("its group was not found: %v %v", left, err)
	}
}
