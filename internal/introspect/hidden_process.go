package introspect

import (
	"fmt"
	"slices"
)

// processes compares the ways in which the kernel keeps its tasks.
func (c *Checker) processes() (Result, error) { return c.compareTasks(nil) }

// taskMemory compares them with the memory that tasks are made of, too, and with what the guest says.
func (c *Checker) taskMemory() (Result, error) {
	said := c.ask()
	more := []func(*Guest) *listing{(*Guest).taskSlabs}
	if said != nil {
		more = append(more, said.listTasks)
	}
	return c.compareTasks(said, more...)
}

func (c *Checker) compareTasks(said *claims, more ...func(*Guest) *listing) (res Result, err error) {
	g := c.guest
	if g.layout.err != nil {
		return res, g.layout.err
	}
	err = g.view(func() error {
		running, idle := g.onCPUs()
		all := []*listing{g.tasksListed(), g.pidTable(), g.cgroupTasks(), running}
		all = append(all, g.familyTree(union(all)))
		for _, f := range more {
			all = append(all, f(g))
		}
		tasks := slices.DeleteFunc(union(all), func(t uint64) bool { return idle[t] })
		threads := g.threadLists(tasks)
		all = append(all, threads)
		tasks = slices.DeleteFunc(union(all), func(t uint64) bool { return idle[t] })
		res = Result{}
		for _, l := range all {
			res.Views = append(res.Views, l.view())
			res.Findings = append(res.Findings, l.brokenLists()...)
		}
		for _, t := range tasks {
			if f, hidden := g.hiddenTask(t, all, said); hidden {
				res.Findings = append(res.Findings, f)
			}
			if f, disguised := g.disguised(t); disguised {
				res.Findings = append(res.Findings, f)
			}
			if g.meter.left <= 0 {
				return ErrEndless
			}
		}
		return nil
	})
	return res, err
}

// hiddenTask reports whether a task that is fully there is missing from a view that should have it.
func (g *Guest) hiddenTask(task uint64, all []*listing, said *claims) (Finding, bool) {
	t, err := g.taskFacts(task)
	if err != nil || t.passing {
		return Finding{}, false
	}
	listed, missing := compare(task, all, func(name string) bool {
		switch name {
		case viewTasks, viewTree:
			return t.leader == task
		case viewCgroups:
			return !t.exiting
		case viewPids, viewThreads:
			return true
		case viewGuest:
			return !t.exiting && said.knew(g, task)
		}
		return false
	})
	if len(missing) == 0 {
		return Finding{}, false
	}
	p := Process{Task: task}
	if g.process(&p) != nil {
		return Finding{}, false
	}
	f := Finding{Kind: KindProcessHidden, Severity: Critical, Subject: nameTask(p.Comm, p.PID), Process: &p, Listed: listed, Missing: missing,
		Key:      fmt.Sprintf("%x %x", task, p.StartTime),
		Evidence: []Evidence{{Address: task, Note: "task_struct"}}}
	what := "process"
	if t.leader != task {
		f.Kind, what = KindThreadHidden, "thread"
	}
	f.Detail = fmt.Sprintf("the %s is missing from %s; found by %s", what, words(missing), words(listed))
	return f, true
}

// kthreaddPID is the process that makes all kernel threads.
const kthreaddPID = 2

// disguised reports whether a task says that it is a kernel thread, which tools show apart and leave alone, and is not a
// child of the process that makes all of them.
func (g *Guest) disguised(task uint64) (Finding, bool) {
	l := &g.layout.task
	r := reader{s: g.space}
	flags, pid, parent := r.u32(task+l.flags), r.u32(task+l.pid), r.u64(task+l.realParent)
	if r.err != nil || flags&flagKernelThread == 0 || pid == kthreaddPID || r.u32(parent+l.pid) == kthreaddPID || r.err != nil {
		return Finding{}, false
	}
	t, err := g.taskFacts(task)
	p := Process{Task: task}
	if err != nil || t.passing || t.exiting || g.process(&p) != nil {
		return Finding{}, false
	}
	return Finding{Kind: KindDisguised, Severity: High, Subject: nameTask(p.Comm, p.PID), Process: &p, Key: fmt.Sprintf("%x %x", task, p.StartTime),
		Detail:   "the process says that it is a kernel thread, and kthreadd did not make it",
		Evidence: []Evidence{{Address: task + l.flags, Note: "task_struct.flags"}}}, true
}

// taskFacts are what decides where a task should be listed.
type taskFacts struct {
	leader  uint64 // of its thread group
	passing bool   // being made, being taken apart, or gone
	exiting bool
}

const flagExiting = 0x00000004

func (g *Guest) taskFacts(task uint64) (f taskFacts, err error) {
	l, v := &g.layout.task, g.taskViewLayout()
	r := reader{s: g.space}
	state, exit, flags := r.u32(task+l.state), r.u32(task+l.exitState), r.u32(task+l.flags)
	signal := r.u64(task + l.signal)
	f.leader = r.u64(task + v.leader)
	f.passing = state&(taskNew|taskDead) != 0 || exit&exitDead != 0 || signal == 0
	if v.usage != noField {
		f.passing = f.passing || r.u32(task+v.usage) == 0
	}
	if v.stack != noField {
		// A zombie's stack is freed while it waits to be reaped.
		f.passing = f.passing || r.u64(task+v.stack) == 0 && exit == 0
	}
	f.exiting = flags&flagExiting != 0 || exit != 0
	return f, r.err
}
