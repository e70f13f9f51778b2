package probe

import "vigia/internal/event"

// point is an instruction of the guest's kernel at which is seen what a CPU does: the first of a function.
type point struct {
	symbol   string
	tell     func(w *Watcher, cpu int, eyes Eyes) ([]told, error)
	copied   bool // all it takes is in the recipe: the CPU need not wait
	filtered bool // only for files that are looked for
	traced   bool // only while calls are traced
}

// told is an event that was seen; settle is what the watcher then knows.
type told struct {
	kind   event.Kind
	fields event.Fields
	settle func()
}

const pointForked = "schedule_tail"

// points are in kernels from 6.1 to 6.12 at least, each called on every way to what it tells: proc_*_connector and
// taskstats_exit are there for telling others, whether or not anybody listens. One that a kernel lacks is left out, and
// said to be. A kernel function's arguments can't be had (plugin API 1 shows no registers), so each point is one where the
// task itself, or what it points to, tells what is done.
var points = []point{
	{symbol: pointForked, tell: (*Watcher).forked, copied: true},                          // the first that a new task does; it is the current one
	{symbol: "proc_exec_connector", tell: (*Watcher).started, copied: true},               // the new program is in place, its arguments too
	{symbol: "taskstats_exit", tell: (*Watcher).exited, copied: true},                     // exit_code is set, the address space still there
	{symbol: "proc_id_connector", tell: (*Watcher).credentials, copied: true},             // after user or group ids changed
	{symbol: "do_init_module", tell: (*Watcher).module},                                   // code in place, init not yet called
	{symbol: "security_file_open", tell: (*Watcher).opened, copied: true, filtered: true}, // the walk along the path is over
	{symbol: "tcp_connect", tell: (*Watcher).connecting},                                  // addresses are set, no packet sent
	{symbol: "inet_csk_listen_start", tell: (*Watcher).listening},
	{symbol: "syscall_exit_to_user_mode", tell: (*Watcher).called, traced: true}, // the result is there
}

func (w *Watcher) forked(cpu int, eyes Eyes) ([]told, error) {
	m, err := eyes.Moment(cpu)
	if err != nil || m.Kernel || m.Thread {
		return nil, err
	}
	return []told{{event.ProcessForked, m.fields(), func() { w.know(m.PID, ids{m.UID, m.EUID}) }}}, nil
}

func (w *Watcher) started(cpu int, eyes Eyes) ([]told, error) {
	m, err := eyes.Moment(cpu)
	if err != nil {
		return nil, err
	}
	return []told{{event.ProcessStarted, m.fields(), func() { w.know(m.PID, ids{m.UID, m.EUID}) }}}, nil
}

func (w *Watcher) know(pid int64, who ids) {
	if len(w.ids) < maxIDs {
		w.ids[pid] = who
	}
}

func (w *Watcher) exited(cpu int, eyes Eyes) ([]told, error) {
	m, err := eyes.Moment(cpu)
	if err != nil || m.Kernel || !m.Last {
		return nil, err
	}
	return []told{{event.ProcessExited, ended(m.fields(), m.Exit), func() { delete(w.ids, m.PID) }}}, nil
}

// credentials tells of user ids; a change of group ids comes here too.
func (w *Watcher) credentials(cpu int, eyes Eyes) ([]told, error) {
	m, err := eyes.Moment(cpu)
	if err != nil || m.Kernel {
		return nil, err
	}
	now := ids{m.UID, m.EUID}
	old, known := w.ids[m.PID]
	if known && old == now {
		return nil, nil
	}
	f := m.fields()
	if known {
		f["old_uid"], f["old_euid"] = old.uid, old.euid
	}
	return []told{{event.ProcessCredentials, f, func() { w.know(m.PID, now) }}}, nil
}

func (w *Watcher) module(cpu int, eyes Eyes) ([]told, error) {
	module, err := eyes.Coming()
	if err != nil {
		return nil, err
	}
	f := module.fields()
	if m, err := eyes.Moment(cpu); err == nil {
		for name, v := range m.fields() {
			f[name] = v
		}
	}
	return []told{{event.ModuleLoaded, f, nil}}, nil
}

func (w *Watcher) opened(cpu int, eyes Eyes) ([]told, error) {
	o, err := eyes.Opening(cpu)
	if err != nil {
		return nil, nil // a file that no path leads to
	}
	path, ok := w.meant(o.Path)
	if !ok {
		return nil, nil
	}
	m, err := eyes.Moment(cpu)
	if err != nil {
		return nil, err
	}
	f := m.fields()
	if f["path"] = path; o.Known {
		f["write"] = o.Write
	}
	return []told{{event.FileOpened, f, nil}}, nil
}

func (w *Watcher) connecting(cpu int, eyes Eyes) ([]told, error) {
	return w.socket(cpu, eyes, event.SocketConnecting)
}

func (w *Watcher) listening(cpu int, eyes Eyes) ([]told, error) {
	return w.socket(cpu, eyes, event.SocketListening)
}

func (w *Watcher) socket(cpu int, eyes Eyes, kind event.Kind) ([]told, error) {
	m, err := eyes.Moment(cpu)
	if err != nil {
		return nil, err
	}
	f := m.fields()
	if s, err := eyes.Connection(cpu); err == nil {
		f["protocol"], f["local"] = s.Protocol, s.Local
		if kind == event.SocketConnecting {
			f["remote"] = s.Remote
		}
	}
	return []told{{kind, f, nil}}, nil
}
