package daemon

import (
	"context"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"maps"
	"os"
	"sync"
	"time"

	"vigia/internal/checkpoint"
	"vigia/internal/event"
	"vigia/internal/jail"
	"vigia/internal/link"
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

	// The disk's layers over the image's, the lowest first (layers.go). Pending is one of them, or the next, while the
	// overlay changes its place.
	Layers  []string `json:"layers,omitempty"`
	Pending string   `json:"pending,omitempty"`
	// Checkpoint is the last one of this machine's line. Resume is where the next start goes on from, Rollback where a
	// rollback that was begun leads.
	Checkpoint checkpoint.ID `json:"checkpoint,omitempty"`
	Resume     checkpoint.ID `json:"resume,omitempty"`
	Rollback   checkpoint.ID `json:"rollback,omitempty"`
	// Origin is whose hardware a clone has. Shares: it maps its checkpoint's memory for itself.
	Origin vm.ID `json:"origin,omitempty"`
	Shares bool  `json:"shares,omitempty"`

	Keep *keepRule `json:"keep,omitempty"` // how often it is saved by itself
	// Turns are when rules last put the machine back or started it again (turns.go).
	Turns []time.Time `json:"turns,omitempty"`

	// Recording is of the last run, where the machine is recorded. Replays is whose recording this machine replays.
	Recording *recording `json:"recording,omitempty"`
	Replays   *replaying `json:"replays,omitempty"`
	// Reenacts is what had entered another machine, which this one is given again.
	Reenacts *reenacting `json:"reenacts,omitempty"`
}

// origin is whose hardware the machine has.
func (r *record) origin() vm.ID {
	if r.Origin != "" {
		return r.Origin
	}
	return r.Spec.ID
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
	Probe       string                    `json:"probe,omitempty"` // why QEMU has no plugin; empty: it has
	PrivateRAM  bool                      `json:"private_ram,omitempty"`
	Shared      checkpoint.ID             `json:"shared,omitempty"`   // whose memory's file it has mapped
	Arrival     *arrival                  `json:"arrival,omitempty"`  // how its guest stood after it
	Arriving    checkpoint.ID             `json:"arriving,omitempty"` // which it goes on from, until its guest was helped
	Asked       vm.Ended                  `json:"asked,omitempty"`    // the end that was asked for: stopped or forced
}

// worked notes a worker that took its place.
func (r *runState) worked(w *worker) {
	r.InForce = maps.Clone(r.InForce) // others may be reading the old one
	r.InForce[w.name] = w.proc.Measures
	ref := refOf(w.proc)
	ref.Source = w.hello.Source
	if w.name == "gate" {
		r.Gate = ref
	} else {
		r.Guard = ref
	}
}

// machine is one machine of this daemon.
type machine struct {
	d  *Daemon
	op chan struct{} // holds one token: one operation at a time, start, stop or remove

	laying sync.Mutex // held while the disk's layers change their places, and while a guard opens them

	past *ahead // of a rollback; whoever has the token has this

	mu          sync.Mutex
	rec         record
	cancelStart context.CancelCauseFunc // while it starts
	removed     bool
	why         string    // why vigia itself ended QEMU
	panicked    bool      // the guest stands still in a panic
	later       time.Time // before then its rule is not looked at
	run         *run      // nil: it does not run
	guard       *worker
	gate        *worker
	keeper      *keeper
	ram         *os.File // the guest's memory, never looked at here: kept to be handed to a guard
	page        *os.File // shared by guard and QEMU plugin: kept as ram is
	ahead       bool     // nobody has asked for it yet (spares.go); set before it starts, and never again
	sampled     string   // why QEMU has no plugin, while the machine starts
}

func newMachine(d *Daemon, rec record) *machine {
	return &machine{d: d, rec: rec, op: make(chan struct{}, 1)}
}

// The id, name, image and sizes of a machine never change.
func (m *machine) id() vm.ID    { return m.rec.Spec.ID }
func (m *machine) name() string { return m.rec.Spec.Name }

// lock begins an operation, once the one before is over. A caller who leaves while he waits has asked for nothing.
func (m *machine) lock(ctx context.Context) (unlock func(), err error) {
	select {
	case m.op <- struct{}{}:
	case <-ctx.Done():
		return nil, fmt.Errorf("machine %s is busy with something else: %w", m.name(), context.Cause(ctx))
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.removed {
		<-m.op
		return nil, noMachine(m.name())
	}
	return func() { <-m.op }, nil
}

// record is what is known now, to be read at leisure.
func (m *machine) record() record {
	m.mu.Lock()
	defer m.mu.Unlock()
	rec := m.rec
	if rec.Run != nil {
		run := *rec.Run
		rec.Run = &run
	}
	return rec
}

func (m *machine) running() *run {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.run
}

func (m *machine) errNotRunning() error {
	return fmt.Errorf("machine %s does not run: %w: start it with: vigia start %s", m.name(), errState, m.name())
}

func (m *machine) bothWorkers() (guard, gate *worker) {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.guard, m.gate
}

// setWorker puts a worker in its place, or takes it out.
func (m *machine) setWorker(name string, w *worker) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if name == "gate" {
		m.gate = w
	} else {
		m.guard = w
	}
}

// note says why vigia ends QEMU by itself.
func (m *machine) note(why string) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.why = why
}

// FirstUID begins the user ids for machines, as root: four for each, below the range that containers use and above what systemd gives
// out (systemd's UIDS-GIDS.md: 0x70000000 and up is free).
const FirstUID = 0x70000000

