package daemon

import (
	"context"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"sync"
	"time"

	"vigia/internal/event"
	"vigia/internal/jail"
	"vigia/internal/link"
	qemu "vigia/internal/machine"
	"vigia/internal/store"
	"vigia/internal/vm"
)

// errState is wrapped by refusals to do to a machine what its state does not allow.
var errState = errors.New("not possible now")

// record is what the store keeps of a machine: what was asked for, and what is known of it. It is written before an
// answer is given, and is all that a new daemon has to find a running machine again.
type record struct {
	Spec        vm.Spec   `json:"spec"`
	Quarantined bool      `json:"quarantined"`
	Failed      bool      `json:"failed"` // the last run ended as nobody asked
	Ended       vm.Ended  `json:"ended"`
	Reason      string    `json:"reason"`
	Paused      bool      `json:"paused"`
	Run         *runState `json:"run,omitempty"`
}

// runState names the processes of a machine that runs.
type runState struct {
	QEMU        procRef                   `json:"qemu"`
	Guard       procRef                   `json:"guard"`
	Gate        procRef                   `json:"gate"`
	Started     time.Time                 `json:"started"`
	Accelerator string                    `json:"accelerator"`
	Publish     []vm.Publish              `json:"publish"` // with the ports that were chosen
	InForce     map[string][]jail.Measure `json:"in_force"`
}

// machine is one machine of this daemon.
type machine struct {
	d  *Daemon
	op sync.Mutex // one operation at a time: start, stop, remove

	mu       sync.Mutex
	rec      record
	starting bool
	asked    vm.Ended // the end that was asked for: stopped or forced
	qemu     *jail.Process
	guard    *worker
	gate     *worker
	ram      *os.File      // the guest's memory, never looked at here: kept to be handed to a guard
	ended    chan struct{} // closed once a run is over and put away
	replaced []time.Time   // when workers of this run were replaced
}

func (m *machine) id() vm.ID    { return m.rec.Spec.ID }
func (m *machine) name() string { return m.rec.Spec.Name }

// FirstUID begins the user ids for machines, as root: three for each, below the range that containers use and above what systemd gives
// out (systemd's UIDS-GIDS.md: 0x70000000 and up is free).
const FirstUID = 0x70000000

var uidOffset = map[string]uint32{"qemu": 0, "guard": 1, "gate": 2}

// user returns the own identity of one of the machine's processes; nil where vigia does not run as root.
func (m *machine) user(process string) *jail.User {
	if os.Geteuid() != 0 {
		return nil
	}
	sum := sha256.Sum256([]byte(m.id()))
	uid := int(FirstUID + binary.BigEndian.Uint32(sum[:])>>8*4 + uidOffset[process])
	return &jail.User{UID: uid, GID: uid}
}

// tag marks a process of the machine, so that a later daemon finds it whatever happened.
func (d *Daemon) tag(m *machine, process string) string {
	return d.files.tag() + "/" + string(m.id()) + "/" + process
}

// convertUser is who reads hostile files at rest.
func convertUser() *jail.User {
	if os.Geteuid() != 0 {
		return nil
	}
	return &jail.User{UID: FirstUID - 1, GID: FirstUID - 1}
}

// state is what a person is told.
func (m *machine) state() vm.State {
	m.mu.Lock()
	defer m.mu.Unlock()
	switch {
	case m.starting:
		return vm.Starting
	case m.qemu == nil && m.rec.Failed:
		return vm.Failed
	case m.qemu == nil:
		return vm.Stopped
	case m.asked != vm.EndedNone:
		return vm.Stopping
	case m.rec.Paused:
		return vm.Paused
	case m.rec.Quarantined:
		return vm.Quarantined
	}
	return vm.Running
}

// save writes the record; the caller holds m.mu or is alone with the machine.
func (m *machine) save(ctx context.Context) error {
	_, err := store.Put(ctx, m.d.store, machineKey(m.id()), m.rec)
	if err != nil {
		return fmt.Errorf("record of machine %s: %w", m.name(), err)
	}
	return nil
}

func machineKey(id vm.ID) string { return "machines/" + string(id) }

// change edits the record and saves it.
func (m *machine) change(ctx context.Context, edit func(*record)) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	edit(&m.rec)
	return m.save(ctx)
}

