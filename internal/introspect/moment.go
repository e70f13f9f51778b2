package introspect

import (
	"errors"

	"vigia/internal/event"
	"vigia/internal/kernel"
)

// Moment is what a virtual CPU does at an instant: which process runs on it, and in which system call. It is for a CPU that
// is held: of one that runs on it tells nothing that belongs together.
type Moment struct {
	Process
	Thread bool   // it is not the first of its process's threads
	Last   bool   // no thread of the process lives on: where it ends, the process ends
	Exit   uint32 // the wait status, once it ends
	Call   Call
}

// Call is a system call as its registers were at the way in. A kernel thread is in none, and Number means nothing then.
type Call struct {
	Number int64
	Args   [6]uint64
	Result int64 // at the way out
}

// Opening is a file that is being opened.
type Opening struct {
	Path  string
	Write bool
	Known bool // Write is
}

// Sight is where those outside the guest find what they must find without help: which task runs on a CPU, and the name of
// the file that it opens.
type Sight struct {
	Slide                 uint64
	Current               []uint64 // by CPU, the address of the pointer to its task
	TGID, NameData        uint64   // in a task
	Dentry                uint64   // in what NameData points to
	Parent, Name, NameLen uint64   // in a dentry
	Mount, Above, Point   uint64   // in a struct mount: its vfsmount, the mount that it is on, and where
	Root                  uint64   // in a vfsmount
}

var (
	errNotOpening = errors.New("no file is being opened")
	errNoSocket   = errors.New("no socket is known")
)

// momentLayout is where the fields lie that only moments use.
type momentLayout struct {
	perCPU, current uint64 // link address of the table of areas; offset in an area
	live, stack     uint64
	nameData, path  uint64
	regsSize        uint64
	ax, orig        uint64
	args            [6]uint64
}

// threadSize is the size of a kernel stack on x86-64 (THREAD_SIZE), and what the call's registers lie below the top of.
const threadSize = 16384

func (g *Guest) momentLayout() (*momentLayout, error) {
	if g.moments != nil {
		return g.moments, nil
	}
	r, l := &resolver{p: g.profile}, &momentLayout{}
	l.perCPU = r.symbol("__per_cpu_offset")
	var err error
	if l.current, err = g.profile.Symbol("current_task"); err != nil { // 6.2 to 6.14 have it among other things
		l.current = r.symbol("pcpu_hot") + r.field("pcpu_hot", "current_task")
	}
	l.live, l.stack = r.field("signal_struct", "live"), r.field("task_struct", "stack")
	l.nameData, l.path = r.field("task_struct", "nameidata"), r.field("nameidata", "path")
	l.regsSize, err = g.profile.Size("pt_regs")
	if r.err == nil {
		r.err = err
	}
	l.ax, l.orig = r.field("pt_regs", "ax"), r.field("pt_regs", "orig_ax")
	for i, name := range [...]string{"di", "si", "dx", "r10", "r8", "r9"} {
		l.args[i] = r.field("pt_regs", name)
	}
	if r.err != nil {
		return nil, r.err
	}
	if !g.profile.PerCPU(l.current) {
		return nil, &kernel.MissingError{What: "symbol", Name: "current_task among the per-CPU ones"}
	}
	g.moments = l
	g.profile.Trim()
	return l, nil
}

// Sight returns what is needed to see without a Guest, for so many CPUs.
func (g *Guest) Sight(cpus int) (Sight, error) {
	var s Sight
	err := g.view(func() error {
		l, err := g.momentLayout()
		if err != nil {
			return err
		}
		s = Sight{Slide: g.boot.Slide, TGID: g.layout.task.tgid, NameData: l.nameData, Dentry: l.path + g.pathDentry(),
			Parent: g.layout.dentry.parent, Name: g.layout.dentry.name, NameLen: g.layout.dentry.nameLen,
			Mount: g.layout.mount.mnt, Above: g.layout.mount.parent, Point: g.layout.mount.mountpoint, Root: g.layout.mount.root}
		for cpu := range cpus {
			area, err := g.space.U64(l.perCPU + g.boot.Slide + 8*uint64(cpu))
			if err != nil {
				return err
			}
			s.Current = append(s.Current, area+l.current)
		}
		return nil
	})
	return s, err
}

// pathDentry is where a struct path has its dentry, by that of a file's.
func (g *Guest) pathDentry() uint64 { return g.layout.file.dentry - g.layout.file.mnt }

// Moment looks at a CPU that is held.
func (g *Guest) Moment(cpu int) (Moment, error) {
	var m Moment
	err := g.at(cpu, func(l *momentLayout, task uint64) error {
		m = Moment{Process: Process{Task: task}}
		return g.moment(l, &m)
	})
	if err != nil {
		return Moment{}, err
	}
	return m, nil
}

// at runs a view of the task on a CPU. What is held does not change: there is nothing to read again.
func (g *Guest) at(cpu int, look func(l *momentLayout, task uint64) error) error {
	var failed error
	err := g.view(func() error {
		l, err := g.momentLayout()
		if err != nil {
			return err
		}
		if cpu < 0 || cpu >= maxCPUs {
			return ErrTorn
		}
		r := reader{s: g.space}
		task := r.u64(r.u64(l.perCPU+g.boot.Slide+8*uint64(cpu)) + l.current)
		if r.err != nil {
			failed = r.err
		} else {
			failed = look(l, task)
		}
		return nil
	})
	return errors.Join(err, failed)
}

