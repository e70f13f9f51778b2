package introspect

import (
	"slices"
	"strings"
	"testing"
	"time"

	"vigia/internal/kernel"
)

// TestHealthy: a guest that nobody tampered with gives no finding, and every view was read.
func TestHealthy(t *testing.T) {
	onGuests(t, func(t *testing.T, mem Physical, p *kernel.Profile) {
		c := quick(attach(t, mem, p))
		for range 2 {
			r, err := c.Run(true)
			if err != nil || len(r.Findings) > 0 {
				t.Fatalf("%+v, %v", r.Findings, err)
			}
			count := map[string]int{}
			for _, v := range r.Views {
				if v.Unknown != "" || v.Count == 0 && !slices.Contains([]string{viewRunning, viewHeld, viewTables}, v.Name) {
					t.Errorf("%+v", v)
				}
				count[v.Name] = v.Count
			}
			if count[viewPids] != count[viewThreads] || count[viewPids] != count[viewCgroups] || count[viewTasks] != count[viewTree] ||
				count[viewSlab] < count[viewPids] || count[viewModules] != count[viewMemory] || count[viewModules] != count[viewSysfs] {
				t.Errorf("views of a quiet guest differ: %v", count)
			}
		}
	})
}

// TestHiddenProcess takes a process off each of the kernel's lists in turn, and off all that rootkits know of.
func TestHiddenProcess(t *testing.T) {
	onGuests(t, func(t *testing.T, mem Physical, p *kernel.Profile) {
		i := enter(t, mem, p)
		v := i.taskViewLayout()
		victim := i.task("gone", 0)
		at := victim.Task
		pid := i.get(at + i.layout.task.threadPid)
		off := map[string]func(){
			viewTasks:   func() { i.unlink(at + i.layout.task.tasks) },
			viewPids:    func() { i.put(i.slot(pid), 0) },
			viewTree:    func() { i.unlink(at + v.sibling) },
			viewCgroups: func() { i.unlink(at + v.cgroupLink) },
			viewThreads: func() { i.unlink(at + i.layout.task.threadNode) },
		}
		all := func() {
			for _, f := range off {
				f()
			}
		}
		runs := func() { i.put(i.cpuBases(v)[0]+v.runqueues+v.current, at) }
		every := []string{viewTasks, viewPids, viewTree, viewCgroups, viewThreads}
		cases := []struct {
			name    string
			full    bool
			do      func()
			missing []string
			by      string
		}{
			{"pid without its task", false, func() { i.put(pid+i.layout.pid.tasks, 0) }, []string{viewPids}, viewTasks},
			{"another number in its pid", false, func() { i.put32(pid+v.numbers, 31999) }, []string{viewPids}, viewTasks},
			{"another pid in the task", false, func() { i.put32(at+i.layout.task.pid, 31999) }, []string{viewPids}, viewTasks},
			{"another slot", false, func() { i.moveSlot(pid) }, []string{viewPids}, viewTasks},
			{"all lists", true, all, every, viewSlab},
			{"all lists, and it runs", false, func() { all(); runs() }, every, viewRunning},
			{"all lists but cgroups", false, func() {
				for _, name := range []string{viewTasks, viewPids, viewTree, viewThreads} {
					off[name]()
				}
			}, []string{viewTasks, viewPids, viewTree, viewThreads}, viewCgroups},
		}
		for name, f := range off {
			cases = append(cases, struct {
				name    string
				full    bool
				do      func()
				missing []string
				by      string
			}{name, false, f, []string{name}, ""})
		}
		for _, c := range cases {
			undo := i.change(c.do)
			found := round(t, quick(i.Guest), c.full)
			if len(found) != 1 || found[0].Kind != KindProcessHidden || found[0].Process == nil || found[0].Process.Task != at || !sameNames(found[0].Missing, c.missing) {
				t.Errorf("%s: %+v", c.name, found)
				undo()
				continue
			}
			f := found[0]
			if f.Subject != nameTask(victim.Comm, f.Process.PID) || f.Severity != Critical || f.Process.Exe != victim.Exe || f.Evidence[0].Address != at {
				t.Errorf("%s: %+v", c.name, f)
			}
			if c.by != "" && !slices.Contains(f.Listed, c.by) || !strings.Contains(f.Detail, words(c.missing[:1])) {
				t.Errorf("%s: listed by %v: %s", c.name, f.Listed, f.Detail)
			}
			undo()
		}
		if found := round(t, quick(i.Guest), true); len(found) > 0 {
			t.Errorf("all undone: %+v", found)
		}
	})
}

// moveSlot puts a pid into an empty slot beside its own.
func (i *intruder) moveSlot(pid uint64) {
	i.t.Helper()
	slot := i.slot(pid)
	first := slot - uint64(i.get(pid+i.taskViewLayout().numbers)%64)*8
	for at := first; at < first+64*8; at += 8 {
		if i.get(at) == 0 {
			i.put(at, pid)
			i.put(slot, 0)
			return
		}
	}
	i.t.Skip("no empty slot")
}

