// Package introspect lists what is in a guest's memory from outside: its processes first.
//
// A [Guest] joins a guest's physical memory (package memory) with what its kernel is (package kernel, made from the
// trusted kernel file). Nothing in the guest helps, and nothing in it is trusted: the kernel file says where things
// are, memory says what is there.
//
//	guest, err := introspect.Attach(ram, profile)   // finds the kernel in RAM: milliseconds
//	list, err := guest.Processes()
//	load, err := guest.CPU(load[:0])                // some 50 µs: for sampling
//
// # Finding the kernel
//
// KASLR moves a kernel twice: to a physical place and to a virtual one. Both follow from RAM. The banner lies at a
// known distance from the start of the text, which is aligned to 2 MiB, so at most a few thousand places are compared.
// init_task is its own parent, so its real_parent holds its run-time address, and that less its link address is the
// virtual slide. The two are confirmed by walking the kernel's own page tables, init_top_pgt.
//
// # While the guest runs
//
// It is never stopped: pausing would not make its lists whole (a paused kernel is often half-way through a fork), and
// would be noticed. A list is taken as read only where each element's neighbour points back at it; where one does not,
// the list was caught in a change and is read again. Tasks on their way in or out are left out. What can't be read is
// said to be unknown, never guessed.
//
// All memory is hostile: every list is bounded, every text capped, every pointer may be wild, and a view costs bounded
// time whatever memory says.
//
// When the guest reboots, the kernel is looked for again; until it is found views return [ErrNotReady]. A reset leaves
// the old kernel's bytes in RAM, so whoever learns of one (from QEMU) calls [Guest.Rebooted].
//
// doc/introspection.md has the structures that are read and what was measured.
//
// Sources: include/linux/sched.h, sched/signal.h, fs/d_path.c, kernel/time/timekeeping.c, arch/x86/kernel/head_64.S.
package introspect

import "errors"

// Physical is all that is needed of a guest's memory: package memory's RAM and Process are two of its kind.
type Physical interface {
	ReadPhys(pa uint64, b []byte) error
}

// Errors of this package. A kernel that lacks a symbol or a field gives kernel.ErrUnsupported.
var (
	// ErrNotReady: the guest's kernel is not in memory (yet): it is booting, or it is another one than the profile's.
	ErrNotReady = errors.New("guest kernel not found in memory: it may still be booting")
	// ErrStarting: the guest's kernel runs, and has not started its first program yet.
	ErrStarting = errors.New("the guest has not started its first program yet")
	// ErrTorn: a list changed under every attempt to read it, or is broken.
	ErrTorn = errors.New("list in guest memory is torn")
	// ErrNoProcess: no process on the kernel's list has that pid.
	ErrNoProcess = errors.New("no such process in the guest")
	// ErrEndless: memory asked for more reading than any real guest does; it is made up to keep the reader busy.
	ErrEndless = errors.New("guest memory is made to be read for ever")
)

// Bounds of what is believed of a guest.
const (
	maxReads    = 16 << 20 // of one view: a second or so. A hundred processes take some 4,000
	maxNodes    = 1 << 16  // of one list
	maxAttempts = 8        // to read a list that changes
	maxCmdline  = 4096     // bytes of arguments
	maxPath     = 4096
	maxDepth    = 256 // elements of a path
	maxMounts   = 64  // mount points on the way to the root
)
