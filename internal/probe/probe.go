// Package probe tells what processes of a guest do: that they begin, become root, end, that a module is loaded, that a
// watched file is opened. It has two ways of knowing.
//
// # Sampling
//
// A [Sampler] looks many times a second, under any accelerator, and less often at a guest that rests. Counters of the
// kernel's own tell it at the cost of three reads whether anything came or went; where the guest's processors ran it walks
// the list of processes, as far as one hundredth of a core allows, and tells the differences. What lived shorter than a
// period it can't see, but the counter of forks has it: the number is told as process.missed. Where a [Watcher] tells all
// there is, the sampler only holds that against the counters.
//
// # What is told
//
//	process.forked       a process was made; it is still a copy of its parent
//	process.started      it began a program of its own (exec)
//	process.credentials  its user ids changed
//	process.exited       it ended
//	process.missed       so many lived and ended unseen
//	module.loaded        the kernel took a module
//
// Threads are no processes and are told of only where they can't be told apart (process.missed). Kernel threads are not
// told of. doc/probes.md has the details, and what was measured.
//
// This package reads no memory itself: a [Guest] is the eyes, which the guard lends it from package introspect.
//
// Sources: kernel/fork.c (total_forks, nr_threads), kernel/exit.c, include/linux/sched.h, sched/signal.h.
package probe

import (
	"fmt"

	"vigia/internal/event"
)

// Guest is what is seen in a guest's memory at one instant. All of it is the guest's: any value may be a lie.
type Guest interface {
	Pulse() (Pulse, error)
	Glances(list []Glance) ([]Glance, error) // appended to list
	Describe(Glance) (Process, error)
	Modules() ([]Module, error) // the newest first
}

// Pulse is what tells cheaply that something changed.
type Pulse struct {
	Life    uint64 // of the guest's kernel: another number after a reboot
	Forks   uint64 // tasks ever made, threads too
	Tasks   uint64 // tasks there are, threads too
	Module  uint64 // the newest module
	Counted bool   // Forks and Tasks are known
}

// Glance is one process, in little. PID and StartTime together name it for good.
type Glance struct {
	Task, StartTime uint64
	PID             int64
	Image           uint64 // its address space: another one after it has become another program
	UID, EUID       uint32
	Threads         int64  // that it has now
	Ended           uint64 // CPU time of its threads that have ended: it grows when one does
	Exit            uint32 // of a zombie: its wait status
	Kernel          bool   // a kernel thread
	Forked          bool   // it is a copy of its parent still
	Zombie          bool
}

// Process is what an event says of a process. Text is the guest's own, made printable; what is unknown is empty.
type Process struct {
	PID, PPID          int64
	UID, EUID          int64
	Comm, Exe, Cmdline string
}

// Module is a kernel module.
type Module struct {
	Name    string
	Address uint64
	Size    uint64
}

func (m Module) fields() event.Fields {
	return event.Fields{"name": m.Name, "size": int64(m.Size), "address": fmt.Sprintf("%#x", m.Address)}
}

// Emit takes an event; it must not block.
type Emit func(kind event.Kind, fields event.Fields)

func (p *Process) fields() event.Fields {
	f := event.Fields{"pid": p.PID, "ppid": p.PPID, "uid": p.UID, "euid": p.EUID, "comm": p.Comm}
	if p.Exe != "" {
		f["exe"] = p.Exe
	}
	if p.Cmdline != "" {
		f["cmdline"] = p.Cmdline
	}
	return f
}

// ended adds how a process ended, from its wait status: with a code of its own, or by a signal.
func ended(f event.Fields, status uint32) event.Fields {
	if signal := status & 0x7f; signal != 0 {
		f["signal"] = int64(signal)
	} else {
		f["exit_code"] = int64(status >> 8 & 0xff)
	}
	return f
}
