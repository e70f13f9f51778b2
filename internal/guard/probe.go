package guard

import (
	"os"
	"sync"
	"sync/atomic"
	"time"

	"vigia/internal/event"
	"vigia/internal/introspect"
	"vigia/internal/link"
	"vigia/internal/memory"
	"vigia/internal/probe"
)

// prober finds out what the guest's processes do: held by QEMU's plugin where there is one, sampled where not.
type prober struct {
	watcher *probe.Watcher // nil: sampled
	sampler *probe.Sampler
	fast    *eyes  // the watcher's
	slow    *eyes  // the sampler's
	why     string // why there is no watcher
	list    atomic.Pointer[watchlist]
	stirred atomic.Bool // something was told since it was last asked
}

// newProber makes a prober. page is what QEMU's plugin shares, or nil, with the reason in cfg.
func (g *Guard) newProber(cfg link.GuardConfig, page *os.File) (p *prober) {
	pace := probe.NewPace(g.out.Emit, g.flood)
	emit := func(kind event.Kind, fields event.Fields) {
		p.stirred.Store(true)
		if kind != event.FileOpened {
			pace.Emit(kind, fields)
			return
		}
		g.disk.who.note(fields)
		g.flood.Emit(p.alike(fields), event.Event{Kind: kind, Fields: fields})
	}
	p = &prober{fast: &eyes{views: g.views}, slow: &eyes{views: g.views}, why: cfg.Probe}
	if page != nil {
		defer page.Close()
	}
	switch {
	case g.views.why != nil:
		p.why = g.views.why.Error()
	case page != nil:
		var err error
		p.watcher, err = probe.NewWatcher(probe.Options{Page: page, CPUs: cfg.CPUs, Symbol: g.views.profile.Symbol, Eyes: p.held, Emit: emit})
		if err != nil {
			p.why = err.Error()
		} else {
			p.watch(cfg.Watch)
		}
	}
	if page != nil && p.watcher == nil {
		_ = probe.Decline(page) // no later guard gets orders taken half-way
	}
	p.sampler = probe.NewSampler(p.sampled, emit)
	if p.watcher != nil {
		p.sampler.Verify(p.watcher.Heard)
	}
	return p
}

func (p *prober) run(g *Guard) {
	if p.watcher != nil {
		go p.watcher.Run(g.ctx)
	}
	go p.sampler.Run(g.ctx)
}

// watch says which files matter.
func (p *prober) watch(paths []string) {
	if p.watcher != nil {
		list := newWatchlist(paths)
		p.list.Store(list)
		p.watcher.Watch(paths, func(path string) (string, bool) { return list.meant(path) })
	}
}

// alike joins opens as reads are joined: by path. A path that a rule names literally can't be hidden by others.
func (p *prober) alike(f event.Fields) event.Alike {
	path, _ := f["path"].(string)
	a := event.Alike{Sort: string(event.FileOpened) + path, Sum: []string{"count"}}
	if list := p.list.Load(); list != nil {
		a.Always = list.literal[path]
	}
	return a
}

func (p *prober) rebooted() {
	p.fast.rebooted()
	p.slow.rebooted()
	if p.watcher != nil {
		p.watcher.Rebooted()
	}
}

func (p *prober) state() string {
	if p.watcher != nil && p.sampler.Silenced() {
		return "sampled: the plugin does not tell of all that the guest's kernel counts"
	}
	if p.watcher != nil {
		return p.watcher.State()
	}
	if p.why == "" {
		return "sampled: QEMU was started without the plugin"
	}
	return "sampled: " + p.why
}

// held are the eyes for a CPU that waits: they look for the guest's kernel at once.
func (p *prober) held() (probe.Eyes, error) {
	return p.fast, p.fast.attach(probeRetry)
}

// sampled are the eyes for a sampler.
func (p *prober) sampled() (probe.Guest, error) {
	return p.slow, p.slow.attach(attachRetry)
}

// probeRetry is how long after a search that found no kernel another is made for a CPU that is held.
const probeRetry = 20 * time.Millisecond

// eyes lend a probe the introspector: they turn what the one sees into the other's words. Their view of the guest is
// their own: a CPU that is held must not wait for a long view of somebody else's.
type eyes struct {
	views *views

	mu    sync.Mutex
	mem   physical // that guest was found in
	guest *introspect.Guest
	tried time.Time
	boot  introspect.Boot
	life  uint64
	seen  []introspect.Glance // memory that is used again
}

