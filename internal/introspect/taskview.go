package introspect

import "encoding/binary"

// The ways in which a kernel keeps its tasks, each for a reason of its own: whoever hides a task from one has not yet
// hidden it from the others, and one that is hidden from all that the scheduler reads does not run.
const (
	viewTasks   = "task list"  // init_task.tasks: what is walked for /proc's totals, signals to all, the OOM killer
	viewPids    = "pid table"  // init_pid_ns.idr: what /proc's directories and kill(pid) look in
	viewTree    = "children"   // each parent's list: what wait(2) looks in
	viewCgroups = "cgroups"    // css_set lists: what cgroup.procs shows
	viewThreads = "threads"    // signal_struct.thread_head: what /proc/PID/task shows
	viewRunning = "run queues" // what each CPU runs, and has ready to run
	viewSlab    = "task slabs" // the memory that tasks are made of
)

// taskViewLayout is where the fields lie that only these views read.
type taskViewLayout struct {
	idr, slots, slotCount, shift, numbers    uint64 // of init_pid_ns, link address; of xa_node; of pid
	children, sibling, leader, stack, usage  uint64
	cgroupLink, setTable, setLink            uint64
	setLists                                 []uint64
	perCPU, cpuIDs, runqueues                uint64 // link addresses; runqueues is each CPU's own
	current, idle, ready, readyLink          uint64
	errTree, errPids, errCgroups, errRunning error
}

func (g *Guest) taskViewLayout() *taskViewLayout {
	if g.taskViews != nil {
		return g.taskViews
	}
	l := &taskViewLayout{}
	in := func(err *error, f func(r *resolver)) {
		r := &resolver{p: g.profile}
		f(r)
		*err = r.err
	}
	in(&l.errPids, func(r *resolver) {
		l.idr = r.symbol("init_pid_ns") + r.field("pid_namespace", "idr.idr_rt.xa_head")
		l.slots, l.shift = r.field("xa_node", "slots"), r.field("xa_node", "shift")
		l.numbers = r.field("pid", "numbers") + r.field("upid", "nr")
		if f, err := g.profile.Field("xa_node", "slots"); err == nil {
			l.slotCount = min(f.Count, 64)
		}
	})
	in(&l.errTree, func(r *resolver) {
		l.children, l.sibling = r.field("task_struct", "children"), r.field("task_struct", "sibling")
		l.leader = r.field("task_struct", "group_leader")
	})
	in(&l.errCgroups, func(r *resolver) {
		l.setTable, l.setLink = r.symbol("css_set_table"), r.field("css_set", "hlist")
		l.setLists = []uint64{r.field("css_set", "tasks"), r.field("css_set", "mg_tasks"), r.field("css_set", "dying_tasks")}
		l.cgroupLink = r.field("task_struct", "cg_list")
	})
	in(&l.errRunning, func(r *resolver) {
		l.perCPU, l.cpuIDs, l.runqueues = r.symbol("__per_cpu_offset"), r.symbol("nr_cpu_ids"), r.symbol("runqueues")
		l.current, l.idle, l.ready = r.field("rq", "curr"), r.field("rq", "idle"), r.field("rq", "cfs_tasks")
		l.readyLink = r.field("task_struct", "se.group_node")
	})
	o := &resolver{p: g.profile}
	l.stack, l.usage = o.optional("task_struct", "stack"), o.optional("task_struct", "usage")
	g.taskViews = l
	g.profile.Trim()
	return l
}

// tasksListed is the list of thread group leaders.
func (g *Guest) tasksListed() *listing {
	l := newListing(viewTasks)
	off := g.layout.task.tasks
	g.follow(l, g.initTask()+off, func(node uint64) { l.at[node-off] = true })
	return l
}

// pidTable is the first pid namespace's radix tree of pids: every task in the guest has a number in it. One that is there
// under another number than its own is not found by it.
func (g *Guest) pidTable() *listing {
	l, v := newListing(viewPids), g.taskViewLayout()
	if v.errPids != nil {
		return l.unknown(v.errPids)
	}
	root, err := g.space.U64(v.idr + g.boot.Slide)
	if err != nil {
		return l.unknown(err)
	}
	left := maxNodes
	g.radix(v, root, 0, 0, &left, func(index, pid uint64) {
		r := reader{s: g.space}
		number, link := r.u32(pid+v.numbers), r.u64(pid+g.layout.pid.tasks)
		task := link - g.layout.task.pidLinks
		if r.err == nil && link != 0 && uint64(number) == index && r.u32(task+g.layout.task.pid) == number && r.err == nil {
			l.at[task] = true
		}
	})
	return l
}

// Entries of an xarray (include/linux/xarray.h): a node's address has 2 added; small ones of that sort are marks.
const (
	xaInternal  = 2
	xaMarksEnd  = 4096
	xaMaxLevels = 11 // of 6 bits each
)

