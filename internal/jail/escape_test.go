package jail

import (
	"encoding/json"
	"os"
	"slices"
	"strings"
	"testing"
)

var profileNames = []string{"qemu", "guard", "gate", "gate-alone", "convert"}

// deadly are the attempts that the captive makes one to a process; with the profiles that may do it, since they must.
var deadly = map[string][]string{
	"ptrace": nil, "ptrace traceme": nil, "process_vm_readv": nil, "process_vm_writev": nil, "pidfd_getfd": nil,
	"execveat": nil, "exec /bin/sh": nil, "mount": nil, "mount proc": nil, "pivot_root": nil, "chroot": nil, "setns": nil,
	"unshare user": nil, "unshare mnt": nil, "unshare net": nil, "init_module": nil, "finit_module": nil, "kexec_load": nil,
	"bpf": nil, "io_uring_setup": nil, "open_by_handle_at": nil, "32-bit call": nil, "stat /etc/passwd": nil, "x32 call": nil,
	"executable memory": {"qemu"},
	"socket inet":       {"gate"},
	"socket inet6 udp":  {"gate"},
	"socket unix":       {"qemu"},
}

// Every way out that the captive knows fails, in the place of each process, as root and as an ordinary user.
func TestNothingEscapes(t *testing.T) {
	for _, c := range callers() {
		for _, profile := range profileNames {
			t.Run(c.name+" "+profile, func(t *testing.T) {
				t.Parallel()
				attempts := []string{"all"}
				for a := range deadly {
					attempts = append(attempts, a)
				}
				outcomes := c.drive(t, profile, "", attempts...)
				for a, allowed := range deadly {
					checkDeadly(t, a, outcomes[a], slices.Contains(allowed, profile))
				}
				checkAll(t, outcomes["all"])
			})
		}
	}
}

func checkAll(t *testing.T, o outcome) {
	t.Helper()
	var met map[string]string
	if err := json.Unmarshal(o.Said, &met); err != nil || len(met) < 50 {
		t.Fatalf("attempts: %v: %+v", err, o)
	}
	for attempt, message := range met {
		if message == "" {
			t.Errorf("%s got through", attempt)
		}
	}
}

func checkDeadly(t *testing.T, attempt string, o outcome, allowed bool) {
	t.Helper()
	said := string(o.Said)
	switch {
	case o.Error != "":
		t.Errorf("%s: not started: %s", attempt, o.Error)
	case allowed && said != `""`:
		t.Errorf("%s is needed, and met %s %s", attempt, said, o.Exit)
	case allowed:
	case said == `""` || said == "" && !strings.HasPrefix(o.Exit, "killed by"):
		t.Errorf("%s got through: said %q, %s, %s", attempt, said, o.Exit, o.Log)
	}
}

// What is honest goes on: threads, garbage collection, pipes, time.
func TestHonestWorkGoesOn(t *testing.T) {
	for _, c := range callers() {
		for _, profile := range profileNames {
			o := c.drive(t, profile, "", "live")["live"]
			if string(o.Said) != `"alive"` || o.Exit != "exit status 0" {
				t.Errorf("%s %s: %+v", c.name, profile, o)
			}
		}
	}
}

// A worker does its work with what it was handed: disk, memory, descriptors received, connections taken; and the gate
// alone reaches outside.
func TestHandedOverThingsWork(t *testing.T) {
	for _, c := range callers() {
		for _, profile := range profileNames[1:] {
			o := c.drive(t, profile, "", "serve")["serve"]
			if string(o.Said) != `"served"` {
				t.Errorf("%s %s: %s %s %s %s", c.name, profile, o.Said, o.Exit, o.Error, o.Log)
			}
		}
	}
}

// QEMU opens /dev/kvm where it is to have it and may, or the caller is told why it may not.
func TestKVMDevice(t *testing.T) {
	if _, err := os.Stat("/dev/kvm"); err != nil {
		t.Skip("no /dev/kvm")
	}
	for _, c := range callers() {
		o := c.drive(t, "qemu", "", "open /dev/kvm")["open /dev/kvm"]
		if c.name == "root" && strings.Contains(o.Error, "chmod 660") {
			continue
		}
		if met := string(o.Said); met != `""` && (c.name == "root" || met != `"permission denied"`) {
			t.Errorf("%s: %s %s %s", c.name, met, o.Exit, o.Error)
		}
	}
}

// What a process says of itself at its start, and what /proc says of it, is what its table says.
func TestTablesAreInForce(t *testing.T) {
	for _, c := range callers() {
		for _, profile := range profileNames {
			t.Run(c.name+" "+profile, func(t *testing.T) {
				t.Parallel()
				o := c.drive(t, profile, "", "sleep")["sleep"]
				if o.Seen == nil {
					t.Fatalf("%+v", o)
				}
				want := map[string]bool{"cgroup limits": true, "own user": c.name == "user"}
				for name, why := range lacking(o.Measures) {
					if !want[name] {
						t.Errorf("at its start: no %s: %s", name, why)
					}
				}
				for name, why := range lacking(o.Compared) {
					t.Errorf("in /proc: no %s: %s", name, why)
				}
				checkSeen(t, c, *o.Seen)
			})
		}
	}
}

func checkSeen(t *testing.T, c caller, o Observation) {
	t.Helper()
	if c.name == "root" && len(o.Groups) > 0 {
		t.Errorf("groups %v", o.Groups)
	}
	if own := slices.Contains(o.Own, "user"); own != (c.name == "user") {
		t.Errorf("own user namespace: %v", own)
	}
	for n, to := range o.Descriptors {
		if n > 2 && !strings.HasPrefix(to, "anon_inode:[event") {
			t.Errorf("it holds descriptor %d: %s", n, to)
		}
	}
	for _, m := range o.Mounts {
		if !m.Has("nosuid") || m.Target != "/" && strings.HasPrefix(m.Target, "/dev/") == m.Has("nodev") {
			t.Errorf("mount %+v", m)
		}
	}
}