var uidOffset = map[string]uint32{"qemu": 0, "guard": 1, "gate": 2, "keeper": 3}

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
	case m.cancelStart != nil:
		return vm.Starting
	case m.run == nil && m.rec.Failed:
		return vm.Failed
	case m.run == nil:
		return vm.Stopped
	case m.rec.Run != nil && m.rec.Run.Asked != vm.EndedNone:
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
	if m.removed { // a record written now would come back to life
		return noMachine(m.name())
	}
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

// callGuard asks the guard of a running machine. One that is being replaced is waited for.
func (m *machine) callGuard(ctx context.Context, method string, in, out any, files ...*os.File) ([]*os.File, error) {
	for {
		m.mu.Lock()
		run, guard := m.run, m.guard
		m.mu.Unlock()
		switch {
		case run == nil:
			return nil, m.errNotRunning()
		case !guard.gone():
			return guard.conn.Call(ctx, method, in, out, files...)
		}
		if waitFor(ctx, run.ended, replaceWait/20) || ctx.Err() != nil {
			return nil, fmt.Errorf("machine %s: its guard is being replaced: %w", m.name(), errState)
		}
	}
}

// pause stops the guest between two instructions. The record comes first: a guard that takes another's place does what it says.
func (m *machine) pause(ctx context.Context, reason string) error {
	if err := m.hold(ctx, true, link.CallPause); err != nil {
		return err
	}
	m.d.bus.emit(m.name(), event.MachinePaused, event.Fields{"reason": reason})
	return nil
}

func (m *machine) resume(ctx context.Context, reason string) error {
	if err := m.hold(ctx, false, link.CallResume); err != nil {
		return err
	}
	m.d.bus.emit(m.name(), event.MachineResumed, event.Fields{"reason": reason})
	return nil
}

func (m *machine) hold(ctx context.Context, paused bool, call string) error {
	if m.running() == nil {
		return m.errNotRunning()
	}
	before := m.record().Paused
	if err := m.change(ctx, func(r *record) { r.Paused = paused }); err != nil {
		return err
	}
	_, err := m.callGuard(ctx, call, nil, nil)
	if err != nil {
		err = errors.Join(err, m.change(context.WithoutCancel(ctx), func(r *record) { r.Paused = before }))
	}
	return err
}

// settlePause tells a guard whether its guest stands still: the daemon or the guard before it may have died in between.
func (m *machine) settlePause(ctx context.Context, guard *worker) {
	rec, call := m.record(), link.CallResume
	if rec.replayMode() != "" { // it can't be saved, and is held by who replays it
		return
	}
	if rec.Paused {
		call = link.CallPause
	}
	if _, err := guard.conn.Call(ctx, call, nil, nil); err != nil {
		m.d.log.Warn("a guard does not pause or resume as the record says", "machine", m.name(), "call", call, "error", err)
	}
}

// gateTime bounds an answer of a gate: it has nothing to wait for.
const gateTime = 3 * time.Second

// askGate asks the gate, if there is one. One that died is no error: the next is told what the record says. One that does
// not answer is ended: without a gate no frame passes.
func (m *machine) askGate(ctx context.Context, method string, in, out any) error {
	_, gate := m.bothWorkers()
	if gate.gone() {
		return nil
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), gateTime)
	defer cancel()
	_, err := gate.conn.Call(ctx, method, in, out)
	if err != nil && (ctx.Err() != nil || gate.gone() || errors.Is(err, link.ErrProtocol)) {
		m.endGate(gate, err)
		return nil
	}
	return err
}

// endGate ends a gate that does not do as it is told: the next one is told what the record says, and until it is there no
// frame passes.
func (m *machine) endGate(gate *worker, why error) {
	m.d.log.Error("a gate does not do as it is told, it is ended", "machine", m.name(), "error", why)
	gate.proc.Kill()
}

// quarantine cuts a machine off the network. The gate is told first, since that is what stops an attacker, and
// ended if it will not; then the record, so that it lasts. since is the time of the last event of the rule that asked for it, or zero.
func (m *machine) quarantine(ctx context.Context, rule string, since time.Time) error {
	fields := event.Fields{"rule": rule}
	var q link.Quarantined
	if err := m.askGate(ctx, link.CallQuarantine, link.Quarantine{On: true}, &q); err != nil {
		if _, gate := m.bothWorkers(); gate != nil { // there is no good reason to refuse
			m.endGate(gate, err)
		}
	}
	fields["flows"] = int64(q.Flows)
	if !since.IsZero() {
		fields["seconds"] = time.Since(since).Seconds()
	}
	// A gate that took another's place meanwhile asks the record afterwards.
	if err := m.change(context.WithoutCancel(ctx), func(r *record) { r.Quarantined = true }); err != nil {
		return err
	}
	m.d.bus.emit(m.name(), event.QuarantineOn, fields)
	return nil
}

func (m *machine) release(ctx context.Context) error {
	if !m.record().Quarantined {
		return fmt.Errorf("machine %s is not in quarantine: %w", m.name(), errState)
	}
	if err := m.change(ctx, func(r *record) { r.Quarantined = false }); err != nil {
		return err
	}
	if err := m.askGate(ctx, link.CallQuarantine, link.Quarantine{}, nil); err != nil {
		return err
	}
	m.d.bus.emit(m.name(), event.QuarantineOff, nil)
	return nil
}

// setRules puts other network rules in force.
func (m *machine) setRules(ctx context.Context, rules []vm.NetRule) error {
	if err := m.askGate(ctx, link.CallRules, link.Rules{Rules: rules}, nil); err != nil {
		return err
	}
	return m.change(context.WithoutCancel(ctx), func(r *record) { r.Spec.Net.Rules = rules })
}
