package daemon

import (
	"context"
	"errors"
	"os"
	"time"

	"vigia/internal/event"
	"vigia/internal/jail"
	"vigia/internal/link"
	qemu "vigia/internal/machine"
	"vigia/internal/vm"
)

// run is one life of QEMU under this daemon: from its start, or from its being found, until what it leaves is put away.
// One goroutine (oversee) has it: it replaces workers and, at the end, puts everything away, so that the two can't meet.
type run struct {
	qemu     *jail.Process
	ended    chan struct{} // closed once everything is put away
	replaced []time.Time   // when workers were replaced
	arrived  chan struct{} // closed once a guest that goes on from a checkpoint was helped; nil: it booted
}

// Replacements of workers that die again and again end: the machine is then stopped, since nobody guards it.
const (
	replaceMost   = 10
	replaceWindow = time.Minute
	replaceWait   = time.Second // after a replacement that failed
)

// oversee follows a run to its end, or to the daemon's.
func (d *Daemon) oversee(m *machine, r *run) {
	for {
		guard, gate := m.bothWorkers()
		wait := closedChannel
		name, old, missing := m.missing(guard, gate)
		if !missing {
			wait = nil
		}
		select {
		case <-r.qemu.Done():
			m.finish(context.WithoutCancel(d.ctx), r.qemu.Exit())
			close(r.ended)
			return
		case <-d.ctx.Done():
			return
		case <-guard.done():
		case <-gate.done():
		case <-wait:
		}
		if missing {
			d.replace(m, r, name, old)
		}
	}
}

var closedChannel = func() chan struct{} { c := make(chan struct{}); close(c); return c }()

// missing names a worker that the machine should have and has not.
func (m *machine) missing(guard, gate *worker) (name string, old *worker, missing bool) {
	switch {
	case guard.gone():
		return "guard", guard, true
	case m.rec.Spec.Net.Mode == vm.NetNAT && gate.gone():
		return "gate", gate, true
	}
	return "", nil, false
}

// replace ends what is left of a worker and puts a new one in its place.
func (d *Daemon) replace(m *machine, r *run, name string, old *worker) {
	// QEMU and its guard often end together, on a power-off or a kill: then there is nothing to replace.
	if waitFor(d.ctx, r.qemu.Done(), 50*time.Millisecond) || d.ctx.Err() != nil {
		return
	}
	if old != nil {
		reason := "its connection ended"
		if waitFor(d.ctx, old.proc.Done(), 200*time.Millisecond) {
			reason = old.proc.Exit().String()
		}
		old.end()
		d.bus.emit(m.name(), event.WorkerDied, event.Fields{"worker": name, "reason": reason})
	}
	if r.tooMany(time.Now()) {
		d.log.Error("its workers keep dying, the machine is ended", "machine", m.name())
		m.note("its " + name + " died again and again, and a machine that nobody guards is ended")
		m.setWorker(name, nil)
		r.qemu.Kill()
		<-r.qemu.Done()
		return
	}
	ctx, cancel := context.WithTimeout(d.ctx, runTime)
	defer cancel()
	go func() {
		select {
		case <-r.qemu.Done():
			cancel()
		case <-ctx.Done():
		}
	}()
	var err error
	if name == "gate" {
		err = d.replaceGate(ctx, m)
	} else {
		err = d.replaceGuard(ctx, m, r)
	}
	if err != nil && ctx.Err() == nil {
		d.log.Error("a worker could not be replaced, it is tried again", "worker", name, "machine", m.name(), "error", err)
		waitFor(ctx, r.qemu.Done(), replaceWait)
	}
}

// tooMany counts a replacement.
func (r *run) tooMany(now time.Time) bool {
	recent := r.replaced[:0]
	for _, t := range r.replaced {
		if now.Sub(t) < replaceWindow {
			recent = append(recent, t)
		}
	}
	r.replaced = append(recent, now)
	return len(r.replaced) > replaceMost
}

func (d *Daemon) replaceGuard(ctx context.Context, m *machine, r *run) error {
	img, err := d.images.Get(m.rec.Spec.ImageID)
	if err != nil {
		return err
	}
	m.laying.Lock()
	defer m.laying.Unlock()
	m.setWorker("guard", nil)
	w, err := d.spawnGuard(ctx, m, img, r.qemu, nil)
	if err != nil {
		return err
	}
	if _, err := w.conn.Call(ctx, link.CallRun, link.Run{}, nil); err != nil {
		w.end()
		return err
	}
	if m.private() {
		if err := m.showMemory(ctx, w, r.qemu.PID); err != nil {
			d.log.Warn("the new guard can't see its machine's memory", "machine", m.name(), "error", err)
		}
	}
	if m.stands() { // somebody is at it, or will be
		w.conn.Call(ctx, link.CallHold, nil, nil)
	} else {
		m.settlePause(ctx, w) // the last guard may have died in the middle of a checkpoint
	}
	d.giveClock(ctx, m, w, r.qemu.PID)
	m.keepInputs(ctx, m.record().Run.Started, w)
	m.setWorker("guard", w)
	return m.change(ctx, func(r *record) { r.Run.worked(w) })
}