// workers returns guard and gate of a machine that runs, and refuses where it does not.
func (m *machine) workers() (guard, gate *worker, err error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.qemu == nil || m.guard == nil {
		return nil, nil, fmt.Errorf("machine %s does not run: %w: start it with: vigia start %s", m.name(), errState, m.name())
	}
	return m.guard, m.gate, nil
}

// callGuard asks the guard of a running machine.
func (m *machine) callGuard(ctx context.Context, method string, in, out any, files ...*os.File) ([]*os.File, error) {
	guard, _, err := m.workers()
	if err != nil {
		return nil, err
	}
	return guard.conn.Call(ctx, method, in, out, files...)
}

// pause stops the guest between two instructions.
func (m *machine) pause(ctx context.Context, reason string) error {
	if _, err := m.callGuard(ctx, link.CallPause, nil, nil); err != nil {
		return err
	}
	if err := m.change(ctx, func(r *record) { r.Paused = true }); err != nil {
		return err
	}
	m.d.bus.emit(m.name(), event.MachinePaused, event.Fields{"reason": reason})
	return nil
}

func (m *machine) resume(ctx context.Context, reason string) error {
	if _, err := m.callGuard(ctx, link.CallResume, nil, nil); err != nil {
		return err
	}
	if err := m.change(ctx, func(r *record) { r.Paused = false }); err != nil {
		return err
	}
	m.d.bus.emit(m.name(), event.MachineResumed, event.Fields{"reason": reason})
	return nil
}

// quarantine cuts a machine off the network. The gate is told first, since that is what stops an attacker; then the
// record, so that it lasts. since is the time of the last event of the rule that asked for it, or zero.
func (m *machine) quarantine(ctx context.Context, rule string, since time.Time) error {
	m.mu.Lock()
	gate := m.gate
	m.mu.Unlock()
	fields := event.Fields{"rule": rule}
	if gate != nil {
		var q link.Quarantined
		if _, err := gate.conn.Call(ctx, link.CallQuarantine, link.Quarantine{On: true}, &q); err != nil {
			// A gate that does not answer is ended: without a gate no frame passes, and the next one starts shut.
			m.d.log.Error("gate does not answer, it is ended", "machine", m.name(), "error", err)
			defer gate.proc.Kill()
		}
		fields["flows"] = int64(q.Flows)
	}
	if !since.IsZero() {
		fields["seconds"] = time.Since(since).Seconds()
	}
	if err := m.change(ctx, func(r *record) { r.Quarantined = true }); err != nil {
		return err
	}
	m.d.bus.emit(m.name(), event.QuarantineOn, fields)
	return nil
}

func (m *machine) release(ctx context.Context) error {
	m.mu.Lock()
	gate, on := m.gate, m.rec.Quarantined
	m.mu.Unlock()
	if !on {
		return fmt.Errorf("machine %s is not in quarantine: %w", m.name(), errState)
	}
	if err := m.change(ctx, func(r *record) { r.Quarantined = false }); err != nil {
		return err
	}
	if gate != nil {
		if _, err := gate.conn.Call(ctx, link.CallQuarantine, link.Quarantine{}, nil); err != nil {
			return err
		}
	}
	m.d.bus.emit(m.name(), event.QuarantineOff, nil)
	return nil
}

// setRules puts other network rules in force.
func (m *machine) setRules(ctx context.Context, rules []vm.NetRule) error {
	m.mu.Lock()
	gate := m.gate
	m.mu.Unlock()
	if gate != nil {
		if _, err := gate.conn.Call(ctx, link.CallRules, link.Rules{Rules: rules}, nil); err != nil {
			return err
		}
	}
	return m.change(ctx, func(r *record) { r.Spec.Net.Rules = rules })
}

// graceTime is how long a guest has to power itself off before it is forced, where nothing else is said.
const graceTime = 30 * time.Second

