// Package guard is the worker that stands between one guest and everything else: it serves the guest's disk, holds QEMU's
// monitor, its serial line and the guest channel, and reads its memory.
//
// It is assumed that a guest can take its guard over. So it is confined before it reads a byte (package jail), it opens
// nothing by path, and what it says to the daemon is typed and capped (package link): a guest that owns its guard has
// gained its own disk and memory.
//
//	QEMU ── NBD ────▶ disk.go      volume, and the files that requests touch
//	     ── QMP ────▶ guard.go     monitor
//	     ── serial ─▶ console.go   log, lines, attached persons
//	     ── agent ──▶ agent.go     exec and copies, only where asked for
//	     ── RAM ────▶ views.go     introspection; check.go, what should not be there
//	                  probe.go     what its processes do
//	daemon ─ sched ─▶ sampler.go   load
package guard

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"runtime/debug"
	"sync"
	"sync/atomic"
	"time"

	"vigia/internal/event"
	"vigia/internal/inputs"
	"vigia/internal/jail"
	"vigia/internal/link"
	"vigia/internal/machine"
	"vigia/internal/machine/additions"
	"vigia/internal/volume"
)

// Guard is one guest's guard.
type Guard struct {
	ctx      context.Context
	out      *link.Outbox
	flood    *event.Flood
	measures []link.Measure
	version  string

	footprint link.Footprint

	halting sync.Mutex // held while the guest is stopped or let go

	saving     sync.Mutex // held by a checkpoint from its asking to its end
	mu         sync.Mutex
	configured bool
	cfg        link.GuardConfig
	disk       *disk
	console    *console
	agent      *additions.Agent
	unthawed   atomic.Bool // its guest was asked to freeze its file systems, and has not yet said that they are thawed
	ram        *os.File
	views      *views
	sampler    *sampler
	prober     *prober
	frames     *frames // nil: nobody will ask
	until      until
	checker    *checker
	inputs     atomic.Pointer[inputs.Log] // nil: what enters is not kept
	monitor    *machine.Monitor
	monitorErr error
	monitorUp  chan struct{} // closed once monitor or monitorErr is there
	held       chan struct{} // the daemon's word that a guest in panic is needed still
}

// Main is `vigia guard`: it confines itself and serves daemons until it is ended.
func Main(version string) error {
	volume.HostBoot() // it remembers what /proc says, which is gone afterwards
	footprint := link.NewFootprint()
	measures, err := jail.Confine(jail.Guard)
	if err != nil {
		return err
	}
	debug.SetGCPercent(50) // its memory is small and should stay so
	l, err := link.Control()
	if err != nil {
		return err
	}
	g := &Guard{ctx: context.Background(), version: version, out: link.NewOutbox(""), monitorUp: make(chan struct{}), held: make(chan struct{}, 1)}
	for _, m := range measures {
		g.measures = append(g.measures, link.Measure{Name: m.Name, InForce: m.InForce, Detail: m.Detail + m.Why})
	}
	g.footprint = footprint
	footprint.TrimLater(g.trim)
	g.flood = event.NewFlood("guard", func(e event.Event) { g.out.Emit(e.Kind, e.Fields) })
	g.flood.Waiting = g.out.Holder()
	w := &link.Worker{Outbox: g.out, Hello: g.hello, Handle: g.handle, Left: g.left}
	if err := w.Count(); err != nil {
		return err
	}
	return w.Serve(g.ctx, l)
}

// shrink gives back what a round of checks has made resident. All of them leave garbage too, which is collected then: a collection
// brings in much of the program, which is given back after it.
func (g *Guard) shrink(whole bool) {
	if g.views.trim(); whole {
		debug.FreeOSMemory()
		g.footprint.Trim()
	}
}

// trim gives back what looking at the guest has made resident: its memory and its kernel's profile.
func (g *Guard) trim() {
	g.mu.Lock()
	v := g.views
	g.mu.Unlock()
	if v != nil {
		v.trim()
	}
}

func (g *Guard) hello() link.Hello {
	g.mu.Lock()
	defer g.mu.Unlock()
	return link.Hello{Source: g.out.Source(), PID: os.Getpid(), Version: g.version, Configured: g.configured, InForce: g.measures}
}

func (g *Guard) handle(ctx context.Context, r link.Request) (link.Response, error) {
	if r.Method == link.CallConfigure {
		return link.Response{}, g.configure(r)
	}
	g.mu.Lock()
	ready := g.configured
	g.mu.Unlock()
	if !ready {
		closeFiles(r.Files)
		return link.Response{}, errors.New("not configured")
	}
	if h := handlers[r.Method]; h != nil {
		return h(g, ctx, r)
	}
	closeFiles(r.Files)
	return link.Response{}, fmt.Errorf("guard has no call %q", r.Method)
}

