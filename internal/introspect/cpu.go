package introspect

// TaskTime is how much CPU time a process has used. Two samples of the same Task and StartTime are the same process.
type TaskTime struct {
	Task      uint64 // address of the leader's task_struct
	StartTime uint64 // monotonic nanoseconds
	PID       int64
	CPU       uint64 // nanoseconds, of all threads, the ended ones too
	Kernel    bool   // a kernel thread
	comm      [16]byte
}

// Comm returns the name, as the guest has it: up to 15 bytes, unprinted.
func (t *TaskTime) Comm() []byte { return untilNUL(t.comm[:]) }

// CPU appends the CPU time of every process to list, and returns it. Passing the last sample's memory back
// (list[:0]) it does not allocate. A process whose threads changed under every attempt is left out of this sample.
func (g *Guest) CPU(list []TaskTime) ([]TaskTime, error) {
	keep := len(list)
	err := g.view(func() error {
		list = list[:keep]
		return g.leaders(func(task uint64) error {
			list = append(list, TaskTime{Task: task}) // filled in place: it does not escape
			if g.taskTime(&list[len(list)-1]) != nil {
				list = list[:len(list)-1]
			}
			return nil
		})
	})
	if err != nil {
		list = list[:keep]
	}
	return list, err
}

func (g *Guest) taskTime(t *TaskTime) error {
	l := &g.layout.task
	r := reader{s: g.space}
	t.PID = int64(int32(r.u32(t.Task + l.pid)))
	t.StartTime = r.u64(t.Task + l.startTime)
	t.Kernel = r.u32(t.Task+l.flags)&flagKernelThread != 0
	r.bytes(t.Task+l.comm, t.comm[:])
	if r.err != nil {
		return r.err
	}
	var err error
	t.CPU, _, err = g.cpuTime(t.Task)
	return err
}

// cpuTime adds up what the ended threads of a process have used and what each living one has. A thread that ends moves
// from one to the other under a sequence lock, which tells whether that happened meanwhile.
func (g *Guest) cpuTime(task uint64) (ns uint64, threads int, err error) {
	signal, err := g.space.U64(task + g.layout.task.signal)
	if err != nil {
		return 0, 0, err
	}
	if signal == 0 {
		return 0, 0, ErrTorn
	}
	whole := false
	err = steady(func() error {
		before := g.sequence(signal, g.space.U64)
		ns, threads, err = g.sumThreads(signal)
		whole = err == nil
		if whole && (before&1 != 0 || g.sequence(signal, g.space.Fresh) != before) {
			return g.torn()
		}
		return err
	})
	// A virtual CPU that its host has put aside while it holds the lock (mostly to reap a child, which changes nothing
	// here) keeps it for milliseconds. The list was whole: its sum is better than none.
	if whole {
		err = nil
	}
	return ns, threads, err
}

// sequence is read fresh the second time: it then says of all that was read since the first, kept or not, that it is of one moment.
func (g *Guest) sequence(signal uint64, read func(uint64) (uint64, error)) uint32 {
	if g.layout.signal.sequence == noField {
		return 0
	}
	v, _ := read(signal + g.layout.signal.sequence)
	return uint32(v)
}

func (g *Guest) sumThreads(signal uint64) (ns uint64, threads int, err error) {
	l := g.layout
	if ns, err = g.space.U64(signal + l.signal.sumRuntime); err != nil {
		return 0, 0, err
	}
	err = g.walk(signal+l.signal.threads, func(node uint64) error {
		used, err := g.space.U64(node - l.task.threadNode + l.task.sumExec)
		ns += used
		threads++
		return err
	})
	return ns, threads, err
}
