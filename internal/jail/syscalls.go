package jail

import (
	"golang.org/x/sys/unix"
)

const (
	threadFlags = unix.CLONE_VM | unix.CLONE_FS | unix.CLONE_FILES | unix.CLONE_SIGHAND | unix.CLONE_SYSVSEM | unix.CLONE_THREAD
	nsFlags     = unix.CLONE_NEWNS | unix.CLONE_NEWCGROUP | unix.CLONE_NEWUTS | unix.CLONE_NEWIPC | unix.CLONE_NEWUSER |
		unix.CLONE_NEWPID | unix.CLONE_NEWNET | unix.CLONE_NEWTIME
	sockTypeMask = 0xf // below SOCK_CLOEXEC and SOCK_NONBLOCK
	archSetFS    = 0x1002
)

func allow(call uint32, name, reason string, when ...Arg) Rule {
	return Rule{Call: call, Name: name, Do: Allow, When: when, Reason: reason}
}

func kill(call uint32, name, reason string) Rule {
	return Rule{Call: call, Name: name, Do: Kill, Reason: reason}
}

// goRuntime is what a Go program needs to live: nothing here reaches outside the process. The frequent calls are first;
// those without a condition cost nothing, the kernel keeps a bitmap of them.
var goRuntime = []Rule{
	allow(unix.SYS_FUTEX, "futex", "goroutines wait"),
	allow(unix.SYS_EPOLL_PWAIT, "epoll_pwait", "the network poller"),
	allow(unix.SYS_READ, "read", "held descriptors"),
	allow(unix.SYS_WRITE, "write", "held descriptors"),
	allow(unix.SYS_CLOSE, "close", "held descriptors"),
	allow(unix.SYS_NANOSLEEP, "nanosleep", "the scheduler's monitor"),
	allow(unix.SYS_CLOCK_NANOSLEEP, "clock_nanosleep", "timers"),
	allow(unix.SYS_SCHED_YIELD, "sched_yield", "spinning locks"),
	allow(unix.SYS_MADVISE, "madvise", "the heap returns memory"),
	allow(unix.SYS_MMAP, "mmap", "heap, stacks, guest memory; never executable", Arg{Index: 2, Mask: unix.PROT_EXEC, OneOf: []uint32{0}}),
	allow(unix.SYS_MPROTECT, "mprotect", "never executable", Arg{Index: 2, Mask: unix.PROT_EXEC, OneOf: []uint32{0}}),
	allow(unix.SYS_MUNMAP, "munmap", "the heap, guest memory"),
	allow(unix.SYS_MINCORE, "mincore", "the runtime and guest memory ask what is present"),
	allow(unix.SYS_CLOCK_GETTIME, "clock_gettime", "time, where the vDSO can't tell"),
	allow(unix.SYS_GETTIMEOFDAY, "gettimeofday", "same"),
	allow(unix.SYS_TIME, "time", "same"),
	allow(unix.SYS_GETRANDOM, "getrandom", "keys, map seeds"),
	allow(unix.SYS_GETPID, "getpid", "its own number"),
	allow(unix.SYS_GETTID, "gettid", "its own number"),
	allow(unix.SYS_GETUID, "getuid", "its own user"),
	allow(unix.SYS_GETEUID, "geteuid", "its own user"),
	allow(unix.SYS_GETGID, "getgid", "its own group"),
	allow(unix.SYS_GETEGID, "getegid", "its own group"),
	allow(unix.SYS_RT_SIGACTION, "rt_sigaction", "the runtime's handlers"),
	allow(unix.SYS_RT_SIGPROCMASK, "rt_sigprocmask", "new threads"),
	allow(unix.SYS_RT_SIGRETURN, "rt_sigreturn", "handlers return"),
	allow(unix.SYS_SIGALTSTACK, "sigaltstack", "each thread's signal stack"),
	allow(unix.SYS_TGKILL, "tgkill", "pre-emption of its own threads", Arg{Index: 0, OneOf: []uint32{ownPID}}),
	allow(unix.SYS_RESTART_SYSCALL, "restart_syscall", "an interrupted sleep goes on"),
	allow(unix.SYS_CLONE, "clone", "threads, never processes or namespaces",
		Arg{Index: 0, Mask: threadFlags | nsFlags | 0xff, OneOf: []uint32{threadFlags}}),
	{Call: unix.SYS_CLONE3, Name: "clone3", Do: Absent, Reason: "its flags lie in memory, where a filter can't look"},
	allow(unix.SYS_ARCH_PRCTL, "arch_prctl", "thread-local storage of new threads", Arg{Index: 0, OneOf: []uint32{archSetFS}}),
	allow(unix.SYS_SCHED_GETAFFINITY, "sched_getaffinity", "how many CPUs there are"),
	allow(unix.SYS_EXIT, "exit", "threads end"),
	allow(unix.SYS_EXIT_GROUP, "exit_group", "it ends"),
	allow(unix.SYS_EPOLL_CREATE1, "epoll_create1", "the network poller, made at first use"),
	allow(unix.SYS_EPOLL_CTL, "epoll_ctl", "the network poller"),
	allow(unix.SYS_EVENTFD2, "eventfd2", "wakes the network poller"),
	allow(unix.SYS_PIPE2, "pipe2", "the runtime and os.Pipe: both ends stay inside"),
	allow(unix.SYS_FCNTL, "fcntl", "non-blocking mode, duplicates and locks of held descriptors", Arg{Index: 1, OneOf: []uint32{
		unix.F_GETFD, unix.F_SETFD, unix.F_GETFL, unix.F_SETFL, unix.F_DUPFD_CLOEXEC, unix.F_GET_SEALS, unix.F_OFD_SETLK, unix.F_OFD_GETLK}}),
	allow(unix.SYS_TIMER_CREATE, "timer_create", "the profiler"),
	allow(unix.SYS_TIMER_SETTIME, "timer_settime", "the profiler"),
	allow(unix.SYS_TIMER_DELETE, "timer_delete", "the profiler"),
	allow(unix.SYS_PRCTL, "prctl", "names for the heap in /proc/PID/maps, nothing else", Arg{Index: 0, OneOf: []uint32{unix.PR_SET_VMA}}),

	// The first try of these is an attack: nothing in a worker, nor in the Go runtime, ever makes them.
	kill(unix.SYS_PTRACE, "ptrace", "tracing another process"),
	kill(unix.SYS_PROCESS_VM_READV, "process_vm_readv", "another process's memory"),
	kill(unix.SYS_PROCESS_VM_WRITEV, "process_vm_writev", "another process's memory"),
	kill(unix.SYS_PIDFD_GETFD, "pidfd_getfd", "another process's descriptors"),
	kill(unix.SYS_EXECVE, "execve", "another program"),
	kill(unix.SYS_EXECVEAT, "execveat", "another program"),
	kill(unix.SYS_MOUNT, "mount", "the namespace's root"),
	kill(unix.SYS_PIVOT_ROOT, "pivot_root", "the namespace's root"),
	kill(unix.SYS_CHROOT, "chroot", "the namespace's root"),
	kill(unix.SYS_SETNS, "setns", "another namespace"),
	kill(unix.SYS_UNSHARE, "unshare", "another namespace"),
	kill(unix.SYS_INIT_MODULE, "init_module", "the host's kernel"),
	kill(unix.SYS_FINIT_MODULE, "finit_module", "the host's kernel"),
	kill(unix.SYS_KEXEC_LOAD, "kexec_load", "the host's kernel"),
	kill(unix.SYS_BPF, "bpf", "the host's kernel"),
	kill(unix.SYS_IO_URING_SETUP, "io_uring_setup", "system calls that no filter sees"),
	kill(unix.SYS_OPEN_BY_HANDLE_AT, "open_by_handle_at", "files by number, past any path"),
}