func sameNames(a, b []string) bool {
	a, b = slices.Clone(a), slices.Clone(b)
	slices.Sort(a)
	slices.Sort(b)
	return slices.Equal(a, b)
}

// TestHiddenThread takes a thread off its group's list, and from the table of pids.
func TestHiddenThread(t *testing.T) {
	onGuests(t, func(t *testing.T, mem Physical, p *kernel.Profile) {
		i := enter(t, mem, p)
		leader := i.task("scene", 0)
		threads := i.threadsOf(nil, leader.Task)
		if len(threads) < 3 {
			t.Fatalf("%d threads", len(threads))
		}
		at := threads[len(threads)-1]
		for name, f := range map[string]func(){
			viewThreads: func() { i.unlink(at + i.layout.task.threadNode) },
			viewPids:    func() { i.put(i.slot(i.get(at+i.layout.task.threadPid)), 0) },
		} {
			undo := i.change(f)
			found := round(t, quick(i.Guest), false)
			if len(found) != 1 || found[0].Kind != KindThreadHidden || !sameNames(found[0].Missing, []string{name}) || found[0].Evidence[0].Address != at {
				t.Errorf("%s: %+v", name, found)
			}
			undo()
		}
	})
}

// TestDisguised lets a process say that it is a kernel thread.
func TestDisguised(t *testing.T) {
	onGuests(t, func(t *testing.T, mem Physical, p *kernel.Profile) {
		i := enter(t, mem, p)
		victim := i.task("gone", 0)
		at := victim.Task + i.layout.task.flags
		defer i.change(func() { i.put32(at, uint32(i.get(at))|flagKernelThread) })()
		found := round(t, quick(i.Guest), false)
		if len(found) != 1 || found[0].Kind != KindDisguised || found[0].Process.PID != victim.PID {
			t.Errorf("%+v", found)
		}
	})
}

// TestBrokenList: who unlinks without care leaves a list that differs forwards and backwards, and the process is found.
func TestBrokenList(t *testing.T) {
	onGuests(t, func(t *testing.T, mem Physical, p *kernel.Profile) {
		i := enter(t, mem, p)
		victim := i.task("gone", 0)
		node := victim.Task + i.layout.task.tasks
		defer i.change(func() { i.put(i.get(node+8), i.get(node)) })()
		found := round(t, quick(i.Guest), false)
		if len(found) != 2 || found[0].Kind != KindProcessHidden || found[0].Process.PID != victim.PID || found[1].Kind != KindListBroken || found[1].Subject != viewTasks {
			t.Errorf("%+v", found)
		}
	})
}

// TestPassing puts a process into the states in which a kernel has it on some lists and not on others: no finding.
func TestPassing(t *testing.T) {
	onGuests(t, func(t *testing.T, mem Physical, p *kernel.Profile) {
		i := enter(t, mem, p)
		v, l := i.taskViewLayout(), &i.layout.task
		at := i.task("gone", 0).Task
		for name, state := range map[string]func(){
			"being made":     func() { i.put32(at+l.state, taskNew) },
			"being reaped":   func() { i.put32(at+l.exitState, exitDead) },
			"dead":           func() { i.put32(at+l.state, taskDead) },
			"no longer used": func() { i.put32(at+v.usage, 0) },
		} {
			undo := i.change(func() {
				state()
				i.unlink(at + l.tasks)
				i.unlink(at + v.sibling)
				i.unlink(at + v.cgroupLink)
			})
			if found := round(t, quick(i.Guest), true); len(found) > 0 {
				t.Errorf("%s: %+v", name, found)
			}
			undo()
		}
	})
}

// TestPersistence: what the second sample does not show is not given; what lasts is given, and told once until it is gone.
func TestPersistence(t *testing.T) {
	r, p := load(t, checkRecordings[0])
	i := enter(t, r, p)
	at := i.task("gone", 0).Task
	undo := func() {}
	hide := func() { undo = i.change(func() { i.unlink(at + i.layout.task.tasks) }) }
	c := quick(i.Guest)
	var told Changes
	tell := func() int {
		t.Helper()
		rep, err := c.Run(false)
		if err != nil {
			t.Fatal(err)
		}
		return len(told.New(rep))
	}
	hide()
	c.sleep = func(d time.Duration) { undo() }
	if n := tell(); n != 0 {
		t.Errorf("a finding that passed was told %d times", n)
	}
	c.sleep = func(time.Duration) {}
	hide()
	if a, b := tell(), tell(); a != 1 || b != 0 {
		t.Errorf("told %d and %d times", a, b)
	}
	undo()
	if n := tell(); n != 0 {
		t.Errorf("gone: told %d times", n)
	}
	hide()
	if n := tell(); n != 1 {
		t.Errorf("it returned: told %d times", n)
	}
	// Both rounds find it: it is told once, also where they take turns.
	for _, full := range []bool{true, false, true, false} {
		rep, err := c.Run(full)
		if err != nil {
			t.Fatal(err)
		}
		if n := len(told.New(rep)); n != 0 {
			t.Errorf("full %v: told again", full)
		}
	}
}

