package jail

import (
	"fmt"
	"os"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Landlock access rights by the ABI version that brought them (landlock(7)). What a version does not know is left out.
const (
	fsExecute   = unix.LANDLOCK_ACCESS_FS_EXECUTE
	fsRead      = unix.LANDLOCK_ACCESS_FS_READ_FILE
	fsReadDir   = unix.LANDLOCK_ACCESS_FS_READ_DIR
	fsWrite     = unix.LANDLOCK_ACCESS_FS_WRITE_FILE
	fsV1        = 1<<13 - 1 // execute … make_sym
	fsRefer     = 1 << 13   // 2
	fsTruncate  = 1 << 14   // 3
	fsIoctlDev  = 1 << 15   // 5
	netBindTCP  = 1 << 0    // 4
	netConnTCP  = 1 << 1    // 4
	scopeSocket = 1 << 0    // 6: abstract unix sockets outside
	scopeSignal = 1 << 1    // 6: signals to processes outside
	fsFileOnly  = fsExecute | fsRead | fsWrite | fsTruncate | fsIoctlDev
)

func landlockABI() (int, error) {
	v, _, errno := unix.RawSyscall(unix.SYS_LANDLOCK_CREATE_RULESET, 0, 0, unix.LANDLOCK_CREATE_RULESET_VERSION)
	if errno != 0 {
		return 0, fmt.Errorf("the kernel has no landlock: %w", errno)
	}
	return int(v), nil
}

// landlock forbids every path except the given binds, TCP except what net leaves, and reaching out of the domain.
func (t threads) landlock(binds []Bind, net Network) (string, error) {
	abi, err := landlockABI()
	if err != nil {
		return "", err
	}
	fd, err := ruleset(abi, net)
	if err != nil {
		return "", err
	}
	defer unix.Close(fd)
	for _, b := range binds {
		if err := allowPath(fd, abi, b); err != nil {
			return "", fmt.Errorf("landlock rule for %s: %w", b.target(), err)
		}
	}
	if err := t.call(unix.SYS_LANDLOCK_RESTRICT_SELF, uintptr(fd), 0, 0, 0, 0); err != nil {
		return "", fmt.Errorf("landlock: %w", err)
	}
	detail := fmt.Sprintf("abi %d: no paths", abi)
	if len(binds) > 0 {
		detail = fmt.Sprintf("abi %d: no paths but %d binds", abi, len(binds))
	}
	if abi >= 4 {
		detail += map[Network]string{NoNetwork: ", no TCP", ConnectOnly: ", TCP connect only"}[net]
	}
	if abi >= 6 {
		detail += ", no signals or abstract sockets outside"
	}
	return detail, nil
}

func handledFS(abi int) uint64 {
	fs := uint64(fsV1)
	if abi >= 2 {
		fs |= fsRefer
	}
	if abi >= 3 {
		fs |= fsTruncate
	}
	if abi >= 5 {
		fs |= fsIoctlDev
	}
	return fs
}

func ruleset(abi int, net Network) (int, error) {
	attr := unix.LandlockRulesetAttr{Handled_access_fs: handledFS(abi)}
	size := uintptr(8)
	if abi >= 4 {
		size = 16
		attr.Handled_access_net = netBindTCP | netConnTCP
		if net == ConnectOnly {
			attr.Handled_access_net = netBindTCP
		}
	}
	if abi >= 6 {
		size = 24
		attr.Scoped = scopeSocket | scopeSignal
	}
	fd, _, errno := unix.Syscall(unix.SYS_LANDLOCK_CREATE_RULESET, uintptr(unsafe.Pointer(&attr)), size, 0)
	if errno != 0 {
		return -1, fmt.Errorf("landlock ruleset: %w", errno)
	}
	return int(fd), nil
}

func allowPath(ruleset, abi int, b Bind) error {
	fd, err := unix.Open(b.target(), unix.O_PATH|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return err
	}
	access := uint64(fsRead | fsReadDir)
	if b.Exec {
		access |= fsExecute
	}
	if b.Write {
		access |= fsWrite | fsTruncate
	}
	if b.Device {
		access |= fsWrite | fsIoctlDev
	}
	if st.Mode&unix.S_IFMT != unix.S_IFDIR {
		access &= fsFileOnly
	}
	// struct landlock_path_beneath_attr is packed: 8 bytes of access, 4 of descriptor.
	rule := unix.LandlockPathBeneathAttr{Allowed_access: access & handledFS(abi), Parent_fd: int32(fd)}
	_, _, errno := unix.Syscall6(unix.SYS_LANDLOCK_ADD_RULE, uintptr(ruleset), unix.LANDLOCK_RULE_PATH_BENEATH,
		uintptr(unsafe.Pointer(&rule)), 0, 0, 0)
	if errno != 0 {
		return os.NewSyscallError("landlock_add_rule", errno)
	}
	return nil
}

func address[T any](p *T) uintptr { return uintptr(unsafe.Pointer(p)) }