// attach finds the guest's kernel, if it is not found and due to be looked for again.
func (e *eyes) attach(retry time.Duration) error {
	if e.views.why != nil {
		return e.views.why
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	mem := e.views.memory()
	if mem != e.mem {
		e.mem, e.guest, e.tried = mem, nil, time.Time{}
	}
	if e.guest != nil {
		return nil
	}
	now := time.Now()
	if mem == nil || now.Sub(e.tried) < retry {
		return introspect.ErrNotReady
	}
	guest, err := introspect.Attach(mem, e.views.profile)
	e.tried = time.Now()
	if err == nil {
		e.guest = guest
	}
	return err
}

// rebooted is told by the monitor: the kernel that was there is over.
func (e *eyes) rebooted() {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.guest != nil {
		e.guest.Rebooted()
	}
}

// Pulse is introspect's, with the lives of the guest's kernel numbered.
func (e *eyes) Pulse() (probe.Pulse, error) {
	p, err := e.guest.Pulse()
	if err != nil {
		return probe.Pulse{}, err
	}
	if e.boot != p.Boot {
		e.boot, e.life = p.Boot, e.life+1
	}
	return probe.Pulse{Life: e.life, Forks: p.Forks, Tasks: p.Tasks, Module: p.Module, Counted: p.Counted}, nil
}

// Glances are introspect's.
func (e *eyes) Glances(list []probe.Glance) ([]probe.Glance, error) {
	var err error
	e.seen, err = e.guest.Glances(e.seen[:0])
	for _, g := range e.seen {
		list = append(list, probe.Glance(g))
	}
	return list, err
}

// Describe is introspect's.
func (e *eyes) Describe(g probe.Glance) (probe.Process, error) {
	p, err := e.guest.Describe(introspect.Glance(g))
	return described(p), err
}

func described(p introspect.Process) probe.Process {
	return probe.Process{PID: p.PID, PPID: p.PPID, UID: int64(p.UID), EUID: int64(p.EUID), Comm: p.Comm, Exe: p.Exe, Cmdline: p.Cmdline}
}

// Modules are introspect's.
func (e *eyes) Modules() ([]probe.Module, error) {
	list, err := e.guest.Modules()
	out := make([]probe.Module, len(list))
	for i, m := range list {
		out[i] = loadedModule(m)
	}
	return out, err
}

func loadedModule(m introspect.Module) probe.Module {
	return probe.Module{Name: m.Name, Address: m.Address, Size: m.Size}
}

// Sight is introspect's.
func (e *eyes) Sight(cpus int) (probe.Sight, error) {
	s, err := e.guest.Sight(cpus)
	return probe.Sight(s), err
}

// Moment is introspect's.
func (e *eyes) Moment(cpu int) (probe.Moment, error) {
	m, err := e.guest.Moment(cpu)
	return moment(m), err
}

func moment(m introspect.Moment) probe.Moment {
	return probe.Moment{Process: described(m.Process), StartTime: m.StartTime, Thread: m.Thread, Kernel: m.Kernel, Last: m.Last, Exit: m.Exit}
}

// Opening is introspect's.
func (e *eyes) Opening(cpu int) (probe.Opening, error) {
	o, err := e.guest.Opening(cpu)
	return probe.Opening(o), err
}

// Connection is introspect's.
func (e *eyes) Connection(cpu int) (probe.Connection, error) {
	s, err := e.guest.Connection(cpu)
	return probe.Connection{Protocol: s.Protocol, Local: s.Local, Remote: s.Remote}, err
}

// Called is introspect's.
func (e *eyes) Called(cpu int) (probe.Called, error) {
	c, err := e.guest.Called(cpu)
	return probe.Called{PID: c.PID, TID: c.TID, Comm: c.Comm, Number: c.Call.Number, Name: c.Name, Args: c.Call.Args, Text: c.Text, Result: c.Call.Result}, err
}

// Recipe is introspect's.
func (e *eyes) Recipe() ([]memory.Step, error) { return e.guest.Recipe() }

// Recall gives the eyes that see a copy.
func (e *eyes) Recall(task uint64, c *memory.Copied) probe.Eyes { return &recall{e, task, c} }

// recall sees what was copied, and the guest as it is now where that does not matter.
type recall struct {
	*eyes
	task uint64
	copy *memory.Copied
}

// Moment is introspect's.
func (r *recall) Moment(int) (probe.Moment, error) {
	m, err := r.guest.CopiedMoment(r.task, r.copy)
	return moment(m), err
}

// Opening is introspect's.
func (r *recall) Opening(int) (probe.Opening, error) {
	o, err := r.guest.CopiedOpening(r.task, r.copy)
	return probe.Opening(o), err
}

// Coming is introspect's.
func (e *eyes) Coming() (probe.Module, error) {
	m, err := e.guest.Coming()
	return loadedModule(m), err
}