// handlers are what a daemon may ask of a configured guard. Each owns the request's files.
var handlers map[string]func(*Guard, context.Context, link.Request) (link.Response, error)

func init() {
	handlers = map[string]func(*Guard, context.Context, link.Request) (link.Response, error){
		link.CallRun:         (*Guard).run,
		link.CallName:        (*Guard).name,
		link.CallSettled:     (*Guard).settled,
		link.CallWatch:       (*Guard).watch,
		link.CallCPU:         (*Guard).cpu,
		link.CallPause:       (*Guard).pause,
		link.CallResume:      (*Guard).resume,
		link.CallPowerDown:   (*Guard).powerDown,
		link.CallQuit:        monitorCall((*machine.Monitor).Quit),
		link.CallHold:        (*Guard).hold,
		link.CallReplace:     (*Guard).replace,
		link.CallEnding:      (*Guard).ending,
		link.CallGuardStatus: (*Guard).status,
		link.CallRAM:         (*Guard).giveRAM,
		link.CallProcesses:   view(processes),
		link.CallModules:     view(modules),
		link.CallSockets:     view(sockets),
		link.CallFiles:       view(files),
		link.CallMaps:        view(maps),
		link.CallKernel:      (*Guard).kernel,
		link.CallCheck:       (*Guard).check,
		link.CallSchedule:    (*Guard).setSchedule,
		link.CallConsole:     (*Guard).attachConsole,
		link.CallTrace:       (*Guard).trace,
		link.CallShown:       (*Guard).shown,
		link.CallStopAt:      (*Guard).stopAt,
		link.CallReached:     (*Guard).reached,
		link.CallExec:        (*Guard).exec,
		link.CallCopyIn:      (*Guard).copyIn,
		link.CallCopyOut:     (*Guard).copyOut,
		link.CallHand:        (*Guard).hand,
		link.CallTakeBack:    (*Guard).takeBack,
		link.CallCheckpoint:  (*Guard).checkpoint,
		link.CallIncoming:    (*Guard).incoming,
		link.CallArrive:      (*Guard).arrive,
		link.CallMemory:      (*Guard).memory,
		link.CallKeepInputs:  (*Guard).keepInputs,
		link.CallPlay:        (*Guard).play,
	}
}

// configure takes the machine's descriptors, once. From here on the guest's disk is served.
func (g *Guard) configure(r link.Request) error {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.configured {
		closeFiles(r.Files)
		return errors.New("configured already")
	}
	if err := r.Decode(&g.cfg); err != nil {
		closeFiles(r.Files)
		return err
	}
	files, err := link.Files(g.cfg.Files, r.Files)
	if err != nil {
		return err
	}
	if err := g.open(files); err != nil {
		closeFiles(r.Files)
		return err
	}
	g.configured = true
	return nil
}

// open makes the guard's parts of its descriptors.
func (g *Guard) open(files map[string]*os.File) error {
	g.out.SetMachine(g.cfg.Name)
	g.out.Told = func(kind event.Kind, fields event.Fields) { g.until.told(g, kind, fields) }
	qmp, err := conn(files, link.FileQMP)
	if err != nil {
		return err
	}
	serial, err := conn(files, link.FileConsole)
	if err != nil {
		return err
	}
	if files[link.FileAgent] != nil {
		channel, err := conn(files, link.FileAgent)
		if err != nil {
			return err
		}
		g.agent = additions.New(channel)
	}
	if files[link.FileFrames] != nil {
		shown, err := conn(files, link.FileFrames)
		if err != nil {
			return err
		}
		g.frames = newFrames(shown, g.cfg.Running)
		go g.frames.run()
	}
	if g.disk, err = openDisk(files, g.cfg.Watch, g.cfg.Running, g.out.Emit, g.flood); err != nil {
		return fmt.Errorf("disk: %w", err)
	}
	if g.agent != nil && g.cfg.Running { // the guard before may have died in the middle of a checkpoint
		go thaw(g.ctx, g.agent, 3, thawWait)
	}
	g.ram = files[link.FileRAM]
	g.views = newViews(g.cfg, g.ram, files[link.FileProfile], files[link.FileReference], files[link.FileModules])
	g.console = newConsole(serial, openConsoleLog(files[link.FileConsoleLog], files[link.FileConsoleTail+"0"], files[link.FileConsoleTail+"1"]), g.out.Emit)
	g.console.slow = g.cfg.Recorded
	g.console.typed = g.keepTyped
	g.sampler = &sampler{cpus: g.cfg.CPUs, emit: g.out.Emit, process: g.views.busiest, panicked: g.panicked}
	g.console.lines.waiting = g.out.Holder()
	go g.console.run()
	g.checker = newChecker(g.views, g.told, newInside(g.agent))
	g.checker.processor, g.checker.shrink = processor{g}, g.shrink
	go g.sampler.run(g.ctx)
	g.prober = g.newProber(g.cfg, files[link.FileProbe])
	if g.prober.watcher != nil && g.cfg.Replays { // where a CPU waits to be looked at, and others need not
		g.prober.watcher.Halt(g.until.held, func() { g.until.late(g) })
	}
	g.prober.sampler.Used = g.sampler.clock.used()
	g.checker.worked = g.newWork().worked
	go g.checker.run(g.ctx, g.cfg.Check)
	g.prober.run(g)
	go g.connectMonitor(qmp)
	return nil
}