// stop ends the run: gracefully for as long as grace, then by force. It returns once everything is put away.
func (m *machine) stop(ctx context.Context, force bool, grace time.Duration) error {
	m.op.Lock()
	defer m.op.Unlock()
	m.mu.Lock()
	if m.qemu == nil {
		m.mu.Unlock()
		return fmt.Errorf("machine %s does not run: %w", m.name(), errState)
	}
	qemu, guard, ended, paused := m.qemu, m.guard, m.ended, m.rec.Paused
	m.asked = vm.EndedStopped
	m.mu.Unlock()
	if !force {
		if paused { // a paused guest can't hear its power button
			m.callGuard(ctx, link.CallResume, nil, nil)
		}
		m.callGuard(ctx, link.CallPowerDown, nil, nil)
		if waitFor(ctx, qemu.Done(), grace) {
			<-ended
			return nil
		}
	}
	m.mu.Lock()
	m.asked = vm.EndedForced
	m.mu.Unlock()
	quit, cancel := context.WithTimeout(context.WithoutCancel(ctx), 5*time.Second)
	guard.conn.Call(quit, link.CallQuit, nil, nil)
	if !waitFor(quit, qemu.Done(), 5*time.Second) {
		qemu.Kill()
	}
	cancel()
	<-ended
	return nil
}

func waitFor(ctx context.Context, done <-chan struct{}, most time.Duration) bool {
	select {
	case <-done:
		return true
	case <-time.After(most):
	case <-ctx.Done():
	}
	return false
}

// watch waits for QEMU's end and puts the run away.
func (m *machine) watch(qemu *jail.Process, ended chan struct{}) {
	exit := qemu.Exit()
	m.finish(context.WithoutCancel(m.d.ctx), exit)
	close(ended)
}

// finish tells how the run ended and removes what it left: guard, gate, sockets, RAM file, cgroups.
func (m *machine) finish(ctx context.Context, exit jail.Exit) {
	m.mu.Lock()
	guard, gate, asked, run := m.guard, m.gate, m.asked, m.rec.Run
	m.mu.Unlock()
	ending := m.ending(ctx, guard, asked, exit)
	m.drain(ctx, guard, gate)
	guard.end()
	gate.end()
	m.mu.Lock()
	if m.qemu != nil {
		m.qemu.Close()
	}
	if m.ram != nil {
		m.ram.Close()
	}
	m.qemu, m.guard, m.gate, m.ram, m.asked = nil, nil, nil, nil, vm.EndedNone
	m.rec.Run, m.rec.Paused = nil, false
	m.rec.Ended, m.rec.Reason = ending.Ended, ending.Reason
	m.rec.Failed = ending.Ended == vm.EndedPanic || ending.Ended == vm.EndedQEMU
	failed := m.rec.Failed
	err := m.save(ctx)
	m.mu.Unlock()
	if err != nil {
		m.d.log.Error("a machine's end could not be recorded", "machine", m.name(), "error", err)
	}
	m.d.sweepRun(m.id())
	fields := event.Fields{"ended": string(ending.Ended)}
	if run != nil {
		fields["seconds"] = time.Since(run.Started).Seconds()
	}
	if failed {
		fields["reason"] = ending.Reason
		m.d.bus.emit(m.name(), event.MachineFailed, fields)
	} else {
		m.d.bus.emit(m.name(), event.MachineStopped, fields)
	}
}

// ending joins what QEMU said last with what was asked for and how the process ended.
func (m *machine) ending(ctx context.Context, guard *worker, asked vm.Ended, exit jail.Exit) qemu.Ending {
	var e qemu.Ending
	if guard != nil {
		ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
		defer cancel()
		if _, err := guard.conn.Call(ctx, link.CallEnding, nil, &e); err != nil {
			m.d.log.Warn("the guard can't say how its machine ended", "machine", m.name(), "error", err)
		}
	}
	switch {
	case asked == vm.EndedForced:
		return qemu.Ending{Ended: vm.EndedForced, Reason: "stopped by force"}
	case asked == vm.EndedStopped && e.Ended == vm.EndedPowerOff:
		return qemu.Ending{Ended: vm.EndedStopped, Reason: "stopped as asked"}
	case e.Ended == vm.EndedForced:
		return qemu.Ending{Ended: vm.EndedQEMU, Reason: "QEMU was told to end by something else than vigia: " + e.Reason}
	case e.Ended != vm.EndedNone:
		return e
	}
	reason := "QEMU " + exit.String()
	if tail := m.d.qemuLogTail(m.id()); tail != "" {
		reason += ": " + tail
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
