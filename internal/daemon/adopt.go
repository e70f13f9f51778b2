package daemon

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"vigia/internal/event"
	"vigia/internal/jail"
	"vigia/internal/link"
	"vigia/internal/store"
	"vigia/internal/vm"
)

// adoptAll reads the records and finds the machines that run again: each is as it was, whether this daemon or an earlier
// one started it. What crashed starts left behind is removed.
func (d *Daemon) adoptAll(*undo) error {
	items, err := store.List[record](d.ctx, d.store, "machines/")
	if err != nil {
		return fmt.Errorf("records of machines: %w", err)
	}
	for _, item := range items {
		m := &machine{d: d, rec: item.Value}
		d.machines[m.name()] = m
		if m.rec.Run != nil {
			d.adopt(m)
		}
	}
	return d.sweepUnknown()
}

// adopt finds the processes of one machine.
func (d *Daemon) adopt(m *machine) {
	run := m.rec.Run
	m.guard = d.adoptWorker(m, "guard", run.Guard)
	m.gate = d.adoptWorker(m, "gate", run.Gate)
	qemu, err := jail.Adopt(run.QEMU.PID, run.QEMU.Start)
	if err != nil {
		m.finish(d.ctx, jail.Exit{})
		return
	}
	m.qemu, m.ended = qemu, make(chan struct{})
	if m.guard != nil {
		if files, err := m.guard.conn.Call(d.ctx, link.CallRAM, nil, nil); err == nil && len(files) == 1 {
			m.ram = files[0]
		} else {
			closeFiles(files)
		}
	}
	d.bus.emit(m.name(), event.MachineStarted, event.Fields{"accelerator": run.Accelerator, "pid": int64(qemu.PID), "adopted": true})
	d.watchRun(m)
}

// adoptWorker joins a worker that runs; nil where it has died, and watchRun will replace it.
func (d *Daemon) adoptWorker(m *machine, name string, ref procRef) *worker {
	proc, err := jail.Adopt(ref.PID, ref.Start)
	if err != nil {
		return nil
	}
	ctx, cancel := context.WithTimeout(d.ctx, workerStart)
	defer cancel()
	w, err := d.joinWorker(ctx, m, name, proc)
	if err != nil || !w.hello.Configured {
		d.log.Error("a worker does not answer, it is replaced", "worker", name, "machine", m.name(), "error", err)
		proc.Kill()
		<-proc.Done()
		proc.Close()
		return nil
	}
	return w
}

// watchRun follows a machine that runs: QEMU's end, and its workers' deaths.
func (d *Daemon) watchRun(m *machine) {
	qemu, ended := m.qemu, m.ended
	go m.watch(qemu, ended)
	d.spawn(func() { d.keepWorkers(m, ended) })
}

// Replacements of workers that die again and again end: the machine is then stopped, since nobody guards it.
const (
	replaceMost   = 10
	replaceWindow = time.Minute
)

// keepWorkers replaces a guard or gate that died, as long as the machine runs.
func (d *Daemon) keepWorkers(m *machine, ended chan struct{}) {
	for {
		select {
		case <-ended:
			return
		default:
		}
		guard, gate := m.bothWorkers()
		needGate := m.rec.Spec.Net.Mode == vm.NetNAT
		var err error
		switch {
		case guard == nil || guard.gone():
			err = d.replace(m, "guard", guard)
		case needGate && (gate == nil || gate.gone()):
			err = d.replace(m, "gate", gate)
		default:
			var gateDone <-chan struct{}
			if gate != nil {
				gateDone = gate.conn.Done()
			}
			select {
			case <-guard.conn.Done():
			case <-gateDone:
			case <-ended:
				return
			case <-d.ctx.Done():
				return
			}
			continue
		}
		if err == nil {
			continue
		}
		d.log.Error("a worker could not be replaced", "machine", m.name(), "error", err)
		if m.tooMany() {
			d.log.Error("its workers keep dying, the machine is ended", "machine", m.name())
			m.mu.Lock()
			if m.qemu != nil {
				m.qemu.Kill()
			}
			m.mu.Unlock()
		}
		select {
		case <-time.After(time.Second):
		case <-ended:
			return
		case <-d.ctx.Done():
			return
		}
	}
}

func (m *machine) bothWorkers() (guard, gate *worker) {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.guard, m.gate
}

// gone reports whether the worker's connection has ended; a worker without one is of no use.
func (w *worker) gone() bool { return w.conn.Err() != nil }