// TestHiddenModule takes a module off each of the kernel's lists in turn, off all, and lets it say that it is not formed.
func TestHiddenModule(t *testing.T) {
	onGuests(t, func(t *testing.T, mem Physical, p *kernel.Profile) {
		i := enter(t, mem, p)
		m, err := i.moduleLayout()
		if err != nil {
			t.Fatal(err)
		}
		list, err := i.Modules()
		if err != nil || len(list) < 3 {
			t.Fatal(len(list), err)
		}
		v := i.moduleViewLayout()
		var at uint64
		for module := range i.modulesListed(m).at {
			if i.get(module+m.areas[0].base) == list[1].Address {
				at = module
			}
		}
		off := map[string]func(){
			viewModules: func() { i.unlink(at + m.list) },
			viewSysfs:   func() { i.unlink(at + v.embedded + v.object + v.entry) },
			viewBugs:    func() { i.unlink(at + v.bugList) },
			viewAddress: func() { i.eraseFromTree(at) },
		}
		every := []string{viewModules, viewSysfs, viewBugs, viewAddress}
		for _, c := range append([][]string{every, every[:3], every[1:]}, []string{viewModules}, []string{viewSysfs}, []string{viewBugs}, []string{viewAddress}) {
			undo := i.change(func() {
				for _, name := range c {
					off[name]()
				}
			})
			found := round(t, quick(i.Guest), len(c) == len(every))
			if len(found) != 1 || found[0].Kind != KindModuleHidden || found[0].Subject != list[1].Name || !sameNames(found[0].Missing, c) {
				t.Errorf("%v: %+v", c, found)
			}
			undo()
		}
		undo := i.change(func() { i.put32(at+m.state, moduleUnformed) })
		if found := round(t, quick(i.Guest), false); len(found) != 1 || found[0].Kind != KindModuleHidden || found[0].Subject != list[1].Name {
			t.Errorf("unformed: %+v", found)
		}
		undo()
		// Coming and going ones are on some lists only.
		for _, state := range []uint32{1, 2, moduleUnformed} {
			undo := i.change(func() { i.put32(at+m.state, state); off[viewSysfs](); off[viewBugs]() })
			if found := round(t, quick(i.Guest), true); len(found) > 0 {
				t.Errorf("in state %d: %+v", state, found)
			}
			undo()
		}
	})
}

// eraseFromTree makes a module's nodes in the tree of addresses another's: what is left of rb_erase for who looks.
func (i *intruder) eraseFromTree(module uint64) {
	i.t.Helper()
	v := i.moduleViewLayout()
	tree := v.tree + i.boot.Slide + v.roots
	for index := uint64(0); index < 2; index++ {
		nodes := map[uint64]bool{}
		i.rbtree(i.get(tree+8*index), 0, nodes, func(uint64) {})
		var other uint64
		for node := range nodes {
			if mod := i.get(node - 24*index - v.treeNode + v.treeMod); mod != module {
				other = mod
			}
		}
		for node := range nodes {
			if at := node - 24*index - v.treeNode + v.treeMod; i.get(at) == module {
				i.put(at, other)
			}
		}
	}
}

// TestHiddenSocket takes sockets that are held open off the tables in which the kernel looks them up.
func TestHiddenSocket(t *testing.T) {
	onGuests(t, func(t *testing.T, mem Physical, p *kernel.Profile) {
		i := enter(t, mem, p)
		list, err := i.SocketsByFiles()
		if err != nil {
			t.Fatal(err)
		}
		tables := i.tableLayout()
		tried := map[string]bool{}
		for _, s := range list {
			sort := s.Protocol + " " + s.State
			if tried[sort] || !inTables(&s) {
				continue
			}
			tried[sort] = true
			node := s.Sock + tables.node
			undo := i.change(func() {
				next, link := i.get(node), i.get(node+8)
				i.put(link, next)
				if next != 0 && next&1 == 0 {
					i.put(next+8, link)
				}
			})
			found := round(t, quick(i.Guest), false)
			if len(found) != 1 || found[0].Kind != KindSocketHidden || found[0].Evidence[0].Address != s.Sock || found[0].Process.PID != s.PID || !strings.HasPrefix(found[0].Subject, s.Protocol+" "+s.Local) {
				t.Errorf("%+v: %+v", s, found)
			}
			undo()
		}
		t.Log(tried)
	})
}