func (d *Daemon) replaceGate(ctx context.Context, m *machine) error {
	m.setWorker("gate", nil)
	files, publish, err := bindPublished(m.record().Run.Publish)
	if err != nil {
		return err
	}
	defer closeFiles(files)
	w, err := d.spawnGate(ctx, m, publish, files)
	if err != nil {
		return err
	}
	m.keepInputs(ctx, m.record().Run.Started, w)
	m.setWorker("gate", w)
	if err := m.settleGate(ctx, w); err != nil { // what was asked for while there was none
		w.end()
		return err
	}
	return m.change(ctx, func(r *record) { r.Run.worked(w) })
}

// settleGate tells a new gate what the record says: rules or quarantine may have changed since it was configured.
func (m *machine) settleGate(ctx context.Context, gate *worker) error {
	rec := m.record()
	if _, err := gate.conn.Call(ctx, link.CallQuarantine, link.Quarantine{On: rec.Quarantined}, nil); err != nil {
		return err
	}
	_, err := gate.conn.Call(ctx, link.CallRules, link.Rules{Rules: rec.Spec.Net.Rules}, nil)
	return err
}

// finish tells how the run ended and removes what it left: guard, gate, sockets, RAM file, control groups.
func (m *machine) finish(ctx context.Context, exit jail.Exit) {
	guard, gate := m.bothWorkers()
	rec := m.record()
	ending := m.ending(ctx, guard, rec.Run.Asked, exit)
	if gate != nil {
		ctx, cancel := context.WithTimeout(ctx, gateTime)
		gate.conn.Call(ctx, link.CallEnding, nil, nil)
		cancel()
	}
	m.drain(ctx, guard, gate)
	shown := m.shown(ctx, guard)
	guard.end()
	gate.end()
	m.mu.Lock()
	k := m.keeper
	m.keeper = nil
	m.mu.Unlock()
	k.end()
	m.d.sweepRun(m.id())
	if rec.Run.Shared != "" {
		m.d.unshare(rec.Run.Shared)
	}
	m.mu.Lock()
	if m.run != nil {
		m.run.qemu.Close()
	}
	if m.ram != nil {
		m.ram.Close()
	}
	if m.page != nil {
		m.page.Close()
	}
	m.run, m.guard, m.gate, m.ram, m.page, m.why, m.panicked = nil, nil, nil, nil, nil, "", false
	m.rec.Run, m.rec.Paused = nil, false
	m.rec.Ended, m.rec.Reason = ending.Ended, ending.Reason
	m.rec.Failed = ending.Ended == vm.EndedPanic || ending.Ended == vm.EndedQEMU
	failed := m.rec.Failed
	m.endRecording(exit, shown)
	err := m.save(ctx)
	m.mu.Unlock()
	if err != nil {
		m.d.log.Error("a machine's end could not be recorded", "machine", m.name(), "error", err)
	}
	fields := event.Fields{"ended": string(ending.Ended), "seconds": time.Since(rec.Run.Started).Seconds()}
	if failed {
		fields["reason"] = event.Text([]byte(ending.Reason))
		m.d.bus.emit(m.name(), event.MachineFailed, fields)
	} else {
		m.d.bus.emit(m.name(), event.MachineStopped, fields)
	}
	m.judgeReplay(rec, exit, shown)
}

// ending joins what QEMU said last with what was asked for and how the process ended.
func (m *machine) ending(ctx context.Context, guard *worker, asked vm.Ended, exit jail.Exit) qemu.Ending {
	var said qemu.Ending
	if guard != nil {
		ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
		defer cancel()
		if _, err := guard.conn.Call(ctx, link.CallEnding, nil, &said); err != nil {
			m.d.log.Warn("the guard can't say how its machine ended", "machine", m.name(), "error", err)
		}
	}
	m.mu.Lock()
	why := m.why
	m.mu.Unlock()
	if why != "" {
		return qemu.Ending{Ended: vm.EndedQEMU, Reason: why}
	}
	return joinEnding(said, asked, exit, m.d.qemuLogTail(m.id()))
}

// joinEnding decides how a run ended: said is QEMU's last word through the guard, asked what was asked of vigia, log
// QEMU's last line.
func joinEnding(said qemu.Ending, asked vm.Ended, exit jail.Exit, log string) qemu.Ending {
	switch {
	case said.Ended == vm.EndedPanic:
		return said
	case asked == vm.EndedForced:
		return qemu.Ending{Ended: vm.EndedForced, Reason: "stopped by force"}
	case asked == vm.EndedStopped && said.Ended == vm.EndedPowerOff:
		return qemu.Ending{Ended: vm.EndedStopped, Reason: "stopped as asked"}
	case said.Ended == vm.EndedForced:
		return qemu.Ending{Ended: vm.EndedQEMU, Reason: "QEMU was told to end by something else than vigia: " + said.Reason}
	case said.Ended != vm.EndedNone:
		return said
	case exit.Known && exit.Signal == 0 && exit.Code == 0 && asked == vm.EndedStopped:
		return qemu.Ending{Ended: vm.EndedStopped, Reason: "stopped as asked, as far as is known: its guard was not there to see it"}
	case exit.Known && exit.Signal == 0 && exit.Code == 0:
		return qemu.Ending{Ended: vm.EndedPowerOff, Reason: "the guest powered itself off, as far as is known: its guard was not there to see it"}
	}
	reason := "QEMU " + exit.String()
	if log != "" {
		reason += ": " + log
	}
	return qemu.Ending{Ended: vm.EndedQEMU, Reason: reason}
}

