package jail

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"
)

// Limits are what one process of a machine may use of the host. Zero is no limit.
type Limits struct {
	Memory  int64   // bytes, its page cache and shared memory too
	CPUs    float64 // of host CPUs; 1.5 is one and a half
	PIDs    int64   // threads
	IOBytes int64   // bytes a second, read and written each, on the device of IODevice
	// IODevice is "major:minor" of the disk that holds the state.
	IODevice string
}

// Tree is the host's control groups as far as this process may use them, of version 1, 2, or both at once. All groups
// are made under one directory named after it, so that what was left behind can be found.
type Tree struct {
	dir     string            // name of the directory: vigia-<state>
	base    map[string]string // controller → directory of our own group in its hierarchy
	unified string            // our own group in the version 2 hierarchy, or empty
}

// Group is one process's place in each hierarchy.
type Group struct {
	Name     string
	Measures []Measure
	dirs     []string
}

// OpenTree looks where this process may make groups. root is /sys/fs/cgroup, proc is /proc/self; dir names this daemon's
// own part and must differ between daemons of one host.
func OpenTree(root, proc, dir string) (*Tree, error) {
	raw, err := os.ReadFile(filepath.Join(proc, "cgroup"))
	if err != nil {
		return nil, err
	}
	t := &Tree{dir: dir, base: map[string]string{}}
	for line := range strings.Lines(string(raw)) {
		parts := strings.SplitN(strings.TrimSpace(line), ":", 3)
		if len(parts) == 3 {
			t.hierarchy(root, parts[1], parts[2])
		}
	}
	return t, nil
}

// hierarchy notes one line of /proc/self/cgroup. "0::/path" is version 2, at the root or in its unified directory.
func (t *Tree) hierarchy(root, controllers, path string) {
	if controllers == "" {
		if filepath.Base(path) == daemonLeaf {
			path = filepath.Dir(path)
		}
		for _, mount := range []string{root, filepath.Join(root, "unified")} {
			dir := filepath.Join(mount, path)
			raw, err := os.ReadFile(filepath.Join(dir, "cgroup.controllers"))
			if err != nil {
				continue
			}
			t.unified = dir
			for _, c := range strings.Fields(string(raw)) {
				t.base[c] = dir
			}
			return
		}
		return
	}
	for c := range strings.SplitSeq(controllers, ",") {
		dir := filepath.Join(root, c, path)
		if _, err := os.Stat(filepath.Join(dir, "cgroup.procs")); err == nil {
			t.base[c] = dir
		}
	}
}

// setting is one limit in one controller's words.
type setting struct {
	controller, name string
	v1, v2           []pair
	detail           string
}

type pair struct{ file, value string }

const cpuPeriod = 100_000 // µs

func (l Limits) settings() []setting {
	var s []setting
	if l.Memory > 0 {
		n := strconv.FormatInt(l.Memory, 10)
		s = append(s, setting{"memory", "memory limit", []pair{{"memory.limit_in_bytes", n}},
			[]pair{{"memory.max", n}, {"memory.oom.group", "1"}}, n + " bytes"})
	}
	if l.CPUs > 0 {
		quota := strconv.FormatInt(int64(l.CPUs*cpuPeriod), 10)
		s = append(s, setting{"cpu", "cpu limit", []pair{{"cpu.cfs_period_us", strconv.Itoa(cpuPeriod)}, {"cpu.cfs_quota_us", quota}},
			[]pair{{"cpu.max", quota + " " + strconv.Itoa(cpuPeriod)}}, strconv.FormatFloat(l.CPUs, 'g', -1, 64) + " cpus"})
	}
	if l.PIDs > 0 {
		n := strconv.FormatInt(l.PIDs, 10)
		s = append(s, setting{"pids", "thread limit", []pair{{"pids.max", n}}, []pair{{"pids.max", n}}, n + " threads"})
	}
	if l.IOBytes > 0 && l.IODevice != "" {
		n := strconv.FormatInt(l.IOBytes, 10)
		v := l.IODevice + " " + n
		s = append(s, setting{"io", "io limit", []pair{{"blkio.throttle.read_bps_device", v}, {"blkio.throttle.write_bps_device", v}},
			[]pair{{"io.max", fmt.Sprintf("%s rbps=%s wbps=%s", l.IODevice, n, n)}}, n + " bytes/s on " + l.IODevice})
	}
	return s
}