func (g *Guest) moment(l *momentLayout, m *Moment) error {
	t := &g.layout.task
	r := reader{s: g.space}
	tid := r.u32(m.Task + t.pid)
	m.PID = int64(int32(r.u32(m.Task + t.tgid)))
	m.Thread = int64(int32(tid)) != m.PID
	m.Kernel = r.u32(m.Task+t.flags)&flagKernelThread != 0
	m.StartTime = r.u64(m.Task + t.startTime)
	m.PPID = int64(int32(r.u32(r.u64(m.Task+t.realParent) + t.tgid)))
	comm := g.scratch[:16]
	r.bytes(m.Task+t.comm, comm)
	m.Comm = event.Text(untilNUL(comm))
	cred, mm, signal := r.u64(m.Task+t.realCred), r.u64(m.Task+t.mm), r.u64(m.Task+t.signal)
	m.Last = int32(r.u32(signal+l.live)) <= 0
	if r.err != nil {
		return r.err
	}
	g.credentials(&m.Process, cred)
	if mm != 0 && !m.Kernel {
		g.image(&m.Process, mm)
	}
	gl, err := g.glanceLayout()
	if err != nil {
		return err
	}
	if m.Exit = r.u32(m.Task + gl.exitCode); r.u32(signal+gl.groupFlag)&groupExit != 0 {
		m.Exit = r.u32(signal + gl.groupCode)
	}
	m.Call = g.call(l, m.Task)
	return r.err
}

// call reads the registers that a task left on its kernel stack's top at its way into the kernel.
func (g *Guest) call(l *momentLayout, task uint64) (c Call) {
	r := reader{s: g.space}
	regs := r.u64(task+l.stack) + threadSize - l.regsSize
	c.Number, c.Result = int64(r.u64(regs+l.orig)), int64(r.u64(regs+l.ax))
	for i, at := range l.args {
		c.Args[i] = r.u64(regs + at)
	}
	if r.err != nil {
		return Call{Number: -1}
	}
	return c
}

// Numbers of system calls (arch/x86/entry/syscalls/syscall_64.tbl), and the flags that open for writing.
const (
	callOpen   = 2
	callCreat  = 85
	callOpenat = 257
	openAccess = 3
)

// Opening says which file the task on a CPU is opening, by the kernel's own walk, which has come to its end.
func (g *Guest) Opening(cpu int) (o Opening, err error) {
	err = g.at(cpu, func(l *momentLayout, task uint64) (err error) {
		o, err = g.opening(l, task)
		return err
	})
	return o, err
}

func (g *Guest) opening(l *momentLayout, task uint64) (o Opening, err error) {
	r := reader{s: g.space}
	data := r.u64(task + l.nameData)
	if r.err != nil || data == 0 {
		return o, errNotOpening
	}
	mnt, dentry := r.u64(data+l.path), r.u64(data+l.path+g.pathDentry())
	if r.err != nil || mnt == 0 || dentry == 0 {
		return o, errNotOpening
	}
	path, err := g.climb(g.scratch[:maxPath], mnt, dentry)
	if err != nil {
		return o, err
	}
	o.Path = event.Text(path)
	switch c := g.call(l, task); c.Number {
	case callOpen:
		o.Known, o.Write = true, c.Args[1]&openAccess != 0
	case callOpenat:
		o.Known, o.Write = true, c.Args[2]&openAccess != 0
	case callCreat:
		o.Known, o.Write = true, true
	}
	return o, nil
}

// Numbers of system calls that name a socket by its descriptor first.
const (
	callConnect = 42
	callListen  = 50
	callSendto  = 44 // with TCP Fast Open it connects
	callSendmsg = 46
)

// Connection says which socket the call on a CPU is about. Of io_uring's requests it can't be told.
func (g *Guest) Connection(cpu int) (s Socket, err error) {
	err = g.at(cpu, func(l *momentLayout, task uint64) (err error) {
		s, err = g.connection(l, task)
		return err
	})
	return s, err
}

func (g *Guest) connection(l *momentLayout, task uint64) (Socket, error) {
	c := g.call(l, task)
	switch c.Number {
	case callConnect, callListen, callSendto, callSendmsg:
	default:
		return Socket{}, errNoSocket
	}
	fl, err := g.fileLayout()
	if err != nil {
		return Socket{}, err
	}
	sl, err := g.socketLayout()
	if err != nil {
		return Socket{}, err
	}
	r := reader{s: g.space}
	table := r.u64(r.u64(task+fl.files) + fl.table)
	fd := c.Args[0]
	if fd > maxFDs || fd >= uint64(r.u32(table+fl.maxFDs)) || r.err != nil {
		return Socket{}, errNoSocket
	}
	s, ok := g.heldSocket(sl, openFile{file: r.u64(r.u64(table+fl.fds) + 8*fd), fd: int(fd)})
	if !ok || r.err != nil {
		return Socket{}, errNoSocket
	}
	g.describe(sl, &s, true)
	return s, nil
}

// Coming returns the newest module that is on its way in: its code is there, and has not yet run.
func (g *Guest) Coming() (Module, error) {
	list, err := g.Modules()
	if err != nil {
		return Module{}, err
	}
	for _, m := range list {
		if m.State == "coming" {
			return m, nil
		}
	}
	return Module{}, ErrTorn
}
