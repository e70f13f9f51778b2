package jail

import "golang.org/x/sys/unix"

// Profile is the whole confinement of one sort of process, as data.
type Profile struct {
	Name        string
	Namespaces  []Namespace
	Rlimits     []Rlimit
	Network     Network
	Tracer      bool   // it traces one process: landlock, which forbids that, is left out
	Syscalls    []Rule // checked in order
	Otherwise   Action // what a system call without a rule meets
	OOM         int    // oom_score_adj: how much rather than the daemon it is killed when memory runs out
	Descriptors []Hold // what it is handed: documentation, and what the tests compare with
}

// Namespace is one kind of namespace a process gets for itself.
type Namespace struct {
	Name   string
	Flag   uintptr
	Reason string
}

// Rlimit is one resource limit, hard and soft.
type Rlimit struct {
	Name     string
	Resource int
	Max      uint64
	Reason   string
}

// Hold is a sort of descriptor that a process holds.
type Hold struct {
	What, Reason string
}

// Network says what landlock leaves of TCP; the network namespace and seccomp say the rest.
type Network int

// What a process may do with TCP. The zero value is nothing.
const (
	NoNetwork Network = iota
	ConnectOnly
)

var (
	nsMount  = Namespace{"mnt", unix.CLONE_NEWNS, "an empty root: there is no path to open"}
	nsPID    = Namespace{"pid", unix.CLONE_NEWPID, "no other process can be named, hence signalled or traced"}
	nsIPC    = Namespace{"ipc", unix.CLONE_NEWIPC, "no System V or POSIX queues and segments of others"}
	nsUTS    = Namespace{"uts", unix.CLONE_NEWUTS, "the host's name is not the guest's to know"}
	nsCgroup = Namespace{"cgroup", unix.CLONE_NEWCGROUP, "its place in the host's tree does not show"}
	nsNet    = Namespace{"net", unix.CLONE_NEWNET, "no interface, no abstract socket of the host"}
)

// Emulator is QEMU's profile. QEMU uses system calls by the hundred and differs by version, so its filter names what it
// must not do; its own -sandbox (see [SandboxArgs]) takes away more. Its walls are the namespaces, the user and the root.
var Emulator = Profile{
	Name:       "qemu",
	Namespaces: []Namespace{nsMount, nsPID, nsNet, nsIPC, nsUTS, nsCgroup},
	Rlimits: []Rlimit{
		{"core", unix.RLIMIT_CORE, 0, "a core file is the guest's memory on the host's disk"},
		{"nofile", unix.RLIMIT_NOFILE, 1024, "its descriptors are few: sockets, RAM, event descriptors per device queue"},
		{"nproc", unix.RLIMIT_NPROC, 512, "threads: one per virtual CPU, and a pool of 64 for its block layer"},
		{"msgqueue", unix.RLIMIT_MSGQUEUE, 0, "it uses no POSIX queues"},
	},
	Syscalls:  emulatorDenied,
	Otherwise: Allow,
	OOM:       300,
	Descriptors: []Hold{
		{"standard input, output, error", "null, and its log"},
		{"guest memory", "the RAM file, which it opens in its root"},
		{"probe page", "1 MiB and 64 KiB shared with the guard, where a plugin is loaded"},
		{"sockets", "listening and connected: QMP, console, network, agent; and the disk's"},
		{"event descriptors", "of its main loop, its threads and its devices' queues"},
	},
}

// Guard is the profile of the process that reads a guest's memory and serves its disk.
var Guard = Profile{
	Name:       "guard",
	Namespaces: []Namespace{nsMount, nsPID, nsNet, nsIPC, nsUTS, nsCgroup},
	Rlimits:    workerRlimits,
	Syscalls:   join(goRuntime, fileIO, socketIO),
	Otherwise:  Refuse,
	OOM:        200,
	Descriptors: []Hold{
		{"standard input, output, error", "null, and its log"},
		{"volume files", "the overlay for writing, the layers for reading"},
		{"guest memory", "the RAM file or /proc/PID/mem, for reading"},
		{"kernel profile", "for reading"},
		{"kernel reference", "the kernel file's code, to compare the guest's with, for reading"},
		{"kernel modules", "its modules' code, for reading"},
		{"probe page", "shared with QEMU's plugin, while it is set up"},
		{"clocks", "schedstat of the threads of virtual CPUs, for reading"},
		{"console log", "its beginning and its two ends, for writing"},
		{"log of inputs", "a ring of files, where what enters is kept, for writing; of a clone that is given them again, another machine's, for reading"},
		{"tally", "a page of sealed size in which it counts the events it has not told: its sudden end hides nothing"},
		{"event descriptors", "of the Go runtime's poller"},
		{"sockets", "to the daemon, to QEMU (QMP, console, agent), and the listening NBD socket"},
	},
}

