package introspect

import (
	"slices"

	"vigia/internal/memory"
)

// A CPU that is held until somebody has looked loses more time waiting for him than he takes. So what a moment consists of can be
// copied by whoever stops the CPU, without understanding it, by a recipe made here from the kernel's types; and be read here later,
// by the same code, from the copy alone.

// Recipe is how to copy what [Guest.CopiedMoment] and [Guest.CopiedOpening] read. Where lies what a climb needs is in Sight.
func (g *Guest) Recipe() ([]memory.Step, error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	l, err := g.momentLayout()
	if err != nil {
		return nil, err
	}
	gl, err := g.glanceLayout()
	if err != nil {
		return nil, err
	}
	const ( // registers
		task uint8 = iota
		parent
		cred
		signal
		mm
		exe
		mnt
		dentry
		argStart
		argEnd
		envEnd
		stack
		walk
	)
	t, c, m, f := &g.layout.task, &g.layout.cred, &g.layout.mm, &g.layout.file
	var b recipe
	b.fields(8, t.startTime, t.realParent, t.realCred, t.mm, t.signal, l.stack, l.nameData)
	b.fields(4, t.pid, t.tgid, t.flags, gl.exitCode)
	b.fields(16, t.comm)
	b.copy(task)
	b.load(parent, task, t.realParent)
	b.fields(4, t.tgid)
	b.copy(parent)
	b.load(cred, task, t.realCred)
	b.fields(4, c.uid, c.euid, c.suid, c.fsuid, c.gid, c.egid, c.sgid, c.fsgid)
	b.copy(cred)
	b.load(signal, task, t.signal)
	b.fields(4, l.live, gl.groupFlag, gl.groupCode)
	b.copy(signal)
	b.load(stack, task, l.stack)
	b.fields(l.regsSize, threadSize-l.regsSize)
	b.copy(stack)
	b.load(mm, task, t.mm)
	b.fields(8, m.pgd, m.exe, m.argStart, m.argEnd, m.envStart, m.envEnd)
	b.copy(mm)
	b.load(exe, mm, m.exe)
	b.path(exe, mnt, dentry, f.mnt, f.dentry, memory.WhenAlways)
	b.fields(8, g.layout.dentry.pprev)
	b.copy(dentry)
	b.load(argStart, mm, m.argStart)
	b.load(argEnd, mm, m.argEnd)
	b.load(envEnd, mm, m.envEnd)
	b.steps = append(b.steps, memory.Step{Op: memory.StepText, Base: argStart, Dst: argEnd, At: uint32(envEnd), Len: maxCmdline})
	b.steps = append(b.steps, memory.Step{Op: memory.StepLoad, Base: task, Dst: walk, When: memory.WhenOpening, At: uint32(l.nameData)})
	b.path(walk, mnt, dentry, l.path, l.path+g.pathDentry(), memory.WhenOpening)
	return b.steps, nil
}

// recipe is one in the making.
type recipe struct {
	steps  []memory.Step
	wanted [][2]uint64 // beginning and end of fields
}

// fields remembers fields of n bytes each, to be copied.
func (b *recipe) fields(n uint64, offsets ...uint64) {
	for _, at := range offsets {
		b.wanted = append(b.wanted, [2]uint64{at, at + n})
	}
}

// nearby is how far apart fields may lie that are copied in one piece: to translate an address takes longer than to copy so much.
const nearby = 192

// copy copies what was remembered from the structure that base points to, in as few pieces as it takes.
func (b *recipe) copy(base uint8) {
	slices.SortFunc(b.wanted, func(x, y [2]uint64) int { return int(int64(x[0] - y[0])) })
	var begin, end uint64
	flush := func() {
		if end > begin {
			b.steps = append(b.steps, memory.Step{Op: memory.StepCopy, Base: base, At: uint32(begin), Len: uint32(end - begin)})
		}
	}
	for i, w := range b.wanted {
		if i > 0 && w[0] <= end+nearby {
			end = max(end, w[1])
			continue
		}
		flush()
		begin, end = w[0], w[1]
	}
	flush()
	b.wanted = nil
}

func (b *recipe) load(dst, base uint8, at uint64) {
	b.steps = append(b.steps, memory.Step{Op: memory.StepLoad, Base: base, Dst: dst, At: uint32(at)})
}

func (b *recipe) path(base, mnt, dentry uint8, mntAt, dentryAt uint64, when uint8) {
	b.steps = append(b.steps,
		memory.Step{Op: memory.StepLoad, Base: base, Dst: mnt, When: when, At: uint32(mntAt)},
		memory.Step{Op: memory.StepLoad, Base: base, Dst: dentry, When: when, At: uint32(dentryAt)},
		memory.Step{Op: memory.StepClimb, Base: mnt, Dst: dentry, When: when})
}

// CopiedMoment is what Moment would have said when the copy was made.
func (g *Guest) CopiedMoment(task uint64, c *memory.Copied) (m Moment, err error) {
	err = g.from(c, func(l *momentLayout) error {
		m = Moment{Process: Process{Task: task}}
		return g.moment(l, &m)
	})
	return m, err
}

// CopiedOpening is what Opening would have said when the copy was made.
func (g *Guest) CopiedOpening(task uint64, c *memory.Copied) (o Opening, err error) {
	err = g.from(c, func(l *momentLayout) error {
		o, err = g.opening(l, task)
		return err
	})
	return o, err
}

// from looks at a copy. Nothing of the guest is read: it may have rebooted since.
func (g *Guest) from(c *memory.Copied, look func(l *momentLayout) error) error {
	g.mu.Lock()
	defer g.mu.Unlock()
	l, err := g.momentLayout()
	if err != nil {
		return err
	}
	if g.space == nil {
		return ErrNotReady
	}
	g.space.From(c)
	g.user.From(c)
	g.copying = true
	defer func() {
		g.copying = false
		g.space.From(nil)
		g.user.From(nil)
	}()
	return look(l)
}
