package introspect

import "fmt"

// taskKey names a task uniquely over samples.
type taskKey struct{ task, start uint64 }

// credHistory is what the last round knew of a task: who it was, and whether it was raised since.
type credHistory struct {
	id identity
	// settled: the sample before had called exec as often. A call of exec counts itself first and changes credentials then: who
	// was looked at in between looks like somebody who becomes root without one.
	settled bool
	before  identity // where it was raised: who it was before
	how     string
}

// credentials looks at who each task is: at what can't be at one moment, and at what can't have come to be since the last
// round.
func (c *Checker) credentials() (res Result, err error) {
	g := c.guest
	l := g.credLayout()
	if l.err != nil {
		return res, l.err
	}
	err = g.view(func() error {
		tasks, err := g.livingTasks()
		if err != nil {
			return err
		}
		res = Result{Views: []View{{Name: "credentials", Count: len(tasks)}}}
		now := make(map[taskKey]credHistory, len(tasks))
		j := credJudge{Guest: g, users: map[uint64]uint64{}, told: map[string]bool{}}
		for _, task := range tasks {
			k := taskKey{task: task}
			if k.start, err = g.space.U64(task + g.layout.task.startTime); err != nil {
				continue
			}
			id, err := g.identityOf(task)
			if err != nil {
				if was, known := c.history[k]; known {
					now[k] = was
				}
				continue
			}
			if was := c.history[k]; was.settled && id.exec == was.id.exec+1 && id.root() && !was.id.mayBecomeRoot() {
				id.plain = g.plainProgram(task, &id)
			}
			h := c.history[k].next(id)
			now[k] = h
			res.Findings = append(res.Findings, j.judge(task, h)...)
		}
		c.history = now
		return nil
	})
	return res, err
}

// next is what is known of a task after another sample. What was raised stays so while it has what it was not given.
func (h credHistory) next(id identity) credHistory {
	n := credHistory{id: id, settled: h.id.at != 0 && h.id.exec == id.exec}
	switch {
	case h.how != "":
		h.before.exec, h.before.ns = id.exec, id.ns
		if _, still := id.raisedFrom(&h.before); still {
			n.before, n.how = h.before, h.how
		}
	case h.settled:
		if how, raised := id.raisedFrom(&h.id); raised {
			n.before, n.how = h.id, how
		}
	}
	return n
}

// livingTasks is every thread that the table of pids knows.
func (g *Guest) livingTasks() ([]uint64, error) {
	pids := g.pidTable()
	if !pids.known {
		pids = g.tasksListed()
	}
	var tasks []uint64
	for _, task := range union([]*listing{pids}) {
		if f, err := g.taskFacts(task); err == nil && !f.passing && !f.exiting {
			tasks = append(tasks, task)
		}
	}
	if g.meter.left <= 0 {
		return nil, ErrEndless
	}
	return tasks, nil
}

// credJudge judges tasks one after the other.
type credJudge struct {
	*Guest
	users map[uint64]uint64 // by struct cred: the group of the first process that has it
	told  map[string]bool   // what was found already: threads share what their process is
}

// judge says what is wrong with one task's credentials.
func (j *credJudge) judge(task uint64, h credHistory) (found []Finding) {
	l, id := j.credLayout(), &h.id
	add := func(kind, format string, v ...any) {
		if f, ok := j.finding(kind, task, id.at, fmt.Sprintf(format, v...)); ok {
			found = append(found, f)
		}
	}
	if h.how != "" {
		add(KindCredRaised, "the process %s; no system call does that", h.how)
	}
	if id.effective&^id.permitted != 0 {
		add(KindCredCaps, "the process uses capabilities that it is not permitted: %#x", id.effective&^id.permitted)
	}
	if uid, err := j.space.U32(id.user + l.userUID); err == nil && uid != id.uid {
		add(KindCredUser, "the process has the user id %d, and the account of user %d: its id was written over", id.uid, uid)
	}
	r := reader{s: j.space}
	group, flags := r.u64(task+j.layout.task.signal), r.u32(task+j.layout.task.flags)
	if r.err != nil || flags&flagKernelThread != 0 {
		return found
	}
	first, known := j.users[id.at]
	if !known {
		j.users[id.at] = group
	}
	if id.at == l.initCred+j.boot.Slide {
		add(KindCredShared, "the process has the kernel's own first credentials")
	} else if known && first != group {
		add(KindCredShared, "the process shares its credentials with another, which no system call does")
	}
	return found
}

// finding is one about a task's process; ok is false where it was given already, for another of its threads.
func (j *credJudge) finding(kind string, task, cred uint64, detail string) (f Finding, ok bool) {
	facts, err := j.taskFacts(task)
	p := Process{Task: facts.leader}
	if err != nil || j.process(&p) != nil {
		return f, false
	}
	key := fmt.Sprintf("%x %x %x", p.Task, p.StartTime, cred)
	if j.told[kind+key] {
		return f, false
	}
	j.told[kind+key] = true
	return Finding{Kind: kind, Severity: Critical, Subject: nameTask(p.Comm, p.PID), Process: &p, Detail: detail, Key: key,
		Evidence: []Evidence{{Address: cred, Note: "struct cred"}, {Address: task, Note: "task_struct"}}}, true
}

// credentialMemory finds credentials that do not lie in the memory that the kernel makes them of.
func (c *Checker) credentialMemory() (res Result, err error) {
	g := c.guest
	l, s := g.credLayout(), g.slabLayout()
	if l.err != nil {
		return res, l.err
	}
	if s.err != nil {
		return res, s.err
	}
	err = g.view(func() error {
		tasks, err := g.livingTasks()
		if err != nil {
			return err
		}
		jar, err := g.space.U64(s.credCache + g.boot.Slide)
		if err != nil {
			return err
		}
		res = Result{Views: []View{{Name: "credential slabs", Count: len(tasks)}}}
		j := credJudge{Guest: g, told: map[string]bool{}}
		for _, task := range tasks {
			id, err := g.identityOf(task)
			if err != nil || id.at == l.initCred+g.boot.Slide {
				continue
			}
			cache, err := g.slabOf(id.at)
			if err == nil && cache == jar {
				continue
			}
			if f, ok := j.finding(KindCredForeign, task, id.at, "the process has credentials that the kernel did not make"); ok {
				res.Findings = append(res.Findings, f)
			}
		}
		return nil
	})
	return res, err
}