// Gate is the profile of the process that is a guest's network. Of the host it has the network and nothing else.
var Gate = Profile{
	Name:       "gate",
	Namespaces: []Namespace{nsMount, nsPID, nsIPC, nsUTS, nsCgroup},
	Rlimits:    workerRlimits,
	Network:    ConnectOnly,
	Syscalls:   join(goRuntime, fileIO, socketIO, outbound),
	Otherwise:  Refuse,
	OOM:        200,
	Descriptors: []Hold{
		{"standard input, output, error", "null, and its log"},
		{"sockets", "to the daemon, to QEMU's netdev, and listeners for published ports, made by the daemon"},
		{"capture", "a pipe to the daemon, while one is asked for"},
		{"log of inputs", "a ring of files, where what enters is kept, for writing"},
		{"tally", "a page of sealed size in which it counts the events it has not told: its sudden end hides nothing"},
		{"event descriptors", "of the Go runtime's poller"},
	},
}

// GateAlone is the profile of a gate that leads nowhere: it gives a clone again what had entered another machine. No interface, no
// socket of the host, no way to make one.
var GateAlone = Profile{
	Name:       "gate-alone",
	Namespaces: []Namespace{nsMount, nsPID, nsNet, nsIPC, nsUTS, nsCgroup},
	Rlimits:    workerRlimits,
	Syscalls:   join(goRuntime, fileIO, socketIO),
	Otherwise:  Refuse,
	OOM:        200,
	Descriptors: []Hold{
		{"standard input, output, error", "null, and its log"},
		{"sockets", "to the daemon, and to QEMU's netdev"},
		{"logs of inputs", "of the machine that is played, for reading"},
		{"tally", "a page of sealed size in which it counts the events it has not told: its sudden end hides nothing"},
		{"event descriptors", "of the Go runtime's poller"},
	},
}

// Convert is the profile of one-shot readers of hostile files: imports, RAM images, disks at rest.
var Convert = Profile{
	Name:       "convert",
	Namespaces: []Namespace{nsMount, nsPID, nsNet, nsIPC, nsUTS, nsCgroup},
	Rlimits:    workerRlimits,
	Syscalls:   join(goRuntime, fileIO),
	Otherwise:  Refuse,
	OOM:        500,
	Descriptors: []Hold{
		{"standard input, output, error", "null, its result, and its log"},
		{"files", "the hostile one for reading, the result for writing"},
	},
}

// Keeper is the profile of the process that takes a machine's memory at a checkpoint, and puts it back.
var Keeper = Profile{
	Name:       "keeper",
	Namespaces: []Namespace{nsMount, nsPID, nsNet, nsIPC, nsUTS, nsCgroup},
	Rlimits:    workerRlimits,
	Syscalls:   join(goRuntime, fileIO, socketIO, protection),
	Otherwise:  Refuse,
	OOM:        200,
	Descriptors: []Hold{
		{"standard input, output, error", "null, and its log"},
		{"guest memory", "the RAM file or /proc/PID/mem, for reading; to put a checkpoint back, the new RAM file for writing"},
		{"protection", "a userfaultfd of QEMU: it may hold up QEMU's writes to guest memory, and neither read nor write by it"},
		{"checkpoint files", "the one that is made, for writing; those it continues, for reading"},
		{"sockets", "to the daemon, and to the guard of its machine"},
		{"event descriptors", "of the Go runtime's poller"},
	},
}

// Planter is the profile of the process that lets QEMU make the descriptor of its memory's protection. It lives for some
// milliseconds as QEMU's own user, reads nothing of the guest, and is the only one that may trace; it needs no capability.
var Planter = Profile{
	Name:       "planter",
	Namespaces: []Namespace{nsMount, nsNet, nsIPC, nsUTS, nsCgroup},
	Rlimits:    workerRlimits,
	Tracer:     true,
	Syscalls:   join(tracing, goRuntime, socketIO),
	Otherwise:  Refuse,
	OOM:        500,
	Descriptors: []Hold{
		{"standard input, output, error", "null, and the guard's log"},
		{"socket", "to the daemon, for the one descriptor it is there for"},
	},
}

// Profiles are all profiles, by name.
var Profiles = map[string]Profile{"qemu": Emulator, "guard": Guard, "gate": Gate, "gate-alone": GateAlone, "convert": Convert, "keeper": Keeper, "planter": Planter}

var workerRlimits = []Rlimit{
	{"core", unix.RLIMIT_CORE, 0, "a core file is the guest's memory on the host's disk"},
	{"nofile", unix.RLIMIT_NOFILE, 16384, "a flow or a connection is one; a flood ends here, not in the host's table"},
	{"nproc", unix.RLIMIT_NPROC, 512, "threads: the Go runtime makes one per blocked disk request"},
	{"memlock", unix.RLIMIT_MEMLOCK, 0, "it locks nothing"},
	{"msgqueue", unix.RLIMIT_MSGQUEUE, 0, "it uses no POSIX queues"},
}

// SandboxArgs are QEMU's own system call filter, part of every command line.
var SandboxArgs = []string{"-sandbox", "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"}

func join(parts ...[]Rule) []Rule {
	var all []Rule
	for _, p := range parts {
		all = append(all, p...)
	}
	return all
}
