// Package daemon is vigia's one process per host that knows all machines: it opens things and hands their descriptors to
// workers, keeps records, joins the rules to what acts, writes the ledger, and serves the API. It never looks at a byte
// that a guest wrote, but in typed, size-capped events.
//
//	API (server*.go) ─┐
//	                  ├─ machine (machine.go, launch.go, adopt.go) ── QEMU, guard, gate (worker.go)
//	rules (respond.go)┘                                                    │ events
//	        ▲──────────────────────── bus (bus.go) ◀───────────────────────┘
//	                                    └──────▶ ledger
//
// Machines do not depend on it: guards and gates keep their events until a daemon has taken them, and the next daemon on
// the same state finds every machine again.
package daemon

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"strings"
	"sync"
	"time"

	"vigia/internal/checkpoint"
	"vigia/internal/convert"
	"vigia/internal/event"
	"vigia/internal/host"
	"vigia/internal/image"
	"vigia/internal/jail"
	"vigia/internal/ledger"
	"vigia/internal/link"
	"vigia/internal/policy"
	"vigia/internal/store"
	"vigia/internal/vm"
)

// Options of a daemon.
type Options struct {
	State   string // absolute path of the state directory
	Version string
	// Accelerator is kvm, tcg, or auto: what was found to work.
	Accelerator string
	Rules       string // directory of the owner's rules; empty: rules in the state directory
	Check       link.CheckSchedule
	DayBudget   int64 // of the ledger, by machine, in bytes; 0: no bound
	Spares      int   // clones that are made ahead, at most
	Log         *slog.Logger
	// Ready is called once the API answers.
	Ready func()
}

// Daemon is one running daemon.
type Daemon struct {
	ctx         context.Context
	cancel      context.CancelFunc
	opts        Options
	log         *slog.Logger
	files       layout
	lock        *store.Lock
	store       *store.Store
	ledger      *ledger.Log
	images      *image.Store
	bus         *bus
	asked       *event.Flood // calls that change nothing
	left        unfinished   // by the last daemon
	groups      *jail.Tree
	checkpoints *checkpoint.Store
	host        host.Host
	qemu        string // the program
	qemuVersion string
	accelerator string
	started     time.Time
	responses   chan policy.Decision
	convert     convert.Worker

	mu       sync.Mutex
	machines map[string]*machine // by name
	shared   map[checkpoint.ID]*shared
	spares   spares
	rules    []policy.Rule
	stopping bool
	tasks    sync.WaitGroup

	// lineage is held by who takes a checkpoint or a layer from a list that others may go on from, and by who counts those lists.
	lineage sync.Mutex
	pinned  map[checkpoint.ID]int // by who is about to go on from them
	kept    map[string]int        // layers that nobody names yet, or any more (merge.go)
	merging sync.Mutex
	booting sync.Mutex    // the making of what images are booted by
	keeping chan struct{} // holds a token for each machine that is being saved by its rule
}

// Run is a daemon from start to end: it returns when ctx has ended and everything is put away. Machines run on.
func Run(ctx context.Context, opts Options) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	d := &Daemon{ctx: ctx, cancel: cancel, opts: opts, log: opts.Log, files: newLayout(opts.State), started: time.Now(),
		machines: map[string]*machine{}, shared: map[checkpoint.ID]*shared{}, pinned: map[checkpoint.ID]int{}, kept: map[string]int{}, keeping: make(chan struct{}, keepAtOnce), responses: make(chan policy.Decision, 1024)}
	d.spares.most, d.spares.waits = opts.Spares, (*launch).waits
	var back undo
	defer back.unwind()
	for _, step := range []func(*undo) error{d.takeState, d.findHost, d.loadRules, d.openLedger, d.openStore, d.openImages, d.openCheckpoints, d.adoptAll, d.serve} {
		if err := step(&back); err != nil {
			return err
		}
	}
	var kept uint64
	d.every(ctx, time.Second, func(now time.Time) {
		d.bus.tick(now)
		d.expire(ctx, now)
		d.keepUp(now)
		d.keepSpares(now)
		d.keepHead(&kept)
	})
	d.spawn(func() { d.respondAll(ctx) })
	d.spawn(func() { d.mergeLayers(ctx) })
	d.finish(d.left, time.Now())
	if opts.Ready != nil {
		opts.Ready()
	}
	<-ctx.Done()
	return nil
}

// begin counts a task that the daemon's end waits for; it is refused once the daemon ends. The task calls tasks.Done.
func (d *Daemon) begin() bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.stopping {
		return false
	}
	d.tasks.Add(1)
	return true
}

// spawn runs f as a task.
func (d *Daemon) spawn(f func()) bool {
	if !d.begin() {
		return false
	}
	go func() {
		defer d.tasks.Done()
		f()
	}()
	return true
}