// fileIO is work on files already open.
var fileIO = []Rule{
	allow(unix.SYS_PREAD64, "pread64", "disk, memory"),
	allow(unix.SYS_PWRITE64, "pwrite64", "disk"),
	allow(unix.SYS_PREADV, "preadv", "disk"),
	allow(unix.SYS_PWRITEV, "pwritev", "disk"),
	allow(unix.SYS_PREADV2, "preadv2", "disk"),
	allow(unix.SYS_PWRITEV2, "pwritev2", "disk"),
	allow(unix.SYS_READV, "readv", "held descriptors"),
	allow(unix.SYS_WRITEV, "writev", "held descriptors"),
	allow(unix.SYS_LSEEK, "lseek", "holes and sizes"),
	allow(unix.SYS_FSTAT, "fstat", "sizes"),
	allow(unix.SYS_FSTATFS, "fstatfs", "room left on the host"),
	allow(unix.SYS_FSYNC, "fsync", "the guest's flush"),
	allow(unix.SYS_FDATASYNC, "fdatasync", "the guest's flush"),
	allow(unix.SYS_SYNC_FILE_RANGE, "sync_file_range", "writing back early"),
	allow(unix.SYS_FALLOCATE, "fallocate", "preallocation, trim"),
	allow(unix.SYS_FTRUNCATE, "ftruncate", "the overlay grows, the journal is cut"),
	allow(unix.SYS_FADVISE64, "fadvise64", "reading ahead"),
	allow(unix.SYS_COPY_FILE_RANGE, "copy_file_range", "io.Copy between files"),
	allow(unix.SYS_SENDFILE, "sendfile", "io.Copy from a file"),
	allow(unix.SYS_SPLICE, "splice", "io.Copy between sockets"),
	allow(unix.SYS_MSYNC, "msync", "mapped files"),
	allow(unix.SYS_MEMFD_CREATE, "memfd_create", "a buffer to hand over"),
}