// drain waits a little until the workers' last events are here.
func (m *machine) drain(ctx context.Context, workers ...*worker) {
	ctx, cancel := context.WithTimeout(ctx, 3*time.Second)
	defer cancel()
	for _, w := range workers {
		if w != nil {
			w.conn.Call(ctx, link.CallDrain, nil, nil)
		}
	}
}

// graceTime is how long a guest has to power itself off before it is forced, where nothing else is said.
const graceTime = 30 * time.Second

// stop ends the run: gracefully for as long as grace, then by force. It returns once everything is put away. Once the
// guest was asked it goes on though the caller leaves: half a stop would be worse.
func (m *machine) stop(ctx context.Context, force bool, grace time.Duration) error {
	if force {
		return m.kill(ctx)
	}
	unlock, err := m.lock(ctx)
	if err != nil {
		return err
	}
	r := m.running()
	if r == nil {
		unlock()
		return m.errNotRunning()
	}
	done := make(chan error, 1)
	if !m.d.spawn(func() {
		defer unlock()
		done <- m.shutDown(m.d.ctx, r, grace)
	}) {
		unlock()
		return errEnding
	}
	select {
	case err := <-done:
		return err
	case <-ctx.Done():
		return ctx.Err()
	}
}

// shutDown presses the button, waits, and forces. Where the daemon ends meanwhile the guest goes on ending by itself.
func (m *machine) shutDown(ctx context.Context, r *run, grace time.Duration) error {
	if err := m.ask(ctx, vm.EndedStopped); err != nil {
		return err
	}
	if m.rec.replayMode() != "" { // QEMU does not record its power button, only its own end
		m.callGuard(ctx, link.CallPause, nil, nil)
		return m.force(ctx, r)
	}
	if m.record().Paused { // a paused guest can't hear its power button
		if _, err := m.callGuard(ctx, link.CallResume, nil, nil); err == nil {
			m.change(ctx, func(r *record) { r.Paused = false })
		}
	}
	m.callGuard(ctx, link.CallPowerDown, nil, nil)
	waitFor(ctx, r.ended, grace)
	if ctx.Err() != nil {
		return errEnding
	}
	return m.force(ctx, r)
}

// ask records what was asked for, so that the end is told rightly, by a later daemon too.
func (m *machine) ask(ctx context.Context, how vm.Ended) error {
	return m.change(ctx, func(r *record) {
		if r.Run != nil {
			r.Run.Asked = how
		}
	})
}

// force ends QEMU: it gets a moment to flush its disk. It is no error that it has ended already.
func (m *machine) force(ctx context.Context, r *run) error {
	select {
	case <-r.ended:
		return nil
	case <-r.qemu.Done():
	default:
		m.ask(ctx, vm.EndedForced)
		quit, cancel := context.WithTimeout(ctx, 5*time.Second)
		m.callGuard(quit, link.CallQuit, nil, nil)
		waitFor(quit, r.qemu.Done(), 5*time.Second)
		cancel()
		r.qemu.Kill()
	}
	select {
	case <-r.ended:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// kill ends a machine whatever it is doing: a start is given up, a stop that waits for its guest is cut short.
func (m *machine) kill(ctx context.Context) error {
	m.mu.Lock()
	r, cancelStart := m.run, m.cancelStart
	m.mu.Unlock()
	switch {
	case cancelStart != nil:
		cancelStart(errGivenUp)
		unlock, err := m.lock(ctx) // the start has put everything away
		if err != nil {
			return err
		}
		unlock()
		if r = m.running(); r == nil {
			return nil
		}
	case r == nil:
		return m.errNotRunning()
	}
	return m.force(ctx, r)
}

var (
	errGivenUp = errors.New("given up: the machine was stopped while it started")
	errEnding  = errors.New("the daemon ends: the next one goes on with what was asked for")
)

// waitFor waits until done is closed, for at most the time given or until ctx ends.
func waitFor(ctx context.Context, done <-chan struct{}, most time.Duration) bool {
	timer := time.NewTimer(most)
	defer timer.Stop()
	select {
	case <-done:
		return true
	case <-timer.C:
	case <-ctx.Done():
	}
	return false
}

// keepRAM keeps the guest's memory, never looked at here, to hand it to a guard to come.
func (m *machine) keepRAM(f *os.File) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.ram != nil {
		m.ram.Close()
	}
	m.ram = f
}