func (d *Daemon) every(ctx context.Context, period time.Duration, f func(time.Time)) {
	d.spawn(func() {
		t := time.NewTicker(period)
		defer t.Stop()
		for {
			select {
			case now := <-t.C:
				f(now)
			case <-ctx.Done():
				return
			}
		}
	})
}

func (d *Daemon) takeState(back *undo) error {
	if err := d.files.prepare(); err != nil {
		return err
	}
	lock, err := store.LockDir(d.files.root)
	if errors.Is(err, store.ErrLocked) {
		return fmt.Errorf("a vigia daemon runs already on state %s: %w", d.files.root, err)
	}
	if err != nil {
		return err
	}
	d.lock = lock
	back.push(func() {
		if d.groups != nil {
			d.groups.Remove() // if the last machine is gone
		}
		os.Remove(d.files.ram)
		lock.Release()
	})
	return nil
}

// findHost finds out what the host can do before anything depends on it.
func (d *Daemon) findHost(*undo) error {
	h := &d.host // it remembers what it has tried
	h.State = d.files.root
	qemu, err := h.QEMU(d.ctx)
	if err != nil {
		return err
	}
	d.qemu, d.qemuVersion = qemu.Path, qemu.Version.String()
	accelerator, err := choose(d.opts.Accelerator, h.Accelerator())
	if err != nil {
		return err
	}
	d.accelerator = accelerator.Name
	if d.accelerator != "kvm" {
		d.log.Warn("machines run under TCG, which is no isolation boundary by itself: QEMU's jail is all there is", "why", accelerator.Why)
	}
	if d.groups, err = jail.OpenTree("/sys/fs/cgroup", "/proc/self", d.files.tag()); err != nil {
		d.log.Warn("no control groups: nothing bounds what a machine takes of the host", "error", err)
	}
	return nil
}

// choose takes what was asked for over what was found, but not KVM where it does not work: the guest would hang.
func choose(asked string, found host.Accelerator) (host.Accelerator, error) {
	switch asked {
	case "", "auto", found.Name:
		return found, nil
	case "tcg":
		return host.Accelerator{Name: "tcg", Why: "asked for"}, nil
	case "kvm":
		return found, fmt.Errorf("accelerator kvm does not work on this host: %s: leave the option out, or see vigia doctor", found.Why)
	}
	return found, fmt.Errorf("accelerator %q: use auto, kvm or tcg", asked)
}

func (d *Daemon) openLedger(back *undo) error {
	l, err := ledger.Open(d.ctx, d.files.path("ledger"), ledger.Options{})
	if err != nil {
		return fmt.Errorf("ledger: %w", err)
	}
	var b [8]byte
	rand.Read(b[:])
	d.ledger = l
	d.bus = newBus(hex.EncodeToString(b[:]), d.log)
	d.bus.decide, d.bus.panicked = d.decided, d.panicked
	d.bus.budgets.day = d.opts.DayBudget
	d.asked = event.NewFlood("daemon", func(e event.Event) { d.bus.emit(e.Machine, e.Kind, e.Fields) })
	d.asked.Waiting = d.bus.hold
	if err := d.bus.recall(d.ctx, l); err != nil {
		l.Close(d.ctx)
		return fmt.Errorf("ledger: %w", err)
	}
	d.left, err = d.bus.rebuild(d.ctx, l, d.rules)
	if err != nil {
		l.Close(d.ctx)
		return fmt.Errorf("ledger: %w", err)
	}
	unclean := d.files.markRunning()
	tellLoss, err := d.bus.inherit(d.files.tallyFile(), unclean)
	if err != nil {
		l.Close(d.ctx)
		return err
	}
	writing, stop := context.WithCancel(context.WithoutCancel(d.ctx))
	done := make(chan struct{})
	go func() {
		d.bus.write(writing, l)
		close(done)
	}()
	d.bus.emit("", event.VigiaStarted, event.Fields{"version": d.opts.Version, "unclean": unclean})
	tellLoss()
	back.push(func() {
		d.asked.Flush()
		d.bus.sumUp()
		d.bus.emit("", event.VigiaStopped, nil)
		for i := 0; i < 100 && !d.bus.settled(); i++ {
			time.Sleep(50 * time.Millisecond)
		}
		stop()
		<-done
		if d.bus.settled() {
			os.Remove(d.files.tallyFile())
		}
		ctx, cancel := context.WithTimeout(context.WithoutCancel(d.ctx), 10*time.Second)
		defer cancel()
		if err := l.Close(ctx); err != nil {
			d.log.Error("the ledger could not be closed", "error", err)
		}
		d.files.markEnded()
	})
	return nil
}