// socketIO is work on sockets already connected or listening; socketpair makes pairs that stay inside.
var socketIO = []Rule{
	allow(unix.SYS_RECVMSG, "recvmsg", "messages, and descriptors from the daemon"),
	allow(unix.SYS_SENDMSG, "sendmsg", "messages, and descriptors for QEMU"),
	allow(unix.SYS_RECVFROM, "recvfrom", "messages"),
	allow(unix.SYS_SENDTO, "sendto", "messages"),
	allow(unix.SYS_RECVMMSG, "recvmmsg", "messages by the batch"),
	allow(unix.SYS_SENDMMSG, "sendmmsg", "messages by the batch"),
	allow(unix.SYS_ACCEPT4, "accept4", "QEMU and clients on listeners handed over"),
	allow(unix.SYS_SHUTDOWN, "shutdown", "half-closed connections"),
	allow(unix.SYS_GETSOCKNAME, "getsockname", "net.FileConn asks"),
	allow(unix.SYS_GETPEERNAME, "getpeername", "net.FileConn asks"),
	allow(unix.SYS_GETSOCKOPT, "getsockopt", "errors, the peer's identity"),
	allow(unix.SYS_SETSOCKOPT, "setsockopt", "buffers, keep-alive, linger"),
	allow(unix.SYS_SOCKETPAIR, "socketpair", "pairs that stay inside", Arg{Index: 0, OneOf: []uint32{unix.AF_UNIX}}),
	allow(unix.SYS_PPOLL, "ppoll", "waiting with a deadline"),
	allow(unix.SYS_POLL, "poll", "waiting with a deadline"),
}

// outbound is what the gate adds: the guest's allowed flows out. It can't bind or listen: published
// ports are handed over.
var outbound = []Rule{
	allow(unix.SYS_SOCKET, "socket", "TCP, UDP and echo requests over IPv4 and IPv6; no raw, packet, netlink or unix sockets",
		Arg{Index: 0, OneOf: []uint32{unix.AF_INET, unix.AF_INET6}},
		Arg{Index: 1, Mask: sockTypeMask, OneOf: []uint32{unix.SOCK_STREAM, unix.SOCK_DGRAM}},
		Arg{Index: 2, OneOf: []uint32{0, unix.IPPROTO_TCP, unix.IPPROTO_UDP, unix.IPPROTO_ICMP}}),
	allow(unix.SYS_CONNECT, "connect", "the guest's flows out, after the machine's rules allowed them"),
}

// protection is what the keeper adds: the requests of userfaultfd(2) that watch and let go, on a descriptor it is given.
var protection = []Rule{
	allow(unix.SYS_IOCTL, "ioctl", "UFFDIO_API, UFFDIO_REGISTER, UFFDIO_WRITEPROTECT", Arg{Index: 1, OneOf: []uint32{0xc018aa3f, 0xc020aa00, 0xc018aa06}}),
	allow(unix.SYS_SETPRIORITY, "setpriority", "threads of its own that hash and pack stand back behind the guest's",
		Arg{Index: 0, OneOf: []uint32{unix.PRIO_PROCESS}}, Arg{Index: 1, OneOf: []uint32{0}}),
}

