// Package jail confines the processes of vigia that touch a guest's bytes: QEMU, the guard, the gate and the one-shot
// convert worker.
//
// The idea: what a process may do is a short table, a [Profile], with a reason beside each entry, and one small
// interpreter carries any table out. There are seven: [Emulator], [Guard], [Gate], [GateAlone], [Convert], [Keeper] and
// [Planter]. Reading them tells what
// a guest that has taken such a process over can still do; nothing else in this package has to be trusted to know that.
//
// Confinement happens in a fresh process of vigia's own (see [StartFrom]), in steps, before a guest byte is read:
//
//	daemon                                   child, in new namespaces
//	clone(2) with the profile's namespaces → waits for its order
//	cgroup, OOM score, order on a pipe     → 1 an empty root, with the binds of the order, read-only
//	                                         2 resource limits
//	                                         3 own user and group, no supplementary groups
//	                                         4 no capabilities, no_new_privs, no undumpable secrets
//	                                         5 landlock: no paths but the binds
//	                                         6 seccomp: the profile's system calls
//	reads what came in force               ← 7 report, then execve(QEMU), or the worker's work begins
//
// QEMU is started by [QEMU.Start] and its child runs [Stage] ("vigia jail-exec"). A worker is started by [Worker.Start]
// and calls [Confine] first thing in its main.
//
// With root each machine gets its own user. Without root an unprivileged user namespace gives the same walls. Where the
// host refuses a wall the next best plan is tried, and every wall that is missing is a [Measure] with InForce false and
// the reason: nothing is given up silently. [Observe] reads from /proc, from outside, what is in force for a process.
//
// Nothing here dies with the daemon: machines survive it. [Adopt] finds a process again, by pid and start time.
//
// Sources: namespaces(7), user_namespaces(7), pivot_root(2), mount_setattr(2), capabilities(7), landlock(7), seccomp(2),
// cgroups(7), Documentation/admin-guide/cgroup-v2.rst, qemu-seccomp.c, and the Go runtime's os_linux.go.
package jail

import (
	"errors"
	"fmt"
	"strings"
)

// Measure is one wall: what it is, whether it stands, and if not, why.
type Measure struct {
	Name    string `json:"name"`
	InForce bool   `json:"in_force"`
	Detail  string `json:"detail,omitempty"` // what exactly is in force
	Why     string `json:"why,omitempty"`    // why it is not
}

func (m Measure) String() string {
	if m.InForce {
		return strings.TrimSpace(m.Name + " " + m.Detail)
	}
	return "no " + m.Name + ": " + m.Why
}

func in(name, detail string) Measure { return Measure{Name: name, InForce: true, Detail: detail} }

func out(name string, why error) Measure { return Measure{Name: name, Why: why.Error()} }

// Sentinels of this package.
var (
	// ErrNotStarted is wrapped by Start when the process could not be confined or executed. Nothing is left of it.
	ErrNotStarted = errors.New("process was not started")
	// ErrGone is returned by Adopt when the process has ended, or its pid now belongs to another.
	ErrGone = errors.New("process is gone")
	// ErrNotOrdered is returned by Confine in a process that Worker.Start did not start.
	ErrNotOrdered = errors.New("no order to be confined by: this command is started by vigia serve")
)

// User is the host identity a process gets when vigia runs as root.
type User struct {
	UID int `json:"uid"`
	GID int `json:"gid"`

	// Device is a supplementary group, 0 for none: the one that may open /dev/kvm. QEMU.Start sets it.
	Device int `json:"device,omitempty"`
}

func (u User) String() string {
	if u.Device != 0 {
		return fmt.Sprintf("uid %d gid %d, group %d for /dev/kvm", u.UID, u.GID, u.Device)
	}
	return fmt.Sprintf("uid %d gid %d", u.UID, u.GID)
}
