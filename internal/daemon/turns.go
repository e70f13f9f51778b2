package daemon

import (
	"context"
	"fmt"
	"slices"
	"sync"
	"time"

	"vigia/internal/link"
	"vigia/internal/policy"
)

// What rules may turn back by themselves is bounded: a guest that panics each time it runs, or an attack that comes again at once,
// would have its machine rolled back or started again for ever. Beyond so many times nothing is done, and that is told.
const (
	turnsMost   = 3
	turnsWindow = 10 * time.Minute
)

// turn counts one, or refuses it. The count is in the record: another daemon goes on with it.
func (m *machine) turn(ctx context.Context, now time.Time) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	turns, err := turned(m.rec.Turns, now)
	if err != nil {
		return fmt.Errorf("machine %s %w", m.name(), err)
	}
	m.rec.Turns = turns
	return m.save(ctx)
}

// turned adds a turn to those that are recent.
func turned(turns []time.Time, now time.Time) ([]time.Time, error) {
	recent := slices.DeleteFunc(slices.Clone(turns), func(t time.Time) bool { return now.Sub(t) >= turnsWindow || t.After(now) })
	if len(recent) >= turnsMost {
		return nil, fmt.Errorf("was put back or started again by rules %d times in %s: %w: see to it yourself", len(recent), turnsWindow, errState)
	}
	return append(recent, now.UTC()), nil
}

// rollbackByRule goes the way of every rollback, to the last stable checkpoint.
func (m *machine) rollbackByRule(ctx context.Context, rule string) error {
	to, err := m.stable()
	if err != nil {
		return err
	}
	if err := m.turn(ctx, time.Now()); err != nil {
		return err
	}
	_, err = m.rollback(ctx, to, rollbackOrder{reason: "rule " + rule})
	return err
}

// restartByRule starts a machine again from its disk. A guest that runs may end by itself first.
func (m *machine) restartByRule(ctx context.Context, rule string) error {
	if e := m.rec.Spec.Expires; !e.IsZero() && time.Now().After(e) {
		return fmt.Errorf("machine %s expired at %s: %w", m.name(), e.Format(time.RFC3339), errState)
	}
	if err := m.turn(ctx, time.Now()); err != nil {
		return err
	}
	if m.running() != nil {
		if err := m.stop(ctx, m.stands(), graceTime); m.running() != nil {
			return err
		}
	}
	m.d.log.Info("machine is started again", "machine", m.name(), "rule", rule)
	return m.start(ctx)
}

// stands says whether the guest stands still in a panic.
func (m *machine) stands() bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.panicked
}

// panicked carries out what rules ask for of a guest that stands still in a panic, and ends it then. The bus holds its lock.
func (d *Daemon) panicked(name string, decisions []policy.Decision) {
	d.spawn(func() {
		m, err := d.machine(name)
		if err != nil {
			return
		}
		r := m.running()
		if r == nil { // it is being found again: its guard ends it
			d.respondEach(decisions)
			return
		}
		if slices.ContainsFunc(decisions, needsGuest) {
			m.callGuard(d.ctx, link.CallHold, nil, nil)
			m.change(d.ctx, func(rec *record) { rec.Paused = true })
		}
		m.mu.Lock()
		m.panicked = true
		m.mu.Unlock()
		d.respondEach(decisions)
		m.quitStanding(r)
	})
}

// quitTime bounds the wait for a guard that ends a guest in a panic: its guard may have died, and the next one be on its way.
const quitTime = 30 * time.Second

// quitStanding ends a guest that stands still in a panic, where nothing has put another run in its place.
func (m *machine) quitStanding(r *run) {
	for end := time.Now().Add(quitTime); m.running() == r && m.d.ctx.Err() == nil; {
		if _, err := m.callGuard(m.d.ctx, link.CallQuit, nil, nil); err == nil {
			return
		}
		if time.Now().After(end) {
			r.qemu.Kill()
			return
		}
		waitFor(m.d.ctx, r.qemu.Done(), 300*time.Millisecond)
	}
}

func (d *Daemon) respondEach(decisions []policy.Decision) {
	var all sync.WaitGroup
	for _, p := range decisions {
		all.Go(func() { d.respond(d.ctx, p) })
	}
	all.Wait()
}

// needsGuest says whether a response looks at the guest as it is.
func needsGuest(p policy.Decision) bool {
	return slices.ContainsFunc(p.Respond, func(r string) bool { return r == "checkpoint" || r == "rollback" })
}
