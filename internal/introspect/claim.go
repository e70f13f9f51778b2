package introspect

import "fmt"

// viewGuest is what the guest says when it is asked. A rootkit that hooks the listing of directories leaves every list in
// the kernel whole; what it hides is missing here.
const viewGuest = "guest"

// claims is what a guest said, and of whom it should have said something: what was there before it was asked.
type claims struct {
	pids    map[int64]bool
	modules map[string]bool
	tasks   map[taskKey]bool
	loaded  map[uint64]bool
	err     error
}

// minClaimed is the share of what is there that an answer must name to be an answer.
const minClaimed = 0.5

// ask has the guest list its processes and modules. nil where there is nobody to ask.
func (c *Checker) ask() *claims {
	if c.inside == nil {
		return nil
	}
	a := &claims{pids: map[int64]bool{}, modules: map[string]bool{}, tasks: map[taskKey]bool{}, loaded: map[uint64]bool{}}
	if a.err = c.guest.view(func() error { return a.before(c.guest) }); a.err != nil {
		return a
	}
	pids, modules, err := c.inside.Listing()
	for _, pid := range pids {
		a.pids[pid] = true
	}
	for _, name := range modules {
		a.modules[name] = true
	}
	if a.err = err; err == nil && float64(len(a.pids)) < minClaimed*float64(len(a.tasks)) {
		a.err = fmt.Errorf("the guest lists %d processes of %d", len(a.pids), len(a.tasks))
	}
	return a
}

// before notes what is there, by any of the kernel's lists.
func (a *claims) before(g *Guest) error {
	clear(a.tasks)
	for _, task := range union([]*listing{g.tasksListed(), g.pidTable()}) {
		f, err := g.taskFacts(task)
		start, err2 := g.space.U64(task + g.layout.task.startTime)
		if err == nil && err2 == nil && f.leader == task && !f.passing && !f.exiting {
			a.tasks[taskKey{task, start}] = true
		}
	}
	m, err := g.moduleLayout()
	if err != nil {
		return err
	}
	clear(a.loaded)
	for _, at := range union([]*listing{g.modulesListed(m), g.moduleObjects(), g.moduleTree()}) {
		if state, err := g.space.U32(at + m.state); err == nil && state == moduleLive {
			a.loaded[at] = true
		}
	}
	return nil
}

// listTasks makes a view of the guest's answer: the tasks whose pids it named.
func (a *claims) listTasks(g *Guest) *listing {
	l := newListing(viewGuest)
	if a.err != nil {
		return l.unknown(a.err)
	}
	for k := range a.tasks {
		if pid, err := g.space.U32(k.task + g.layout.task.pid); err == nil && a.pids[int64(int32(pid))] {
			l.at[k.task] = true
		}
	}
	return l
}

// knew reports whether a process was there before the guest was asked, and is still.
func (a *claims) knew(g *Guest, task uint64) bool {
	start, err := g.space.U64(task + g.layout.task.startTime)
	return a != nil && err == nil && a.tasks[taskKey{task, start}]
}

// listModules makes a view of the modules that it named.
func (a *claims) listModules(g *Guest, m *moduleLayout) *listing {
	l := newListing(viewGuest)
	if a.err != nil {
		return l.unknown(a.err)
	}
	var name [64]byte
	for at := range a.loaded {
		if g.space.Read(at+m.name, name[:m.nameSize]) == nil && a.modules[string(untilNUL(name[:m.nameSize]))] {
			l.at[at] = true
		}
	}
	return l
}
