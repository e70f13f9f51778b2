package jail

import (
	"fmt"
	"runtime"
	"syscall"

	"golang.org/x/sys/unix"
)

// threads makes a system call whose effect belongs to a thread, either on all threads of the process (a worker goes on
// as the Go program it is) or on the calling one, which the caller has locked (the stage executes QEMU from it).
type threads struct{ all bool }

func (t threads) call(nr, a, b, c, d, e uintptr) error {
	var errno syscall.Errno
	if t.all {
		_, _, errno = syscall.AllThreadsSyscall6(nr, a, b, c, d, e, 0)
	} else {
		_, _, errno = syscall.RawSyscall6(nr, a, b, c, d, e, 0)
	}
	if errno != 0 {
		return errno
	}
	return nil
}

func (t threads) prctl(option int, args ...uintptr) error {
	var a [4]uintptr
	copy(a[:], args)
	return t.call(unix.SYS_PRCTL, uintptr(option), a[0], a[1], a[2], a[3])
}

// usable refuses a build whose threads Go does not know.
func (t threads) usable() error {
	if _, _, errno := syscall.AllThreadsSyscall(unix.SYS_GETPID, 0, 0, 0); t.all && errno != 0 {
		return fmt.Errorf("this binary was built with cgo, so not all its threads can be confined: build it with CGO_ENABLED=0")
	}
	return nil
}

// become takes on a user and drops every other identity. It needs the capabilities for it.
func (t threads) become(u User) error {
	device, n := uint32(u.Device), uintptr(0)
	if u.Device != 0 {
		n = 1
	}
	if err := t.call(unix.SYS_SETGROUPS, n, address(&device), 0, 0, 0); err != nil {
		return fmt.Errorf("drop supplementary groups: %w", err)
	}
	runtime.KeepAlive(&device)
	gid, uid := uintptr(u.GID), uintptr(u.UID)
	if err := t.call(unix.SYS_SETRESGID, gid, gid, gid, 0, 0); err != nil {
		return fmt.Errorf("take group %d: %w", u.GID, err)
	}
	if err := t.call(unix.SYS_SETRESUID, uid, uid, uid, 0, 0); err != nil {
		return fmt.Errorf("take user %d: %w", u.UID, err)
	}
	return nil
}

// Securebits, all locked: user 0 is nobody special, capabilities do not survive a change of user, none become ambient.
const secureBits = 1<<0 | 1<<1 | 1<<2 | 1<<3 | 1<<5 | 1<<6 | 1<<7

// shrink empties the bounding set, while CAP_SETPCAP still allows it, and locks the securebits.
func (t threads) shrink() error {
	for c := uintptr(0); c <= lastCapability(); c++ {
		if err := t.prctl(unix.PR_CAPBSET_DROP, c); err != nil {
			return fmt.Errorf("drop capability %d from the bounding set: %w", c, err)
		}
	}
	return t.prctl(unix.PR_SET_SECUREBITS, secureBits)
}

// renounce drops every capability that is held and the way to new ones through an executed file.
func (t threads) renounce() error {
	if err := t.prctl(unix.PR_CAP_AMBIENT, unix.PR_CAP_AMBIENT_CLEAR_ALL); err != nil {
		return fmt.Errorf("clear ambient capabilities: %w", err)
	}
	header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var none [2]unix.CapUserData
	if err := t.call(unix.SYS_CAPSET, address(&header), address(&none[0]), 0, 0, 0); err != nil {
		return fmt.Errorf("drop capabilities: %w", err)
	}
	runtime.KeepAlive(&header)
	runtime.KeepAlive(&none)
	if err := t.prctl(unix.PR_SET_NO_NEW_PRIVS, 1); err != nil {
		return fmt.Errorf("set no_new_privs: %w", err)
	}
	return nil
}

// lastCapability asks the kernel how many there are.
func lastCapability() uintptr {
	n := uintptr(0)
	for n < 63 && unix.Prctl(unix.PR_CAPBSET_READ, n+1, 0, 0, 0) == nil {
		n++
	}
	return n
}

// capable says whether this process may set up namespaces by itself.
func capable(capability int) bool {
	header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var data [2]unix.CapUserData
	if unix.Capget(&header, &data[0]) != nil {
		return false
	}
	return data[capability/32].Effective&(1<<(capability%32)) != 0
}