// New makes a group with limits. A limit that the host does not let us set is a Measure not in force, never an error.
func (t *Tree) New(name string, l Limits) (*Group, error) {
	if name == "" || strings.ContainsAny(name, "/\x00\n") || strings.HasPrefix(name, ".") {
		return nil, fmt.Errorf("bad control group name %q", name)
	}
	g := &Group{Name: name}
	for _, s := range l.settings() {
		detail, err := t.apply(g, s)
		if err != nil {
			g.Measures = append(g.Measures, out(s.name, err))
		} else {
			g.Measures = append(g.Measures, in(s.name, detail))
		}
	}
	return g, nil
}

func (t *Tree) apply(g *Group, s setting) (string, error) {
	base, v2, err := t.controller(s.controller)
	if err != nil {
		return "", err
	}
	dir := filepath.Join(base, t.dir, g.Name)
	if v2 {
		err = t.enable(base, s.controller)
	}
	if err == nil {
		err = os.MkdirAll(dir, 0o755)
	}
	if err != nil {
		return "", fmt.Errorf("no right to make control groups (a systemd unit gets it by Delegate=yes): %w", err)
	}
	if !slices.Contains(g.dirs, dir) {
		g.dirs = append(g.dirs, dir)
	}
	pairs := s.v1
	if v2 {
		pairs = s.v2
	}
	for _, p := range pairs {
		if err := os.WriteFile(filepath.Join(dir, p.file), []byte(p.value), 0o644); err != nil {
			return "", err
		}
	}
	version := " (cgroup v1)"
	if v2 {
		version = " (cgroup v2)"
	}
	return s.detail + version, nil
}

// controller finds where a controller can be used; version 1 calls io blkio.
func (t *Tree) controller(name string) (base string, v2 bool, err error) {
	if base, ok := t.base[name]; ok {
		return base, base == t.unified, nil
	}
	if base, ok := t.base["blkio"]; ok && name == "io" {
		return base, false, nil
	}
	return "", false, fmt.Errorf("the host offers no %s controller here", name)
}

// enable lets groups below ours have a controller. Version 2 allows that only where no process is in our own group, so
// the daemon moves itself into a leaf of it first.
func (t *Tree) enable(base, controller string) error {
	top := filepath.Join(base, t.dir)
	if err := os.MkdirAll(top, 0o755); err != nil {
		return err
	}
	if err := enableIn(base, controller); err != nil {
		if err := t.stepAside(base); err != nil {
			return err
		}
		if err := enableIn(base, controller); err != nil {
			return err
		}
	}
	return enableIn(top, controller)
}

func enableIn(dir, controller string) error {
	have, err := os.ReadFile(filepath.Join(dir, "cgroup.subtree_control"))
	if err != nil {
		return err
	}
	if slices.Contains(strings.Fields(string(have)), controller) {
		return nil
	}
	return os.WriteFile(filepath.Join(dir, "cgroup.subtree_control"), []byte("+"+controller), 0o644)
}

// daemonLeaf is the group of the daemon itself, beside those of the machines: it stepped aside there, or systemd put it
// there at once (DelegateSubgroup=daemon), as it must when machines have survived the last daemon.
const daemonLeaf = "daemon"

// stepAside moves this process into a leaf. It does not move others: where the group is not ours alone, limits stay off.
func (t *Tree) stepAside(base string) error {
	leaf := filepath.Join(base, daemonLeaf)
	if err := os.MkdirAll(leaf, 0o755); err != nil {
		return err
	}
	return os.WriteFile(filepath.Join(leaf, "cgroup.procs"), []byte(strconv.Itoa(os.Getpid())), 0o644)
}

// add puts a process into the group.
func (g *Group) add(pid int) error {
	for _, dir := range g.dirs {
		if err := os.WriteFile(filepath.Join(dir, "cgroup.procs"), []byte(strconv.Itoa(pid)), 0o644); err != nil {
			return fmt.Errorf("put process into its control group: %w", err)
		}
	}
	return nil
}

// Remove removes the group when its process has ended.
func (g *Group) Remove() error {
	var errs []error
	for _, dir := range g.dirs {
		errs = append(errs, removeGroup(dir))
	}
	return errors.Join(errs...)
}

// removeGroup waits a little for the kernel to be done with the last process.
func removeGroup(dir string) error {
	var err error
	for range 100 {
		err = os.Remove(dir)
		if err == nil || errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		time.Sleep(5 * time.Millisecond)
	}
	return err
}
