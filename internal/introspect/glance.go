package introspect

import (
	"encoding/binary"
	"slices"

	"vigia/internal/kernel"
)

// Pulse is what tells at the cost of a few reads whether tasks or modules came or went since the last one.
type Pulse struct {
	Boot    Boot
	Forks   uint64 // tasks ever made, threads and kernel threads too
	Tasks   uint64 // tasks there are, threads too
	Module  uint64 // the newest module
	Counted bool   // the kernel has the counters
}

// Glance is one process as somebody needs it who looks many times a second. Two of the same Task and StartTime are the
// same process.
type Glance struct {
	Task, StartTime uint64
	PID             int64
	Image           uint64 // its mm: another one after it has become another program
	UID, EUID       uint32
	Threads         int64  // that it has now
	Ended           uint64 // CPU time of its threads that have ended: it grows when one does
	Exit            uint32 // of one that ends: the status that its parent will be given
	Kernel          bool   // a kernel thread
	Forked          bool   // it is a copy of its parent still, and runs no program of its own
	Zombie          bool
}

// glanceLayout is where the counters and fields lie that only glances use.
type glanceLayout struct {
	forks, tasks, modules         uint64 // link addresses; 0 where the kernel has none
	threads, groupCode, groupFlag uint64 // in signal_struct
	exitCode                      uint64 // in task_struct
	first, size                   uint64 // of the part of a task_struct, or of a signal_struct, that has all that is read
	firstSignal, sizeSignal       uint64
	firstCred, sizeCred           uint64
}

const (
	flagForkNoExec = 0x00000040 // PF_FORKNOEXEC
	exitZombie     = 0x0020
	groupExit      = 0x00000004 // SIGNAL_GROUP_EXIT: group_exit_code is everybody's
)

func (g *Guest) glanceLayout() (*glanceLayout, error) {
	if g.glances != nil {
		return g.glances, nil
	}
	if g.layout.err != nil {
		return nil, g.layout.err
	}
	r, l := &resolver{p: g.profile}, &glanceLayout{}
	l.threads, l.exitCode = r.field("signal_struct", "nr_threads"), r.field("task_struct", "exit_code")
	l.groupCode, l.groupFlag = r.field("signal_struct", "group_exit_code"), r.field("signal_struct", "flags")
	if r.err != nil {
		return nil, r.err
	}
	t, c := &g.layout.task, &g.layout.cred
	l.first, l.size = span(t.tasks, t.tasks+8, t.pid, t.startTime, t.mm, t.flags, t.state, t.exitState, t.threadPid, t.realCred, t.signal, l.exitCode)
	l.firstSignal, l.sizeSignal = span(l.threads, l.groupCode, l.groupFlag, g.layout.signal.sumRuntime)
	l.firstCred, l.sizeCred = span(c.uid, c.euid)
	if l.size > maxSpan || max(l.sizeSignal, l.sizeCred) > maxSpan/2 {
		return nil, &kernel.MissingError{What: "field", Name: "task_struct of ordinary size"}
	}
	l.forks, _ = g.profile.Symbol("total_forks")
	l.tasks, _ = g.profile.Symbol("nr_threads")
	l.modules, _ = g.profile.Symbol("modules")
	g.glances = l
	g.profile.Trim()
	return l, nil
}

// Pulse reads the kernel's counters.
func (g *Guest) Pulse() (Pulse, error) {
	var p Pulse
	err := g.view(func() error {
		l, err := g.glanceLayout()
		if err != nil {
			return err
		}
		p = Pulse{Boot: g.boot, Counted: l.forks != 0 && l.tasks != 0}
		r := reader{s: g.space}
		if p.Counted {
			p.Forks = r.u64(l.forks + g.boot.Slide)
			p.Tasks = uint64(r.u32(l.tasks + g.boot.Slide))
		}
		if l.modules != 0 {
			p.Module = r.u64(l.modules + g.boot.Slide)
		}
		if r.err != nil {
			return ErrTorn
		}
		return nil
	})
	return p, err
}