// conn takes a connected socket out of the received files.
func conn(files map[string]*os.File, name string) (net.Conn, error) {
	f := files[name]
	if f == nil {
		return nil, fmt.Errorf("no %s was given", name)
	}
	delete(files, name)
	c, err := net.FileConn(f)
	f.Close()
	if err != nil {
		return nil, fmt.Errorf("%s: %w", name, err)
	}
	return c, nil
}

// connectMonitor waits for QEMU's greeting: it comes once QEMU runs.
func (g *Guard) connectMonitor(c net.Conn) {
	m, err := machine.NewMonitor(g.ctx, c, g.monitored, g.rebooted, g.standing)
	if err == nil && g.cfg.Running {
		g.findStanding(m)
	}
	g.mu.Lock()
	g.monitor, g.monitorErr = m, err
	g.mu.Unlock()
	close(g.monitorUp)
	if err != nil {
		return
	}
	<-m.Done()
	if err := m.Broken(); err != nil {
		g.giveUp(err)
	}
}

// rebooted is told by the monitor.
func (g *Guard) rebooted() {
	g.views.rebooted()
	g.checker.sight.begin()
	g.prober.rebooted()
}

// giveUp ends a guard whose QEMU does not keep to its protocol, once its events are delivered. The daemon puts another in
// its place; a QEMU that goes on like that is ended.
func (g *Guard) giveUp(why error) {
	ctx, cancel := context.WithTimeout(g.ctx, 2*time.Second)
	defer cancel()
	g.out.Drained(ctx)
	fmt.Fprintf(os.Stderr, "vigia guard: %v\n", why)
	os.Exit(1)
}

// monitored emits what the monitor tells; a guest may reboot as often as it likes.
func (g *Guard) monitored(kind event.Kind, fields event.Fields) {
	g.flood.Emit(event.Alike{Sort: string(kind), Sum: []string{"count"}, Always: true}, event.Event{Kind: kind, Fields: fields})
}

// told emits what a check found: a guest may change what there is to be found as often as it likes.
func (g *Guard) told(kind event.Kind, fields event.Fields) {
	subject, _ := fields["subject"].(string)
	g.flood.Emit(event.Alike{Sort: string(kind) + " " + subject, Sum: []string{"count"}}, event.Event{Kind: kind, Fields: fields})
}

