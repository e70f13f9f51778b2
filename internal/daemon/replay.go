package daemon

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"vigia/internal/link"
	"vigia/internal/vm"
)

// replaying says whose recording a machine replays, and how far it is to go.
type replaying struct {
	Of        vm.ID      `json:"of"`
	Name      string     `json:"name"`
	Recording recording  `json:"recording"`
	Until     *vm.Moment `json:"until,omitempty"` // where it will stop by itself
	At        *stopped   `json:"at,omitempty"`    // where it last did
	GDB       bool       `json:"gdb,omitempty"`   // QEMU listens for a debugger
}

// replayOptions are what may be asked of a replay.
type replayOptions struct {
	name  string
	until *vm.Moment
	gdb   bool
}

// A replay that executes nothing for so long has lost its way: QEMU waits for an event that does not come.
const (
	replayLook  = 3 * time.Second
	replayStill = 10 // looks
)

// replay makes a machine that does again what m did in its last run.
func (d *Daemon) replay(ctx context.Context, m *machine, o replayOptions) (*machine, error) {
	unlock, err := m.lock(ctx) // its log and its disk stay what they are until the other one has them
	if err != nil {
		return nil, err
	}
	defer unlock()
	rec := m.record()
	if err := replayable(m, rec); err != nil {
		return nil, err
	}
	if o.name == "" {
		o.name = m.name() + "-replay"
	}
	if _, err := vm.ParseName(o.name); err != nil {
		return nil, err
	}
	if o.until != nil {
		if _, err := d.resolve(m.id(), *rec.Recording, *o.until); err != nil {
			return nil, err
		}
	}
	spec := rec.Spec
	spec.Name, spec.ID, spec.Created, spec.Publish, spec.Record = o.name, vm.NewID(), time.Now().UTC(), nil, false
	spec.Probe = "" // what nobody watched the first time is watched now
	if spec.Net.Mode == vm.NetNAT {
		spec.Net.Mode = vm.NetReplay
	}
	again, err := d.createFrom(ctx, record{Spec: spec, Layers: rec.Recording.Layers, Origin: rec.origin(),
		Replays: &replaying{Of: m.id(), Name: m.name(), Recording: *rec.Recording, Until: o.until, GDB: o.gdb}})
	if err != nil {
		return nil, err
	}
	err = os.Link(d.files.recordingLog(m.id()), d.files.recordingLog(again.id()))
	if err == nil {
		os.Link(d.files.recordingTimes(m.id()), d.files.recordingTimes(again.id())) // one without is replayed too
		err = again.start(ctx)
	}
	if err != nil {
		d.remove(context.WithoutCancel(ctx), again)
		return nil, fmt.Errorf("replay %s: %w", m.name(), err)
	}
	return again, nil
}

// replayable says why a machine's last run can't be replayed.
func replayable(m *machine, rec record) error {
	switch {
	case !rec.Spec.Record:
		return fmt.Errorf("%s is not recorded: %w: run it with --record", m.name(), errState)
	case rec.Run != nil:
		return fmt.Errorf("%s runs, its recording has no end yet: %w: stop it, then replay", m.name(), errState)
	case rec.Recording == nil || !rec.Recording.Whole:
		return fmt.Errorf("the last run of %s was ended by force, its recording is cut short: %w: end it with: vigia stop", m.name(), errState)
	}
	return nil
}

// seek has a replay go on to a moment. What lies behind it is reached from the beginning: the replay is ended, and another of the same name
// begins.
func (d *Daemon) seek(ctx context.Context, m *machine, to vm.Moment) (*machine, error) {
	rec := m.record()
	if rec.Replays == nil {
		return nil, fmt.Errorf("%s does not replay anything: %w: see vigia replay", m.name(), errState)
	}
	at, err := d.resolve(m.id(), rec.Replays.Recording, to)
	if err != nil {
		return nil, err
	}
	if rec.Run != nil {
		if ahead, err := m.forward(ctx, to, at); ahead || err != nil {
			return m, err
		}
	}
	of, err := d.machine(rec.Replays.Name)
	if err != nil || of.id() != rec.Replays.Of {
		return nil, fmt.Errorf("%s is behind it, and the machine that was recorded is gone: %w", to, errState)
	}
	was := of.record()
	if err := replayable(of, was); err != nil {
		return nil, fmt.Errorf("%s is behind it: %w", to, err)
	}
	if !was.Recording.Began.Equal(rec.Replays.Recording.Began) {
		return nil, fmt.Errorf("%s is behind it, and %s has run again since: %w", to, of.name(), errState)
	}
	if err := d.end(ctx, m); err != nil {
		return nil, err
	}
	return d.replay(ctx, of, replayOptions{name: m.name(), until: &to, gdb: rec.Replays.GDB})
}

// end stops a replay and removes it.
func (d *Daemon) end(ctx context.Context, m *machine) error {
	if err := m.stop(ctx, true, 0); err != nil && !errors.Is(err, errState) {
		return err
	}
	unlock, err := m.lock(ctx)
	if err != nil {
		return err
	}
	defer unlock()
	if m.running() != nil {
		return fmt.Errorf("machine %s was started again: %w", m.name(), errState)
	}
	return d.remove(context.WithoutCancel(ctx), m)
}

// forward lets a replay that runs, or stands somewhere, go on to what lies ahead. ahead is false where it lies behind; an event is always looked
// for from here on.
func (m *machine) forward(ctx context.Context, to vm.Moment, at link.Until) (ahead bool, err error) {
	unlock, err := m.lock(ctx)
	if err != nil {
		return false, err
	}
	defer unlock()
	r := m.running()
	if r == nil {
		return false, nil
	}
	if !m.record().Paused { // else an instruction that lies ahead now may lie behind when it is asked for
		if _, err := m.callGuard(ctx, link.CallPause, nil, nil); err != nil {
			return false, err
		}
	}
	var s link.GuardStatus
	if _, err := m.callGuard(ctx, link.CallGuardStatus, nil, &s); err != nil {
		return false, err
	}
	if at.Kind == "" && at.Instruction <= s.Instructions {
		return false, nil
	}
	if _, err := m.callGuard(ctx, link.CallStopAt, at, nil); err != nil {
		return false, err
	}
	if err := m.change(ctx, func(r *record) {
		again := *r.Replays
		again.Until = &to
		r.Replays = &again
	}); err != nil {
		return false, err
	}
	if err := m.resume(ctx, "on to "+to.String()); err != nil {
		return false, err
	}
	m.d.awaitStop(m, r)
	return true, nil
}

// watchReplay ends a replay that does not get on.
func (d *Daemon) watchReplay(m *machine, r *run) {
	if m.rec.Replays == nil {
		return
	}
	d.awaitStop(m, r)
	d.spawn(func() {
		var last int64
		still := 0
		for !waitFor(d.ctx, r.ended, replayLook) && d.ctx.Err() == nil {
			var s link.GuardStatus
			if _, err := m.callGuard(d.ctx, link.CallGuardStatus, nil, &s); err != nil || m.record().Paused || s.QEMU != "running" {
				continue
			}
			if still++; s.Instructions != last {
				last, still = s.Instructions, 0
			}
			if still >= replayStill {
				m.note(fmt.Sprintf("the replay stands still at instruction %d: what comes next in the recording does not happen", last))
				r.qemu.Kill()
				return
			}
		}
	})
}

// debugger is where gdb finds a replay.
func (m *machine) debugger() string {
	if rec := m.record(); rec.Replays != nil && rec.Replays.GDB && rec.Run != nil {
		return filepath.Join(m.d.files.run(m.id()), "gdb.sock")
	}
	return ""
}
