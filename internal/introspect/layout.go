package introspect

import "vigia/internal/kernel"

// layout is where the fields lie that the views of processes read, looked up once.
type layout struct {
	// err names the first thing that the kernel lacks for processes, and so for what belongs to them. What needs none of it
	// (modules, the kernel itself) works all the same.
	err  error
	task struct {
		tasks, pid, tgid, comm, flags, state, exitState    uint64
		realParent, realCred, mm, signal, threadNode       uint64
		startTime, startBoot, sumExec, threadPid, pidLinks uint64
		canary                                             uint64
	}
	signal struct{ threads, sumRuntime, sequence uint64 }
	pid    struct{ tasks uint64 }
	mm     struct{ pgd, exe, argStart, argEnd, envStart, envEnd uint64 }
	file   struct{ mnt, dentry uint64 }
	dentry struct{ parent, name, nameLen, pprev uint64 }
	mount  struct{ mnt, parent, mountpoint, root uint64 }
	clock  struct{ offsReal, wallSec, wallNsec, seconds, nsec, shift uint64 }

	cred      idLayout
	namespace namespaceLayout
	cgroup    cgroupLayout
}

// noField marks a field that a kernel may lack and the views can do without.
const noField = ^uint64(0)

// resolver looks fields up and keeps the first error.
type resolver struct {
	p   *kernel.Profile
	err error
	// memo, where it is not nil, keeps what was found: for who asks anew in each sample.
	memo map[string]uint64
}

// remember returns what find found the first time it was asked for name.
func (r *resolver) remember(name string, find func() (uint64, error)) uint64 {
	v, ok := r.memo[name]
	if ok {
		return v
	}
	v, err := find()
	switch {
	case err == nil && r.memo != nil:
		r.memo[name] = v
	case err != nil && r.err == nil:
		r.err = err
	}
	return v
}

func (r *resolver) field(typ string, paths ...string) uint64 {
	return r.remember(typ+"."+paths[0], func() (off uint64, err error) {
		for _, path := range paths { // the names it has had, newest first
			if off, err = r.p.Offset(typ, path); err == nil {
				return off, nil
			}
		}
		return 0, err
	})
}

func (r *resolver) size(typ string) uint64 {
	return r.remember(typ, func() (uint64, error) { return r.p.Size(typ) })
}

func (r *resolver) symbol(name string) uint64 {
	addr, err := r.p.Symbol(name)
	if err != nil && r.err == nil {
		r.err = err
	}
	return addr
}

func (r *resolver) optional(typ, path string) uint64 {
	off, err := r.p.Offset(typ, path)
	if err != nil {
		return noField
	}
	return off
}

func newLayout(p *kernel.Profile) *layout {
	r, l := &resolver{p: p}, &layout{}
	t := &l.task
	t.tasks, t.pid, t.tgid = r.field("task_struct", "tasks"), r.field("task_struct", "pid"), r.field("task_struct", "tgid")
	t.comm, t.flags = r.field("task_struct", "comm"), r.field("task_struct", "flags")
	t.state, t.exitState = r.field("task_struct", "__state", "state"), r.field("task_struct", "exit_state")
	t.realParent, t.realCred = r.field("task_struct", "real_parent"), r.field("task_struct", "real_cred")
	t.mm, t.signal = r.field("task_struct", "mm"), r.field("task_struct", "signal")
	t.threadNode = r.field("task_struct", "thread_node")
	t.startTime = r.field("task_struct", "start_time")
	t.startBoot = r.field("task_struct", "start_boottime", "real_start_time")
	t.sumExec = r.field("task_struct", "se.sum_exec_runtime")
	t.threadPid, t.pidLinks = r.field("task_struct", "thread_pid"), r.field("task_struct", "pid_links")
	t.canary = r.optional("task_struct", "stack_canary")

	l.signal.threads = r.field("signal_struct", "thread_head")
	l.signal.sumRuntime = r.field("signal_struct", "sum_sched_runtime")
	l.signal.sequence = r.optional("signal_struct", "stats_lock.seqcount.seqcount.sequence")
	l.cred, l.namespace, l.cgroup = newIDLayout(r), newNamespaceLayout(r), newCgroupLayout(r)
	l.pid.tasks = r.field("pid", "tasks")
	l.mm.pgd, l.mm.exe = r.field("mm_struct", "pgd"), r.field("mm_struct", "exe_file")
	l.mm.argStart, l.mm.argEnd = r.field("mm_struct", "arg_start"), r.field("mm_struct", "arg_end")
	l.mm.envStart, l.mm.envEnd = r.field("mm_struct", "env_start"), r.field("mm_struct", "env_end")
	l.file.mnt, l.file.dentry = r.field("file", "f_path.mnt"), r.field("file", "f_path.dentry")
	l.dentry.parent = r.field("dentry", "d_parent")
	l.dentry.name, l.dentry.nameLen = r.field("dentry", "d_name.name"), r.field("dentry", "d_name.len")
	l.dentry.pprev = r.field("dentry", "d_hash.pprev")
	l.mount.mnt, l.mount.parent = r.field("mount", "mnt"), r.field("mount", "mnt_parent")
	l.mount.mountpoint, l.mount.root = r.field("mount", "mnt_mountpoint"), r.field("vfsmount", "mnt_root")
	l.clock.offsReal = r.optional("timekeeper", "offs_real")
	l.clock.wallSec = r.optional("timekeeper", "wall_to_monotonic.tv_sec")
	l.clock.wallNsec = r.optional("timekeeper", "wall_to_monotonic.tv_nsec")
	l.clock.seconds = r.optional("timekeeper", "xtime_sec")
	l.clock.nsec = r.optional("timekeeper", "tkr_mono.xtime_nsec")
	l.clock.shift = r.optional("timekeeper", "tkr_mono.shift")
	l.err = r.err
	if !p.Has("task_struct", "real_parent") || !p.Has("task_struct", "tasks") {
		t.realParent, t.tasks = noField, noField
	}
	return l
}