// radix visits the pointers in a tree of xa_nodes, with their indices.
func (g *Guest) radix(v *taskViewLayout, entry, index uint64, depth int, left *int, visit func(index, pointer uint64)) {
	if *left--; *left < 0 {
		return
	}
	if entry&3 != xaInternal {
		if entry != 0 && entry&3 == 0 {
			visit(index, entry)
		}
		return
	}
	if entry < xaMarksEnd || depth == xaMaxLevels {
		return
	}
	var slots [64 * 8]byte
	n := 8 * v.slotCount
	shift, err := g.space.U8(entry - xaInternal + v.shift)
	if err != nil || shift > 63 || g.space.Read(entry-xaInternal+v.slots, slots[:n]) != nil {
		return
	}
	for i := uint64(0); i < n; i += 8 {
		if e := binary.LittleEndian.Uint64(slots[i:]); e != 0 {
			g.radix(v, e, index+i/8<<shift, depth+1, left, visit)
		}
	}
}

// familyTree goes from init_task, and from what other views know, down each task's children. Children hang on the thread
// that made them.
func (g *Guest) familyTree(known []uint64) *listing {
	l, v := newListing(viewTree), g.taskViewLayout()
	if v.errTree != nil {
		return l.unknown(v.errTree)
	}
	queue := append([]uint64{g.initTask()}, known...)
	seen := make(map[uint64]bool, len(queue))
	for _, task := range queue {
		seen[task] = true
	}
	for len(queue) > 0 && len(seen) < maxNodes && g.meter.left > 0 {
		task := queue[0]
		queue = queue[1:]
		g.follow(l, task+v.children, func(node uint64) {
			child := node - v.sibling
			l.at[child] = true
			if seen[child] {
				return
			}
			seen[child] = true
			queue = append(queue, child)
			for _, thread := range g.threadsOf(nil, child) {
				if !seen[thread] {
					seen[thread] = true
					queue = append(queue, thread)
				}
			}
		})
	}
	return l
}

// threadsOf returns the threads on the list of a task's group. l may be nil.
func (g *Guest) threadsOf(l *listing, task uint64) (threads []uint64) {
	if l == nil {
		l = newListing("")
	}
	signal, err := g.space.U64(task + g.layout.task.signal)
	if err != nil || signal == 0 {
		return nil
	}
	g.follow(l, signal+g.layout.signal.threads, func(node uint64) { threads = append(threads, node-g.layout.task.threadNode) })
	return threads
}

// threadLists is all threads of the groups that tasks belong to.
func (g *Guest) threadLists(tasks []uint64) *listing {
	l := newListing(viewThreads)
	done := map[uint64]bool{}
	for _, task := range tasks {
		signal, err := g.space.U64(task + g.layout.task.signal)
		if err != nil || signal == 0 || done[signal] || g.meter.left <= 0 {
			continue
		}
		done[signal] = true
		for _, thread := range g.threadsOf(l, task) {
			l.at[thread] = true
		}
	}
	return l
}

const cssSetBuckets = 1 << 7 // CSS_SET_HASH_BITS, kernel/cgroup/cgroup.c

// cgroupTasks is what the sets of control groups hold: living tasks, migrating ones, and leaders that are dead.
func (g *Guest) cgroupTasks() *listing {
	l, v := newListing(viewCgroups), g.taskViewLayout()
	if v.errCgroups != nil {
		return l.unknown(v.errCgroups)
	}
	var table [cssSetBuckets * 8]byte
	if err := g.space.Read(v.setTable+g.boot.Slide, table[:]); err != nil {
		return l.unknown(err)
	}
	seen := map[uint64]bool{}
	for i := 0; i < len(table); i += 8 {
		for node := binary.LittleEndian.Uint64(table[i:]); node != 0 && !seen[node] && len(seen) < maxNodes; {
			seen[node] = true
			for _, list := range v.setLists {
				g.follow(l, node-v.setLink+list, func(n uint64) { l.at[n-v.cgroupLink] = true })
			}
			var err error
			if node, err = g.space.U64(node); err != nil {
				break
			}
		}
	}
	return l
}

const maxCPUs = 512

// onCPUs is what each CPU runs now and the fair class's ready tasks; idle are the CPUs' idle tasks, which are on no list
// of any kind.
func (g *Guest) onCPUs() (l *listing, idle map[uint64]bool) {
	l, idle = newListing(viewRunning), map[uint64]bool{g.initTask(): true}
	v := g.taskViewLayout()
	if v.errRunning != nil {
		return l.unknown(v.errRunning), idle
	}
	for _, base := range g.cpuBases(v) {
		rq := base + v.runqueues
		r := reader{s: g.space}
		current, idler := r.u64(rq+v.current), r.u64(rq+v.idle)
		if r.err != nil {
			return l.unknown(r.err), idle
		}
		idle[idler] = true
		if current != idler && current != 0 {
			l.at[current] = true
		}
		g.follow(newListing(""), rq+v.ready, func(node uint64) { l.at[node-v.readyLink] = true })
	}
	return l, idle
}

// cpuBases returns where each CPU's own data lies, less a per-CPU symbol's address.
func (g *Guest) cpuBases(v *taskViewLayout) (bases []uint64) {
	n, err := g.space.U32(v.cpuIDs + g.boot.Slide)
	if err != nil {
		return nil
	}
	for i := range uint64(min(n, maxCPUs)) {
		base, err := g.space.U64(v.perCPU + g.boot.Slide + 8*i)
		if err != nil {
			break
		}
		bases = append(bases, base)
	}
	return bases
}
