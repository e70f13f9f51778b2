package main

import (
	"fmt"
	"os"
	"runtime"
	"syscall"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// attempt makes one try, or all that a refusal does not end the process for, and says for each what it met: "" if it
// got through.
func attempt(name string) error {
	if name == "all" {
		met := map[string]string{}
		for n, try := range tries {
			met[n] = message(try())
		}
		return say(met)
	}
	if name == "eat" {
		eat()
	}
	if name == "flood" {
		return flood()
	}
	if name == "threads" {
		threads()
	}
	if name == "serve" {
		return say(serve())
	}
	if name == "live" {
		return say(live())
	}
	if name == "sleep" {
		time.Sleep(time.Hour)
	}
	try, ok := deadly[name]
	if !ok {
		try, ok = tries[name]
	}
	if !ok {
		return fmt.Errorf("no attempt %q", name)
	}
	return say(message(try()))
}

func message(err error) string {
	if err == nil {
		return ""
	}
	return err.Error()
}

func errno(e syscall.Errno) error {
	if e == 0 {
		return nil
	}
	return e
}

func path(s string) uintptr {
	b, _ := unix.BytePtrFromString(s)
	return uintptr(unsafe.Pointer(b))
}

func raw(nr uintptr, args ...uintptr) func() error {
	return func() error {
		var a [6]uintptr
		copy(a[:], args)
		_, _, e := unix.RawSyscall6(nr, a[0], a[1], a[2], a[3], a[4], a[5])
		return errno(e)
	}
}

func open(p string, flags int) func() error {
	return func() error {
		fd, err := unix.Open(p, flags, 0o600)
		if err == nil {
			unix.Close(fd)
		}
		return err
	}
}

func socket(family, kind, protocol int) func() error {
	return func() error {
		fd, err := unix.Socket(family, kind, protocol)
		if err == nil {
			unix.Close(fd)
		}
		return err
	}
}

// tries are the ways out whose refusal the process survives in every profile.
var tries = map[string]func() error{
	"open /etc/passwd":       open("/etc/passwd", unix.O_RDONLY),
	"open /etc/shadow":       open("/etc/shadow", unix.O_RDONLY),
	"open /proc/1/environ":   open("/proc/1/environ", unix.O_RDONLY),
	"open /proc/self/status": open("/proc/self/status", unix.O_RDONLY),
	"open /sys":              open("/sys", unix.O_RDONLY|unix.O_DIRECTORY),
	"open /dev/mem":          open("/dev/mem", unix.O_RDONLY),
	"open /dev/kvm":          open("/dev/kvm", unix.O_RDWR),
	"open /dev/kmsg":         open("/dev/kmsg", unix.O_RDONLY),
	"open the disk":          open("/dev/vda", unix.O_RDONLY),
	"open ../../..":          open("../../../../etc/passwd", unix.O_RDONLY),
	"create in /":            open("/new", unix.O_CREAT|unix.O_WRONLY),
	"create in /tmp":         open("/tmp/vigia-escape", unix.O_CREAT|unix.O_WRONLY),
	"create in /dev/shm":     open("/dev/shm/vigia-escape", unix.O_CREAT|unix.O_WRONLY),
	"nameless file":          open("/", unix.O_TMPFILE|unix.O_WRONLY),
	"mkdir":                  func() error { return unix.Mkdir("/d", 0o700) },
	"mknod":                  func() error { return unix.Mknod("/n", unix.S_IFBLK|0o600, 254<<8) },
	"symlink":                func() error { return unix.Symlink("/etc", "/l") },
	"chmod":                  func() error { return unix.Chmod("/", 0o777) },
	"truncate":               func() error { return unix.Truncate("/etc/ld.so.cache", 0) },
	"unlink":                 func() error { return unix.Unlink("/etc/ld.so.cache") },

	"socket inet raw":     socket(unix.AF_INET, unix.SOCK_RAW, unix.IPPROTO_ICMP),
	"socket packet":       socket(unix.AF_PACKET, unix.SOCK_RAW, 0),
	"socket netlink":      socket(unix.AF_NETLINK, unix.SOCK_RAW, unix.NETLINK_ROUTE),
	"socket vsock":        socket(unix.AF_VSOCK, unix.SOCK_STREAM, 0),
	"socket bluetooth":    socket(unix.AF_BLUETOOTH, unix.SOCK_RAW, 0),
	"socket alg":          socket(unix.AF_ALG, unix.SOCK_SEQPACKET, 0),
	"socket xdp":          socket(unix.AF_XDP, unix.SOCK_RAW, 0),
	"connect to the host": abstractConnect,
	"listen on TCP":       listenTCP,

	"kill parent":      func() error { return killParent() },
	"sigqueue":         raw(unix.SYS_RT_SIGQUEUEINFO, 2, 0, 0),
	"limit parent":     limitParent,
	"pidfd_open":       raw(unix.SYS_PIDFD_OPEN, 1, 0),
	"sched other":      raw(unix.SYS_SCHED_SETAFFINITY, 2, 8, uintptr(unsafe.Pointer(&mask))),
	"raise nofile":     raw(unix.SYS_PRLIMIT64, 0, unix.RLIMIT_NOFILE, uintptr(unsafe.Pointer(&huge)), 0),
	"raise core":       raw(unix.SYS_PRLIMIT64, 0, unix.RLIMIT_CORE, uintptr(unsafe.Pointer(&huge)), 0),
	"raise priority":   raw(unix.SYS_SETPRIORITY, unix.PRIO_PROCESS, 0, minus(10)),
	"open_tree":        raw(unix.SYS_OPEN_TREE, minus(100), path("/"), unix.OPEN_TREE_CLONE),
	"fsopen":           raw(unix.SYS_FSOPEN, path("tmpfs"), 0),
	"umount":           raw(unix.SYS_UMOUNT2, path("/"), unix.MNT_DETACH),
	"mount_setattr":    mountSetattr,
	"setuid 0":         raw(unix.SYS_SETUID, 0),
	"setgid 0":         raw(unix.SYS_SETGID, 0),
	"setgroups":        raw(unix.SYS_SETGROUPS, 0, 0),
	"capset":           raiseCapability,
	"keyctl":           raw(unix.SYS_KEYCTL, 0, minus(3), 0),
	"add_key":          raw(unix.SYS_ADD_KEY, path("user"), path("x"), path("y"), 1, minus(3)),
	"perf_event_open":  raw(unix.SYS_PERF_EVENT_OPEN, 0, 0, minus(1), minus(1), 0),
	"userfaultfd":      raw(unix.SYS_USERFAULTFD, 1),
	"fanotify_init":    raw(unix.SYS_FANOTIFY_INIT, 0, 0),
	"clone3":           raw(unix.SYS_CLONE3, uintptr(unsafe.Pointer(&cloneArgs)), unsafe.Sizeof(cloneArgs)),
	"clone namespaces": raw(unix.SYS_CLONE, unix.CLONE_NEWUSER|uintptr(unix.SIGCHLD)),
	"clone process":    raw(unix.SYS_CLONE, uintptr(unix.SIGCHLD)),
	"fork":             raw(unix.SYS_FORK),
	"reboot":           raw(unix.SYS_REBOOT, 0xfee1dead, 672274793, 0),
	"settimeofday":     raw(unix.SYS_SETTIMEOFDAY, 0, 0),
	"sethostname":      raw(unix.SYS_SETHOSTNAME, path("x"), 1),
	"acct":             raw(unix.SYS_ACCT, 0),
	"swapon":           raw(unix.SYS_SWAPON, path("/x"), 0),
	"syslog":           raw(unix.SYS_SYSLOG, 3, 0, 0),
	"personality":      raw(unix.SYS_PERSONALITY, 0x0040000),
	"iopl":             raw(unix.SYS_IOPL, 3),
	"nfsservctl":       raw(unix.SYS_NFSSERVCTL),
	"fork bomb stays":  tooManyDescriptors,
}

// deadly are those that some profile answers by ending the process.
var deadly = map[string]func() error{
	"ptrace":            raw(unix.SYS_PTRACE, unix.PTRACE_ATTACH, 2),
	"ptrace traceme":    raw(unix.SYS_PTRACE, unix.PTRACE_TRACEME),
	"process_vm_readv":  raw(unix.SYS_PROCESS_VM_READV, 2, 0, 0, 0, 0, 0),
	"process_vm_writev": raw(unix.SYS_PROCESS_VM_WRITEV, 2, 0, 0, 0, 0, 0),
	"pidfd_getfd":       raw(unix.SYS_PIDFD_GETFD, 3, 3, 0),
	"execveat":          raw(unix.SYS_EXECVEAT, 3, path(""), 0, 0, unix.AT_EMPTY_PATH),
	"exec /bin/sh":      func() error { return unix.Exec("/bin/sh", []string{"sh"}, nil) },
	"mount":             raw(unix.SYS_MOUNT, path("none"), path("/"), path("tmpfs"), 0, 0),
	"mount proc":        raw(unix.SYS_MOUNT, path("proc"), path("/"), path("proc"), 0, 0),
	"pivot_root":        raw(unix.SYS_PIVOT_ROOT, path("."), path(".")),
	"chroot":            raw(unix.SYS_CHROOT, path("/")),
	"setns":             raw(unix.SYS_SETNS, 0, 0),
	"unshare user":      raw(unix.SYS_UNSHARE, unix.CLONE_NEWUSER),
	"unshare mnt":       raw(unix.SYS_UNSHARE, unix.CLONE_NEWNS),
	"unshare net":       raw(unix.SYS_UNSHARE, unix.CLONE_NEWNET),
	"init_module":       raw(unix.SYS_INIT_MODULE, 0, 0, 0),
	"finit_module":      raw(unix.SYS_FINIT_MODULE, 0, 0, 0),
	"kexec_load":        raw(unix.SYS_KEXEC_LOAD, 0, 0, 0, 0),
	"bpf":               raw(unix.SYS_BPF, 0, 0, 0),
	"io_uring_setup":    raw(unix.SYS_IO_URING_SETUP, 1, uintptr(unsafe.Pointer(&mask))),
	"open_by_handle_at": raw(unix.SYS_OPEN_BY_HANDLE_AT, 0, 0, 0),
	"stat /etc/passwd":  stat,
	"32-bit call":       compat,
	"x32 call":          raw(0x40000000 | unix.SYS_GETPID),
	"executable memory": executable,
	"socket inet":       socket(unix.AF_INET, unix.SOCK_STREAM, 0),
	"socket inet6 udp":  socket(unix.AF_INET6, unix.SOCK_DGRAM, 0),
	"socket unix":       socket(unix.AF_UNIX, unix.SOCK_STREAM, 0),
}

var (
	mask      = [16]uint64{1}
	huge      = unix.Rlimit{Cur: 1 << 20, Max: 1 << 20}
	cloneArgs = [11]uint64{unix.CLONE_NEWUSER, 0, 0, 0, uint64(unix.SIGCHLD)}
)

func minus(n int) uintptr { return uintptr(-n) }

func mountSetattr() error {
	return unix.MountSetattr(unix.AT_FDCWD, "/", 0, &unix.MountAttr{Attr_clr: unix.MOUNT_ATTR_RDONLY})
}

// killParent succeeds only if it reaches a process outside.
func killParent() error {
	if pp := os.Getppid(); pp > 0 {
		return unix.Kill(pp, 0)
	}
	return unix.ESRCH
}

func limitParent() error {
	if pp := os.Getppid(); pp > 0 {
		return raw(unix.SYS_PRLIMIT64, uintptr(pp), unix.RLIMIT_NOFILE, 0, uintptr(unsafe.Pointer(&huge)))()
	}
	return unix.ESRCH
}

func raiseCapability() error {
	h := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	d := [2]unix.CapUserData{{Effective: 1 << unix.CAP_SYS_ADMIN, Permitted: 1 << unix.CAP_SYS_ADMIN}}
	return unix.Capset(&h, &d[0])
}

func abstractConnect() error {
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	return unix.Connect(fd, &unix.SockaddrUnix{Name: "@vigia-captive-test"})
}

func listenTCP() error {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	if err := unix.Bind(fd, &unix.SockaddrInet4{Port: 0, Addr: [4]byte{127, 0, 0, 1}}); err != nil {
		return err
	}
	return unix.Listen(fd, 1)
}

// stat looks whether a path is there, past filters that mean to allow AT_EMPTY_PATH on descriptors only.
func stat() error {
	var st unix.Stat_t
	return unix.Fstatat(unix.AT_FDCWD, "/etc/passwd", &st, unix.AT_EMPTY_PATH)
}

func executable() error {
	_, err := unix.Mmap(-1, 0, 4096, unix.PROT_READ|unix.PROT_WRITE|unix.PROT_EXEC, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	return err
}

func tooManyDescriptors() error {
	for range 1 << 20 {
		if _, err := unix.FcntlInt(1, unix.F_DUPFD_CLOEXEC, 0); err != nil {
			for fd := 10; fd < 1<<15; fd++ {
				unix.Close(fd)
			}
			return err
		}
	}
	return nil
}

// eat takes memory until it is stopped.
func eat() {
	var all [][]byte
	for range 1024 {
		b := make([]byte, 1<<20)
		for i := 0; i < len(b); i += 4096 {
			b[i] = 1
		}
		all = append(all, b)
	}
	say(len(all))
}

// flood writes 16 MiB of log.
func flood() error {
	for range 4096 {
		if _, err := os.Stderr.Write(make([]byte, 4096)); err != nil {
			return err
		}
	}
	return nil
}

// threads makes threads until it is stopped; the runtime dies of the first that it does not get.
func threads() {
	for range 2000 {
		go func() {
			runtime.LockOSThread()
			select {}
		}()
		runtime.Gosched()
	}
	time.Sleep(200 * time.Millisecond)
	say("through")
}

// live is the honest work that must go on: threads, goroutines, garbage collection, time, pipes.
func live() string {
	done := make(chan int)
	for i := range 64 {
		go func() {
			runtime.LockOSThread() // 64 new threads
			b := make([]byte, 1<<20)
			b[i] = 1
			time.Sleep(5 * time.Millisecond)
			done <- i
		}()
	}
	for range 64 {
		<-done
	}
	runtime.GC()
	r, w, err := os.Pipe()
	if err != nil {
		return err.Error()
	}
	go w.Write([]byte("x"))
	if _, err := r.Read(make([]byte, 1)); err != nil {
		return err.Error()
	}
	if time.Now().Year() < 2020 {
		return "no clock"
	}
	return "alive"
}
