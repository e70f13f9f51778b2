package daemon

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"sync"

	"vigia/internal/event"
	"vigia/internal/jail"
	"vigia/internal/link"
	"vigia/internal/store"
	"vigia/internal/vm"
)

// adoptAll reads the records and finds the machines that run again: each is as it was, whether this daemon or an earlier
// one started it. What crashed starts left behind is removed. Its way back is the daemon's farewell: everything that
// works on machines ends, and their workers keep their events from then on.
func (d *Daemon) adoptAll(back *undo) error {
	back.push(d.farewell)
	items, err := store.List[record](d.ctx, d.store, "machines/")
	if err != nil {
		return fmt.Errorf("records of machines: %w", err)
	}
	// All are known before one is settled: what nobody needs is removed then.
	var all []*machine
	for _, item := range items {
		m := newMachine(d, item.Value)
		d.machines[m.name()] = m
		all = append(all, m)
	}
	var wg sync.WaitGroup
	for _, m := range all {
		if m.rec.Run != nil {
			wg.Go(func() { d.adopt(m) })
		} else {
			d.settleStopped(m)
		}
	}
	wg.Wait()
	d.sweepLayers()
	return d.sweepUnknown()
}

// settleStopped ends what was begun with the disk of a machine that does not run.
func (d *Daemon) settleStopped(m *machine) {
	if err := errors.Join(m.recoverLayers(d.ctx), m.finishRollback(d.ctx)); err != nil {
		d.log.Error("a machine's disk is not settled", "machine", m.name(), "error", err)
	}
	d.settleReplay(m)
}

func (d *Daemon) farewell() {
	d.mu.Lock()
	d.stopping = true
	d.mu.Unlock()
	d.cancel()
	d.tasks.Wait()
	d.discard(d.spares.drop(""))
	for _, m := range d.all() {
		for _, w := range []*worker{m.guard, m.gate} {
			if w != nil {
				w.conn.Close()
			}
		}
	}
}

// adopt finds the processes of one machine.
func (d *Daemon) adopt(m *machine) {
	ref := m.rec.Run
	m.guard = d.adoptWorker(m, "guard", ref.Guard)
	m.gate = d.adoptWorker(m, "gate", ref.Gate)
	for _, missed := range []struct {
		name   string
		ref    procRef
		joined *worker
	}{{"guard", ref.Guard, m.guard}, {"gate", ref.Gate, m.gate}} {
		if missed.ref.PID != 0 && missed.joined == nil {
			d.bus.diedUnseen(m.name(), missed.name, missed.ref.Source)
		}
	}
	qemu, err := jail.Adopt(ref.QEMU.PID, ref.QEMU.Start)
	if err != nil {
		m.finish(d.ctx, jail.Exit{})
		d.settleStopped(m)
		return
	}
	if m.guard != nil {
		ctx, cancel := context.WithTimeout(d.ctx, workerStart)
		files, err := m.giveBackRAM(ctx, qemu.PID)
		cancel()
		if err == nil && len(files) == 1 {
			m.keepRAM(files[0])
		} else {
			closeFiles(files)
			d.log.Warn("a guard does not give its machine's memory", "machine", m.name(), "error", err)
		}
	}
	if err := m.recoverLayers(d.ctx); err != nil {
		d.log.Error("the layers of a disk are not settled: no checkpoint can be made", "machine", m.name(), "error", err)
	}
	r := &run{qemu: qemu, ended: make(chan struct{})}
	m.mu.Lock()
	m.run = r
	m.mu.Unlock()
	d.bus.emit(m.name(), event.MachineStarted, event.Fields{"accelerator": ref.Accelerator, "pid": int64(qemu.PID), "adopted": true})
	d.catchUp(m)
	m.cutShort()
	d.spawn(func() { d.oversee(m, r) })
	m.arrive(r)
	d.watchReplay(m, r)
	d.watchRecording(m, r)
	switch ref.Asked { // a stop that the last daemon began
	case vm.EndedStopped:
		d.spawn(func() { m.shutDown(d.ctx, r, graceTime) })
	case vm.EndedForced:
		d.spawn(func() { m.force(d.ctx, r) })
	}
}

// catchUp tells adopted workers what may have changed between the last daemon's word to them and its end.
func (d *Daemon) catchUp(m *machine) {
	ctx, cancel := context.WithTimeout(d.ctx, workerStart)
	defer cancel()
	if m.gate != nil {
		if err := m.settleGate(ctx, m.gate); err != nil {
			d.log.Error("a gate does not take its settings, it is replaced", "machine", m.name(), "error", err)
			m.gate.conn.Close()
		}
	}
	if m.guard != nil {
		m.guard.conn.Call(ctx, link.CallWatch, link.Watch{Paths: d.watched()}, nil)
		m.guard.conn.Call(ctx, link.CallSchedule, d.opts.Check, nil)
		m.settlePause(ctx, m.guard)
	}
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

// sweepUnknown removes what belongs to no machine that runs: a crash came between two steps.
func (d *Daemon) sweepUnknown() error {
	running, known := map[string]bool{}, map[string]bool{}
	for _, m := range d.machines {
		known[string(m.id())] = true
		if m.run != nil {
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
	if errors.Is(err, fs.ErrNotExist) { // somebody tidied up /dev/shm
		return nil
	}
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