func (m *machine) tooMany() bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	n := 0
	for _, t := range m.replaced {
		if time.Since(t) < replaceWindow {
			n++
		}
	}
	return n >= replaceMost
}

func ended(p *jail.Process) bool {
	select {
	case <-p.Done():
		return true
	default:
		return false
	}
}

// replace ends what is left of a worker and puts a new one in its place, unless QEMU is gone as well.
func (d *Daemon) replace(m *machine, name string, old *worker) error {
	m.mu.Lock()
	qemu := m.qemu
	m.mu.Unlock()
	if qemu == nil || ended(qemu) {
		time.Sleep(50 * time.Millisecond) // m.watch puts the run away
		return nil
	}
	if old != nil {
		reason := "its connection ended"
		select {
		case <-old.proc.Done():
			reason = old.proc.Exit().String()
		case <-time.After(200 * time.Millisecond):
		}
		old.end()
		d.bus.emit(m.name(), event.WorkerDied, event.Fields{"worker": name, "reason": reason})
	}
	m.mu.Lock()
	m.replaced = append(m.replaced, time.Now())
	m.mu.Unlock()
	ctx, cancel := context.WithTimeout(d.ctx, runTime)
	defer cancel()
	if name == "gate" {
		return d.replaceGate(ctx, m, qemu)
	}
	return d.replaceGuard(ctx, m, qemu)
}

func (d *Daemon) replaceGuard(ctx context.Context, m *machine, qemu *jail.Process) error {
	img, err := d.images.Get(m.rec.Spec.ImageID)
	if err != nil {
		return err
	}
	w, err := d.spawnGuard(ctx, m, img, true)
	if err != nil {
		return err
	}
	if _, err := w.conn.Call(ctx, link.CallRun, nil, nil); err != nil {
		w.end()
		return err
	}
	if err := m.enrol(ctx, qemu, w, func(r *runState) { m.guard, r.Guard = w, refOf(w.proc) }); err != nil {
		return err
	}
	d.giveClock(ctx, m, qemu.PID)
	return nil
}

// enrol makes a new worker the machine's. One that comes when its run is over is ended: nobody would know of it.
func (m *machine) enrol(ctx context.Context, qemu *jail.Process, w *worker, take func(*runState)) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.qemu != qemu || m.rec.Run == nil {
		w.end()
		return nil
	}
	take(m.rec.Run)
	m.rec.Run.InForce[w.name] = w.proc.Measures
	return m.save(ctx)
}

func (d *Daemon) replaceGate(ctx context.Context, m *machine, qemu *jail.Process) error {
	m.mu.Lock()
	run := m.rec.Run
	m.mu.Unlock()
	if run == nil {
		return nil
	}
	files, _, err := bindPublished(run.Publish)
	if err != nil {
		return err
	}
	defer closeFiles(files)
	w, err := d.spawnGate(ctx, m, run.Publish, files)
	if err != nil {
		return err
	}
	return m.enrol(ctx, qemu, w, func(r *runState) { m.gate, r.Gate = w, refOf(w.proc) })
}

// sweepUnknown removes what belongs to no machine that runs: a crash came between two steps.
func (d *Daemon) sweepUnknown() error {
	running, known := map[string]bool{}, map[string]bool{}
	for _, m := range d.machines {
		known[string(m.id())] = true
		if m.qemu != nil {
			running[string(m.id())] = true
		}
	}
	machineOf := func(name string) string { id, _, _ := strings.Cut(name, "-"); return id }
	d.sweep(jail.Search{State: d.files.tag(), Tree: d.groups,
		Known: func(tag string, _ int) bool {
			return running[strings.Split(strings.TrimPrefix(tag, d.files.tag()+"/"), "/")[0]]
		},
		Keep: func(name string) bool { return running[machineOf(name)] }})
	return errors.Join(sweepDir(d.files.path("run"), running), sweepDir(d.files.ram, running), sweepDir(d.files.path("machines"), known))
}

// sweepDir removes the entries that are named after a machine which is not to be kept.
func sweepDir(dir string, keep map[string]bool) error {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return err
	}
	for _, e := range entries {
		id := strings.TrimSuffix(e.Name(), ".ram")
		if _, err := vm.ParseID(id); err != nil || keep[id] {
			continue
		}
		if err := os.RemoveAll(filepath.Join(dir, e.Name())); err != nil {
			return err
		}
	}
	return nil
}

var errExists = errors.New("exists already")
