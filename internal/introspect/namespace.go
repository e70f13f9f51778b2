package introspect

// Namespaces are the inode numbers by which /proc/PID/ns tells a task's namespaces apart. A zombie has left all but those
// of its pid and user.
type Namespaces struct {
	PID    uint64 `json:"pid"`
	Mnt    uint64 `json:"mnt"`
	Net    uint64 `json:"net"`
	UTS    uint64 `json:"uts"`
	IPC    uint64 `json:"ipc"`
	User   uint64 `json:"user"`
	Cgroup uint64 `json:"cgroup"`
	Time   uint64 `json:"time"`
}

const maxPIDLevel = 32 // MAX_PID_NS_LEVEL

type namespaceLayout struct {
	proxy                                     uint64       // in task_struct
	each                                      [6]spaceLink // of nsproxy
	level, numbers, numberSize, number, space uint64       // of a struct pid
	pidInum, userInum                         uint64
	err                                       error
}

// spaceLink is one pointer of nsproxy, and where in what it points to the inode number lies.
type spaceLink struct {
	pointer, inum uint64
	into          func(*Namespaces) *uint64
}

func newNamespaceLayout(r *resolver) (l namespaceLayout) {
	o := &resolver{p: r.p}
	l.proxy = o.field("task_struct", "nsproxy")
	for i, s := range []struct {
		field, typ string
		into       func(*Namespaces) *uint64
	}{
		{"mnt_ns", "mnt_namespace", func(n *Namespaces) *uint64 { return &n.Mnt }},
		{"net_ns", "net", func(n *Namespaces) *uint64 { return &n.Net }},
		{"uts_ns", "uts_namespace", func(n *Namespaces) *uint64 { return &n.UTS }},
		{"ipc_ns", "ipc_namespace", func(n *Namespaces) *uint64 { return &n.IPC }},
		{"cgroup_ns", "cgroup_namespace", func(n *Namespaces) *uint64 { return &n.Cgroup }},
		{"time_ns", "time_namespace", func(n *Namespaces) *uint64 { return &n.Time }},
	} {
		l.each[i] = spaceLink{o.optional("nsproxy", s.field), o.optional(s.typ, "ns.inum"), s.into}
	}
	l.level, l.numbers = o.field("pid", "level"), o.field("pid", "numbers")
	l.number, l.space = o.field("upid", "nr"), o.field("upid", "ns")
	l.pidInum = o.field("pid_namespace", "ns.inum")
	l.userInum = o.optional("user_namespace", "ns.inum")
	l.err = o.err
	if size, err := r.p.Size("upid"); err == nil {
		l.numberSize = size
	} else if l.err == nil {
		l.err = err
	}
	return l
}

// namespaces fills in a task's namespaces and its pid in its own. Tasks that share them share one nsproxy.
func (g *Guest) namespaces(p *Process, cred uint64) {
	l := &g.layout.namespace
	if l.err != nil {
		p.Unknown = append(p.Unknown, "namespaces", "namespace_pid")
		return
	}
	r := &reader{s: g.space}
	proxy := r.u64(p.Task + l.proxy)
	n, known := g.seen.proxies[proxy]
	if !known && proxy != 0 {
		for _, s := range l.each {
			if s.pointer == noField || s.inum == noField {
				continue // a kernel without that sort
			}
			if to := r.u64(proxy + s.pointer); to != 0 {
				*s.into(&n) = uint64(r.u32(to + s.inum))
			}
		}
		if r.err == nil {
			g.seen.proxies[proxy] = n
		}
	}
	if c := g.layout.cred.userNS; c != noField && l.userInum != noField {
		if to := r.u64(cred + c); to != 0 {
			n.User = uint64(r.u32(to + l.userInum))
		}
	}
	p.Namespaces = n
	if r.err != nil {
		p.Unknown = append(p.Unknown, "namespaces")
	}
	g.ownPID(p)
}

// ownPID reads the last of a pid's numbers: the one in its own namespace.
func (g *Guest) ownPID(p *Process) {
	l := &g.layout.namespace
	r := &reader{s: g.space}
	pid := r.u64(p.Task + g.layout.task.threadPid)
	level := r.u32(pid + l.level)
	if r.err != nil || level > maxPIDLevel {
		p.Unknown = append(p.Unknown, "namespace_pid")
		return
	}
	last := pid + l.numbers + uint64(level)*l.numberSize
	number, space := r.u32(last+l.number), r.u64(last+l.space)
	inum := r.u32(space + l.pidInum)
	if r.err != nil {
		p.Unknown = append(p.Unknown, "namespace_pid")
		return
	}
	p.NamespacePID, p.Namespaces.PID = int64(int32(number)), uint64(inum)
}