func (d *Daemon) openStore(back *undo) error {
	s, err := store.Open(d.ctx, store.Options{Dir: d.files.path("store")})
	if err != nil {
		return fmt.Errorf("store: %w", err)
	}
	d.store = s
	back.push(func() { s.Close() })
	return nil
}

func (d *Daemon) openImages(*undo) error {
	tag := d.files.tag() + "/convert"
	d.convert = convert.Worker{Tag: tag, User: convertUser(), Groups: d.groups}
	s, err := image.Open(d.files.path("images"), image.Options{Cache: d.files.path("cache"),
		Worker:  d.convert,
		Confine: convert.Tools{Tag: tag, User: convertUser(), Groups: d.groups}.Run})
	if err != nil {
		return err
	}
	d.images = s
	return nil
}

func (d *Daemon) openCheckpoints(*undo) error {
	s, err := checkpoint.Open(d.files.path("checkpoints"))
	if err != nil {
		return fmt.Errorf("checkpoints: %w", err)
	}
	for id, err := range s.Damaged() {
		d.log.Error("a checkpoint can't be used", "checkpoint", id, "error", err)
	}
	d.checkpoints = s
	return nil
}

// group makes the control group of one process of a machine, or says why there is none.
func (d *Daemon) group(m *machine, process string, l jail.Limits) (*jail.Group, error) {
	if d.groups == nil {
		return nil, nil
	}
	return d.groups.New(string(m.id())+"-"+process, l)
}

// sweepRun removes what a run, or a start that was cut short, leaves on the host: processes, sockets, the RAM file's
// name, control groups.
func (d *Daemon) sweepRun(id vm.ID) {
	d.sweep(jail.Search{State: d.files.tag() + "/" + string(id), Tree: d.groups,
		Known: func(string, int) bool { return false },
		Keep:  func(name string) bool { return !strings.HasPrefix(name, string(id)) }})
	os.Remove(d.files.ramFile(id))
	os.RemoveAll(d.files.run(id))
}

func (d *Daemon) sweep(s jail.Search) {
	found, err := jail.Leftovers(s)
	if err != nil {
		d.log.Warn("what was left behind can't be listed", "error", err)
	}
	for _, l := range found {
		if err := l.Remove(); err != nil {
			d.log.Warn("something stays behind", "what", l.String(), "error", err)
		}
	}
}

// watched are the paths that the rules in force need to be told of.
func (d *Daemon) watched() []string {
	d.mu.Lock()
	defer d.mu.Unlock()
	return policy.WatchPaths(d.rules)
}

// machine finds a machine by name.
func (d *Daemon) machine(name string) (*machine, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if m := d.machines[name]; m != nil {
		return m, nil
	}
	return nil, noMachine(name)
}

func noMachine(name string) error {
	return fmt.Errorf("%w: %q: vigia ls shows the machines there are", errNoMachine, event.Text([]byte(name)))
}

var errNoMachine = errors.New("no such machine")

// tellGuards gives every running guard the paths to watch, after the rules have changed.
func (d *Daemon) tellGuards(ctx context.Context) {
	paths := d.watched()
	d.discard(d.spares.drop("")) // made with the paths of before
	ctx, cancel := context.WithTimeout(ctx, workerStart)
	defer cancel()
	var all sync.WaitGroup // one that does not answer keeps no other waiting
	for _, m := range d.all() {
		if guard, _ := m.bothWorkers(); !guard.gone() { // one that is being replaced is given them at its start
			all.Go(func() {
				if _, err := guard.conn.Call(ctx, link.CallWatch, link.Watch{Paths: paths}, nil); err != nil {
					d.log.Error("a guard does not take the paths to watch", "machine", m.name(), "error", err)
				}
			})
		}
	}
	all.Wait()
}

func (d *Daemon) all() []*machine {
	d.mu.Lock()
	defer d.mu.Unlock()
	out := make([]*machine, 0, len(d.machines))
	for _, m := range d.machines {
		out = append(out, m)
	}
	return out
}

// expire stops machines whose time is over.
func (d *Daemon) expire(ctx context.Context, now time.Time) {
	for _, m := range d.all() {
		e := m.rec.Spec.Expires
		if st := m.state(); e.IsZero() || now.Before(e) || st == vm.Stopped || st == vm.Failed || st == vm.Stopping {
			continue
		}
		d.spawn(func() {
			d.log.Info("machine has expired, it is stopped", "machine", m.name())
			if err := m.stop(ctx, false, graceTime); err != nil && !errors.Is(err, errState) {
				d.log.Error("an expired machine could not be stopped", "machine", m.name(), "error", err)
			}
		})
	}
}