// Glances appends every process to list, in the order of the kernel's list, and returns it. Passing the last one's
// memory back (list[:0]) it does not allocate.
func (g *Guest) Glances(list []Glance) ([]Glance, error) {
	keep := len(list)
	err := g.view(func() error {
		l, err := g.glanceLayout()
		if err != nil {
			return err
		}
		list = list[:keep]
		return g.glanceAll(l, func(p Glance) { list = append(list, p) })
	})
	if err != nil {
		list = list[:keep]
	}
	return list, err
}

// maxSpan bounds what is read of one structure at once. Fields of a task_struct lie within some 3,000 bytes.
const maxSpan = 4096

// span is the least part of a structure that has 8 bytes at each of the offsets.
func span(offsets ...uint64) (first, size uint64) {
	first = slices.Min(offsets)
	return first, slices.Max(offsets) + 8 - first
}

// part is a structure of which a part was read at once: one read of 3,000 bytes costs as much as two of 8.
type part struct {
	first uint64
	b     []byte
}

func (p part) u64(off uint64) uint64 { return binary.LittleEndian.Uint64(p.b[off-p.first:]) }
func (p part) u32(off uint64) uint32 { return binary.LittleEndian.Uint32(p.b[off-p.first:]) }

// glanceAll is leaders and glance in one: it reads each task once.
func (g *Guest) glanceAll(l *glanceLayout, visit func(Glance)) error {
	tasks := g.layout.task.tasks
	head := g.initTask() + tasks
	node := head
	next, err := g.space.U64(head)
	for range maxNodes {
		if err != nil {
			return ErrTorn
		}
		if next == head {
			if back, err := g.space.U64(head + 8); err != nil || back != node {
				return ErrTorn
			}
			return nil
		}
		t := part{l.first, g.taskPart[:l.size]}
		if err := g.space.Read(next-tasks+l.first, t.b); err != nil || t.u64(tasks+8) != node {
			return ErrTorn
		}
		if err := g.glance(l, next-tasks, t, visit); err != nil {
			return err
		}
		node, next = next, t.u64(tasks)
	}
	return ErrTorn
}

// glance visits a task that is settled: see there.
func (g *Guest) glance(l *glanceLayout, task uint64, t part, visit func(Glance)) error {
	at := &g.layout.task
	pid := t.u64(at.threadPid)
	if t.u32(at.state)&taskNew != 0 || t.u32(at.exitState)&exitDead != 0 || pid == 0 {
		return nil
	}
	r := reader{s: g.space}
	back := r.u64(pid + g.layout.pid.tasks)
	if r.err != nil {
		return ErrTorn
	}
	if back != task+at.pidLinks {
		return nil
	}
	flags := t.u32(at.flags)
	p := Glance{Task: task, StartTime: t.u64(at.startTime), PID: int64(int32(t.u32(at.pid))), Image: t.u64(at.mm), Threads: 1,
		Kernel: flags&flagKernelThread != 0, Forked: flags&flagForkNoExec != 0, Zombie: t.u32(at.exitState)&exitZombie != 0}
	if p.Kernel {
		visit(p)
		return nil
	}
	s, c := part{l.firstSignal, g.scratch[:l.sizeSignal]}, part{l.firstCred, g.scratch[maxSpan/2:][:l.sizeCred]}
	r.bytes(t.u64(at.signal)+l.firstSignal, s.b)
	r.bytes(t.u64(at.realCred)+l.firstCred, c.b)
	if r.err != nil {
		return ErrTorn
	}
	p.UID, p.EUID = c.u32(g.layout.cred.uid), c.u32(g.layout.cred.euid)
	p.Threads, p.Ended = int64(int32(s.u32(l.threads))), s.u64(g.layout.signal.sumRuntime)
	if p.Exit = t.u32(l.exitCode); s.u32(l.groupFlag)&groupExit != 0 {
		p.Exit = s.u32(l.groupCode)
	}
	visit(p)
	return nil
}

// Describe says what a process of a glance is: ErrTorn where it has ended since.
func (g *Guest) Describe(p Glance) (Process, error) {
	return g.Detail(TaskTime{Task: p.Task, StartTime: p.StartTime})
}
