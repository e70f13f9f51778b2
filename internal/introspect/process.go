package introspect

import (
	"errors"
	"time"

	"vigia/internal/event"
)

// Process is one thread group of the guest. Text in it is the guest's own, made printable and cut.
type Process struct {
	PID     int64  `json:"pid"` // in the first pid namespace
	PPID    int64  `json:"ppid"`
	UID     uint32 `json:"uid"` // real; in the first user namespace
	EUID    uint32 `json:"euid"`
	SUID    uint32 `json:"suid"`
	FSUID   uint32 `json:"fsuid"`
	GID     uint32 `json:"gid"`
	EGID    uint32 `json:"egid"`
	SGID    uint32 `json:"sgid"`
	FSGID   uint32 `json:"fsgid"`
	Comm    string `json:"comm"`
	Cmdline string `json:"cmdline"` // arguments joined by spaces: the process's own words
	Exe     string `json:"exe"`     // " (deleted)" follows one that is

	CPUSeconds   float64   `json:"cpu_seconds"`    // of all its threads, the ended ones too
	Start        time.Time `json:"start,omitzero"` // by the guest's clock
	StartSeconds float64   `json:"start_seconds"`  // after boot
	State        string    `json:"state"`          // as ps has it: R, S, D, T, t, X, Z, P, I
	Threads      int       `json:"threads"`
	Kernel       bool      `json:"kernel"` // a kernel thread: it has no command line and no executable

	Groups       []uint32     `json:"groups"` // supplementary
	Capabilities Capabilities `json:"capabilities"`
	Namespaces   Namespaces   `json:"namespaces"`
	NamespacePID int64        `json:"namespace_pid"` // its pid in its own pid namespace
	Cgroup       string       `json:"cgroup"`        // path of its control group
	Container    string       `json:"container"`     // id or name, and what runs it, where the control group's path tells
	Runtime      string       `json:"container_runtime"`
	Unit         string       `json:"unit"` // of systemd

	// Unknown names the fields that could not be read: the page was not in memory, or changed meanwhile.
	Unknown []string `json:"unknown,omitempty"`

	Task      uint64 `json:"-"` // address of the leader's task_struct; with StartTime it names the process uniquely
	StartTime uint64 `json:"-"` // monotonic nanoseconds
}

// Flags and states of a task (sched.h).
const (
	flagKernelThread = 0x00200000

	taskNew   = 0x0800
	exitDead  = 0x0010
	taskDead  = 0x0080
	stateIdle = 0x0402 // uninterruptible, and not counted as load
)

// Processes lists the guest's processes, kernel threads too, in the order of the kernel's list: by age.
func (g *Guest) Processes() ([]Process, error) {
	list := make([]Process, 0, 64)
	err := g.view(func() error {
		list = list[:0]
		return g.leaders(func(task uint64) error {
			list = append(list, Process{Task: task})
			return g.process(&list[len(list)-1])
		})
	})
	if err != nil {
		return nil, err
	}
	return list, nil
}

// Detail describes the process of a sample: ErrTorn where it has ended since.
func (g *Guest) Detail(t TaskTime) (Process, error) {
	var p Process
	gone := false
	err := g.view(func() error {
		p = Process{Task: t.Task}
		settled, err := g.settled(t.Task)
		if err == nil && settled {
			err = g.process(&p)
		}
		// An ended process is no reason to read again, as a list that is torn would be.
		gone = err != nil || !settled || p.StartTime != t.StartTime
		return nil
	})
	if err == nil && gone {
		err = ErrTorn
	}
	if err != nil {
		return Process{}, err
	}
	return p, nil
}

// leaders calls visit with every thread group's leader that is neither being made nor being taken apart. init_task,
// the idle task, heads the list and is not on it.
func (g *Guest) leaders(visit func(task uint64) error) error {
	if g.layout.err != nil {
		return g.layout.err
	}
	tasks := g.layout.task.tasks
	return g.walk(g.initTask()+tasks, func(node uint64) error {
		task := node - tasks
		settled, err := g.settled(task)
		if err != nil || !settled {
			return err
		}
		return visit(task)
	})
}

// settled reports whether a task is fully there: past its fork, not yet released, and known to its own pid.
func (g *Guest) settled(task uint64) (bool, error) {
	t := &g.layout.task
	state, err1 := g.space.U32(task + t.state)
	exit, err2 := g.space.U32(task + t.exitState)
	pid, err3 := g.space.U64(task + t.threadPid)
	if err := errors.Join(err1, err2, err3); err != nil {
		return false, ErrTorn
	}
	if state&taskNew != 0 || exit&exitDead != 0 || pid == 0 {
		return false, nil
	}
	back, err := g.space.U64(pid + g.layout.pid.tasks)
	if err != nil {
		return false, ErrTorn
	}
	return back == task+t.pidLinks, nil
}

// process fills in what a task is. It returns ErrTorn where the task can't be read at all.
func (g *Guest) process(p *Process) error {
	l, s := &g.layout.task, g.space
	r := &reader{s: s}
	p.PID = int64(int32(r.u32(p.Task + l.pid)))
	flags := r.u32(p.Task + l.flags)
	p.State = stateLetter(r.u32(p.Task+l.state), r.u32(p.Task+l.exitState))
	p.StartTime = r.u64(p.Task + l.startTime)
	p.StartSeconds = float64(r.u64(p.Task+l.startBoot)) / 1e9
	p.Kernel = flags&flagKernelThread != 0
	comm := g.scratch[:16]
	r.bytes(p.Task+l.comm, comm)
	p.Comm = event.Text(untilNUL(comm))
	parent := r.u64(p.Task + l.realParent)
	cred := r.u64(p.Task + l.realCred)
	mm := r.u64(p.Task + l.mm)
	if r.err != nil {
		return ErrTorn
	}
	if offset, ok := g.realOffset(); ok {
		p.Start = time.Unix(0, int64(p.StartTime)+offset).UTC()
	} else {
		p.Unknown = append(p.Unknown, "start")
	}
	if ppid, err := s.U32(parent + l.tgid); err == nil {
		p.PPID = int64(int32(ppid))
	} else {
		p.Unknown = append(p.Unknown, "ppid")
	}
	g.credentials(p, cred)
	g.namespaces(p, cred)
	g.cgroup(p)
	if ns, threads, err := g.cpuTime(p.Task); err == nil {
		p.CPUSeconds, p.Threads = float64(ns)/1e9, threads
	} else {
		p.Unknown = append(p.Unknown, "cpu_seconds", "threads")
	}
	if mm != 0 && !p.Kernel {
		g.image(p, mm)
	}
	return nil
}

// stateLetter is the letter that ps and /proc give a task's state.
func stateLetter(state, exit uint32) string {
	if state == stateIdle {
		return "I"
	}
	all := (state | exit) & 0x7f
	if all == 0 {
		return "R"
	}
	const letters = "SDTtXZP" // bit 0 up; the highest set bit decides
	for i := len(letters) - 1; i > 0; i-- {
		if all&(1<<i) != 0 {
			return letters[i : i+1]
		}
	}
	return "S"
}
