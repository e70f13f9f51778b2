package jail

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

func findQEMU(t *testing.T) string {
	t.Helper()
	qemu, err := exec.LookPath("qemu-system-x86_64")
	if err != nil {
		t.Skip("no QEMU: apt-get install qemu-system-x86")
	}
	return qemu
}

// A real QEMU, in its jail, speaks QMP over a socket it was handed, maps its memory from the one file it may write, and
// is in /proc what the table says.
func TestRealQEMU(t *testing.T) {
	qemu := findQEMU(t)
	for _, c := range callers() {
		t.Run(c.name, func(t *testing.T) {
			ram := guestMemory(t, c)
			out, err := c.command("emulate", qemu, c.give, ram).Output()
			if err != nil {
				t.Fatalf("%v: %s: %s", err, out, err.(*exec.ExitError).Stderr)
			}
			var e struct {
				Measures, Compared []Measure
				Observation        Observation
				Greeting, Exit     string
				StartMs, ReadyMs   float64
			}
			decode(t, out, &e)
			t.Logf("executed after %.0f ms, QMP after %.0f ms, %d mounts", e.StartMs, e.ReadyMs, len(e.Observation.Mounts))
			if e.Exit != "exit status 0" || !strings.Contains(e.Greeting, "QMP") {
				t.Errorf("%s %s", e.Greeting, e.Exit)
			}
			for name, why := range lacking(e.Compared) {
				t.Errorf("no %s: %s", name, why)
			}
			checkQEMU(t, e.Observation, ram)
		})
	}
}

func guestMemory(t *testing.T, c caller) string {
	t.Helper()
	f, err := os.CreateTemp("/dev/shm", "vigia-jail-test")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.Remove(f.Name()) })
	defer f.Close()
	f.Truncate(64 << 20)
	if os.Getuid() == 0 {
		owner := c.uid
		if owner == 0 {
			owner = 1879048193
		}
		f.Chown(owner, owner)
	}
	return f.Name()
}

func checkQEMU(t *testing.T, o Observation, ram string) {
	t.Helper()
	if o.Filters < 2 {
		t.Errorf("%d filters, want vigia's and QEMU's own", o.Filters)
	}
	for _, m := range o.Mounts {
		if m.Has("rw") != (m.Target == ram) {
			t.Errorf("writable mount %+v", m)
		}
		if m.Type == "proc" || m.Type == "sysfs" {
			t.Errorf("it sees %s", m.Type)
		}
	}
	sockets := 0
	for n, to := range o.Descriptors {
		if strings.HasPrefix(to, "socket:[") {
			sockets++
			continue
		}
		known := strings.HasPrefix(to, "anon_inode:[") || strings.HasPrefix(to, "/usr/share/") || to == ram || to == "/dev/null" || to == "/dev/urandom"
		if n > 2 && !known {
			t.Errorf("it holds descriptor %d: %s", n, to)
		}
	}
	if sockets != 2 {
		t.Errorf("%d sockets, want QMP's and the disk's", sockets)
	}
}

// What Program finds by reading is what the loader finds by loading.
func TestProgramFindsAllLibraries(t *testing.T) {
	qemu := findQEMU(t)
	out, err := exec.Command("ldd", qemu).Output()
	if err != nil {
		t.Skip("no ldd")
	}
	p, err := Program(qemu)
	if err != nil {
		t.Fatal(err)
	}
	shown := map[string]bool{}
	for _, b := range p.Binds {
		shown[b.target()] = true
		if b.Write || b.Device {
			t.Errorf("%+v", b)
		}
	}
	for line := range strings.Lines(string(out)) {
		_, rest, ok := strings.Cut(line, "=> ")
		if !ok {
			continue
		}
		path := strings.Fields(rest)[0]
		dir, _ := filepath.EvalSymlinks(filepath.Dir(path))
		if !shown[filepath.Join(dir, filepath.Base(path))] {
			t.Errorf("%s is not in the jail", path)
		}
	}
	if again, err := Program(qemu); err != nil || len(again.Binds) != len(p.Binds) {
		t.Errorf("asked again: %v", err)
	}
}

// What doctor tries.
func TestProbe(t *testing.T) {
	tree, err := OpenTree("/sys/fs/cgroup", "/proc/self", fmt.Sprintf("vigia-probe-%d", os.Getpid()))
	if err != nil {
		t.Skip(err)
	}
	ms, err := Probe(t.Context(), nil, tree)
	if err != nil {
		t.Fatal(err)
	}
	lack := lacking(ms)
	delete(lack, "own user")
	if len(lack) > 0 {
		t.Logf("this host lacks %v", lack)
	}
	if lack["seccomp"] != "" || lack["no_new_privs"] != "" {
		t.Errorf("%v", lack)
	}
}