// tracing is what the planter may do to a process of its own user. It stands before goRuntime, where the same calls are fatal.
var tracing = []Rule{
	allow(unix.SYS_PTRACE, "ptrace", "QEMU's main thread makes two system calls"),
	allow(unix.SYS_WAIT4, "wait4", "until that thread stands still"),
	allow(unix.SYS_PIDFD_OPEN, "pidfd_open", "of that process"),
	allow(unix.SYS_PIDFD_GETFD, "pidfd_getfd", "the descriptor it has made"),
}

// emulatorDenied is what QEMU must not do, above what its own sandbox takes away.
var emulatorDenied = []Rule{
	denyUnless(unix.SYS_SOCKET, "socket", "unix sockets only: its disk's and its network's ends", Arg{Index: 0, OneOf: []uint32{unix.AF_UNIX}}),
	{Call: unix.SYS_CLONE, Name: "clone", Do: Refuse, Reason: "no namespaces", When: []Arg{{Index: 0, Mask: unix.CLONE_NEWUSER, OneOf: []uint32{unix.CLONE_NEWUSER}}}},
	{Call: unix.SYS_CLONE, Name: "clone", Do: Refuse, Reason: "threads only, no processes", When: []Arg{{Index: 0, Mask: unix.CLONE_THREAD, OneOf: []uint32{0}}}},
	{Call: unix.SYS_CLONE3, Name: "clone3", Do: Absent, Reason: "its flags lie in memory, where a filter can't look; glibc falls back to clone"},
	deny(unix.SYS_FORK, "fork", "no processes"),
	deny(unix.SYS_VFORK, "vfork", "no processes"),
	deny(unix.SYS_EXECVEAT, "execveat", "no other program; execve itself is closed by QEMU's own sandbox, after its start"),
	deny(unix.SYS_UNSHARE, "unshare", "no namespaces"),
	deny(unix.SYS_SETNS, "setns", "no other's namespaces"),
	deny(unix.SYS_PTRACE, "ptrace", "no other's memory"),
	deny(unix.SYS_PROCESS_VM_READV, "process_vm_readv", "no other's memory"),
	deny(unix.SYS_PROCESS_VM_WRITEV, "process_vm_writev", "no other's memory"),
	deny(unix.SYS_PROCESS_MADVISE, "process_madvise", "no other's memory"),
	deny(unix.SYS_KILL, "kill", "no other process; raise and pthread_kill are tgkill"),
	deny(unix.SYS_TKILL, "tkill", "same"),
	deny(unix.SYS_RT_SIGQUEUEINFO, "rt_sigqueueinfo", "same"),
	deny(unix.SYS_PIDFD_SEND_SIGNAL, "pidfd_send_signal", "same"),
	denyUnless(unix.SYS_TGKILL, "tgkill", "its own threads only", Arg{Index: 0, OneOf: []uint32{ownPID}}),
	denyUnless(unix.SYS_RT_TGSIGQUEUEINFO, "rt_tgsigqueueinfo", "its own threads only", Arg{Index: 0, OneOf: []uint32{ownPID}}),
	denyUnless(unix.SYS_PRLIMIT64, "prlimit64", "its own limits only", Arg{Index: 0, OneOf: []uint32{0, ownPID}}),
	deny(unix.SYS_MOVE_PAGES, "move_pages", "no other's memory"),
	deny(unix.SYS_MIGRATE_PAGES, "migrate_pages", "no other's memory"),
	deny(unix.SYS_IOPRIO_SET, "ioprio_set", "no other's share of the disk"),
	deny(unix.SYS_PIDFD_OPEN, "pidfd_open", "no other process"),
	deny(unix.SYS_PIDFD_GETFD, "pidfd_getfd", "no other's descriptors"),
	deny(unix.SYS_KCMP, "kcmp", "no other process"),
	deny(unix.SYS_MOUNT, "mount", "the root stays as it is"),
	deny(unix.SYS_UMOUNT2, "umount2", "the root stays as it is"),
	deny(unix.SYS_PIVOT_ROOT, "pivot_root", "the root stays as it is"),
	deny(unix.SYS_CHROOT, "chroot", "the root stays as it is"),
	deny(unix.SYS_OPEN_TREE, "open_tree", "the root stays as it is"),
	deny(unix.SYS_MOVE_MOUNT, "move_mount", "the root stays as it is"),
	deny(unix.SYS_FSOPEN, "fsopen", "the root stays as it is"),
	deny(unix.SYS_FSMOUNT, "fsmount", "the root stays as it is"),
	deny(unix.SYS_FSCONFIG, "fsconfig", "the root stays as it is"),
	deny(unix.SYS_FSPICK, "fspick", "the root stays as it is"),
	deny(unix.SYS_MOUNT_SETATTR, "mount_setattr", "the root stays as it is"),
	deny(unix.SYS_OPEN_BY_HANDLE_AT, "open_by_handle_at", "files by number, past any path"),
	deny(unix.SYS_NAME_TO_HANDLE_AT, "name_to_handle_at", "same"),
	deny(unix.SYS_BPF, "bpf", "the host's kernel"),
	deny(unix.SYS_PERF_EVENT_OPEN, "perf_event_open", "the host's kernel"),
	deny(unix.SYS_IO_URING_SETUP, "io_uring_setup", "system calls that no filter sees"),
	deny(unix.SYS_ADD_KEY, "add_key", "the host's keyrings"),
	deny(unix.SYS_REQUEST_KEY, "request_key", "the host's keyrings"),
	deny(unix.SYS_KEYCTL, "keyctl", "the host's keyrings"),
	deny(unix.SYS_INIT_MODULE, "init_module", "the host's kernel"),
	deny(unix.SYS_FINIT_MODULE, "finit_module", "the host's kernel"),
	deny(unix.SYS_DELETE_MODULE, "delete_module", "the host's kernel"),
	deny(unix.SYS_KEXEC_LOAD, "kexec_load", "the host's kernel"),
	deny(unix.SYS_KEXEC_FILE_LOAD, "kexec_file_load", "the host's kernel"),
	deny(unix.SYS_REBOOT, "reboot", "the host"),
	deny(unix.SYS_SETTIMEOFDAY, "settimeofday", "the host's clock"),
	deny(unix.SYS_CLOCK_SETTIME, "clock_settime", "the host's clock"),
	deny(unix.SYS_CLOCK_ADJTIME, "clock_adjtime", "the host's clock"),
	deny(unix.SYS_ADJTIMEX, "adjtimex", "the host's clock"),
	deny(unix.SYS_SYSLOG, "syslog", "the host's log"),
	deny(unix.SYS_ACCT, "acct", "the host's accounts"),
	deny(unix.SYS_SWAPON, "swapon", "the host's swap"),
	deny(unix.SYS_QUOTACTL, "quotactl", "the host's quotas"),
	deny(unix.SYS_USERFAULTFD, "userfaultfd", "a favourite of kernel exploits; the one of its memory's protection is made from outside, by a device it gets for a moment"),
	deny(unix.SYS_FANOTIFY_INIT, "fanotify_init", "what others open"),
	deny(unix.SYS_SETUID, "setuid", "its user stays"),
	deny(unix.SYS_SETGID, "setgid", "its group stays"),
	deny(unix.SYS_SETGROUPS, "setgroups", "its groups stay"),
	deny(unix.SYS_PERSONALITY, "personality", "switches address randomisation off"),
	{Call: unix.SYS_IOCTL, Name: "ioctl", Do: Refuse, Reason: "TIOCSTI and TIOCLINUX type into a terminal",
		When: []Arg{{Index: 1, OneOf: []uint32{unix.TIOCSTI, 0x541c}}}},
}

func deny(call uint32, name, reason string) Rule {
	return Rule{Call: call, Name: name, Do: Refuse, Reason: reason}
}

func denyUnless(call uint32, name, reason string, a Arg) Rule {
	a.Unless = true
	return Rule{Call: call, Name: name, Do: Refuse, When: []Arg{a}, Reason: reason}
}