// qemu waits for the monitor.
func (g *Guard) qemu(ctx context.Context) (*machine.Monitor, error) {
	select {
	case <-g.monitorUp:
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	return g.monitor, g.monitorErr
}

func monitorCall(f func(*machine.Monitor, context.Context) error) func(*Guard, context.Context, link.Request) (link.Response, error) {
	return func(g *Guard, ctx context.Context, r link.Request) (link.Response, error) {
		closeFiles(r.Files)
		m, err := g.qemu(ctx)
		if err != nil {
			return link.Response{}, err
		}
		return link.Response{}, f(m, ctx)
	}
}

// greetTime is how long a QEMU that was just started may take for each of its first words: it needs a tenth of a second
// of a processor for them. One that was found running may be busy with its disk, and has as long as the daemon waits.
const greetTime = 15 * time.Second

// run lets the guest go, unless this guard found it running.
func (g *Guard) run(ctx context.Context, r link.Request) (link.Response, error) {
	closeFiles(r.Files)
	var q link.Run
	if err := r.Decode(&q); err != nil {
		return link.Response{}, err
	}
	if g.cfg.Running {
		m, err := g.qemu(ctx)
		if err == nil && g.cfg.Until != nil {
			g.until.arm(ctx, m, *g.cfg.Until) // what is behind it already is told by who waits for it
		}
		return link.Response{}, err
	}
	silent := fmt.Errorf("it runs, and has not greeted on its monitor in %s", greetTime)
	up, cancel := context.WithTimeoutCause(ctx, greetTime, silent)
	defer cancel()
	m, err := g.qemu(up)
	if err != nil {
		return link.Response{}, causeOf(up, err)
	}
	if g.cfg.Until != nil {
		if err := g.until.arm(ctx, m, *g.cfg.Until); err != nil {
			return link.Response{}, err
		}
	}
	g.mu.Lock()
	g.cfg.Ahead = false
	g.mu.Unlock()
	if q.Stays {
		return link.Response{}, nil
	}
	deaf := fmt.Errorf("it runs, and has not answered its monitor's \"cont\" in %s", greetTime)
	going, cancel := context.WithTimeoutCause(ctx, greetTime, deaf)
	defer cancel()
	if err := m.Continue(going); err != nil {
		return link.Response{}, causeOf(going, err)
	}
	return link.Response{}, nil
}

// causeOf is why ctx ended where it did, and else err.
func causeOf(ctx context.Context, err error) error {
	if cause := context.Cause(ctx); cause != nil {
		return cause
	}
	return err
}

// powerDown presses the power button, and asks the guest agent too where there is one: a guest without ACPI events
// hears only that.
func (g *Guard) powerDown(ctx context.Context, r link.Request) (link.Response, error) {
	closeFiles(r.Files)
	m, err := g.qemu(ctx)
	if err != nil {
		return link.Response{}, err
	}
	if err := m.PowerDown(ctx); err != nil {
		return link.Response{}, err
	}
	if g.agent != nil {
		go func() {
			ctx, cancel := context.WithTimeout(g.ctx, 5*time.Second)
			defer cancel()
			g.agent.Shutdown(ctx)
		}()
	}
	return link.Response{}, nil
}

// ending waits for QEMU's last word: the daemon asks when QEMU is gone.
func (g *Guard) ending(ctx context.Context, r link.Request) (link.Response, error) {
	closeFiles(r.Files)
	m, err := g.qemu(ctx)
	if err != nil {
		return link.Response{Body: machine.Ending{}}, nil // it never came up
	}
	select {
	case <-m.Done():
	case <-ctx.Done():
	case <-time.After(3 * time.Second):
	}
	g.disk.report()
	g.flood.Flush()
	g.console.lines.end()
	g.inputs.Load().Close()
	return link.Response{Body: m.Ending()}, nil
}

func (g *Guard) watch(_ context.Context, r link.Request) (link.Response, error) {
	closeFiles(r.Files)
	var w link.Watch
	if err := r.Decode(&w); err != nil {
		return link.Response{}, err
	}
	g.prober.watch(w.Paths)
	return link.Response{}, g.disk.watch(w.Paths)
}

func (g *Guard) cpu(_ context.Context, r link.Request) (link.Response, error) {
	g.sampler.clock.set(r.Files)
	return link.Response{}, nil
}

func (g *Guard) giveRAM(_ context.Context, r link.Request) (link.Response, error) {
	closeFiles(r.Files)
	f, err := dup(g.ram)
	if err != nil {
		return link.Response{}, err
	}
	return link.Response{Files: []*os.File{f}}, nil
}

func (g *Guard) attachConsole(_ context.Context, r link.Request) (link.Response, error) {
	if len(r.Files) != 1 {
		closeFiles(r.Files)
		return link.Response{}, errors.New("console: no socket was given")
	}
	c, err := net.FileConn(r.Files[0])
	closeFiles(r.Files)
	if err != nil {
		return link.Response{}, err
	}
	if err := g.console.attach(c); err != nil {
		c.Close()
		return link.Response{}, err
	}
	return link.Response{}, nil
}

func (g *Guard) status(ctx context.Context, r link.Request) (link.Response, error) {
	closeFiles(r.Files)
	s := link.GuardStatus{Introspection: g.views.state(), Probe: g.prober.state()}
	g.disk.status(&s)
	select {
	case <-g.monitorUp:
		if g.monitor != nil {
			s.QEMU, _ = g.monitor.Status(ctx)
			s.Instructions, _ = g.monitor.Instructions(ctx)
		}
	default:
	}
	return link.Response{Body: s}, nil
}

func closeFiles(files []*os.File) {
	for _, f := range files {
		f.Close()
	}
}
