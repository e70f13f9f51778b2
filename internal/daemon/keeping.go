package daemon

import (
	"context"
	"fmt"
	"time"

	"vigia/internal/checkpoint"
	"vigia/internal/event"
	"vigia/internal/vm"
)

// A machine may be saved at regular times, of which the last so many are kept. When the next one is due follows from the checkpoints that
// are there, so a daemon that was away goes on where it was: what is overdue is made once.
//
// Removed is only what was made by this rule, and not what somebody has labelled or marked since, or hangs on.

// keepRule is how often a machine is saved, and how many of those checkpoints are kept.
type keepRule struct {
	Every time.Duration `json:"every"`
	Keep  int           `json:"keep"`
	Since time.Time     `json:"since"` // when the rule was made
}

// Bounds of a rule. More than keepMost would come near to what a disk's chain may be long.
const (
	keepLeast   = time.Second
	keepMost    = 100
	keepDefault = 12
	keepAtOnce  = 2 // machines that are saved at one time by their rules
)

// parseKeep reads a rule. No time and no number is none.
func parseKeep(every string, keep int32) (*keepRule, error) {
	if every == "" && keep == 0 {
		return nil, nil
	}
	if every == "" {
		return nil, fmt.Errorf("%w: keep %d: of checkpoints that are made how often? give a time too, as in 5m", vm.ErrInvalid, keep)
	}
	t, err := vm.ParseTTL(every)
	if err != nil || t < keepLeast {
		return nil, fmt.Errorf("%w: a checkpoint every %s: use a time of a second or more, as in 5m", vm.ErrInvalid, event.Text([]byte(every)))
	}
	if keep == 0 {
		keep = keepDefault
	}
	if keep < 1 || keep > keepMost {
		return nil, fmt.Errorf("%w: keep %d checkpoints: use 1 to %d", vm.ErrInvalid, keep, keepMost)
	}
	return &keepRule{Every: t, Keep: int(keep), Since: time.Now().UTC()}, nil
}

// next is when the next checkpoint is due, after those there are.
func (k *keepRule) next(made []checkpoint.Record) time.Time {
	last := k.Since
	if n := len(made); n > 0 && made[n-1].Time.After(last) {
		last = made[n-1].Time
	}
	return last.Add(k.Every)
}

// surplus are the checkpoints that the rule does not keep. used says what somebody goes on from.
func (k *keepRule) surplus(made []checkpoint.Record, used map[checkpoint.ID]bool) (out []checkpoint.Record) {
	for i, c := range made {
		if len(made)-i > k.Keep && !c.Stable && c.Label == "" && !used[c.ID] {
			out = append(out, c)
		}
	}
	return out
}

// kept are the checkpoints that the machine's rule has made, the oldest first.
func (m *machine) kept() []checkpoint.Record {
	return m.d.checkpoints.List(func(r *checkpoint.Record) bool { return r.Machine == m.id() && r.Scheduled })
}

// keepUp makes the checkpoints that are due. Called again and again; a machine whose turn takes long is left out meanwhile.
func (d *Daemon) keepUp(now time.Time) {
	for _, m := range d.all() {
		k := m.record().Keep
		if k == nil || m.state() != vm.Running && m.state() != vm.Quarantined || now.Before(k.next(m.kept())) || now.Before(m.notBefore(0, now)) {
			continue
		}
		m.notBefore(k.Every, now)
		d.spawn(func() {
			select {
			case d.keeping <- struct{}{}:
				defer func() { <-d.keeping }()
			case <-d.ctx.Done():
				return
			}
			m.keepOne(d.ctx)
		})
	}
}

// notBefore is when the rule is looked at again, whatever came of it; with a time it is put off by that.
func (m *machine) notBefore(by time.Duration, now time.Time) time.Time {
	m.mu.Lock()
	defer m.mu.Unlock()
	if by > 0 {
		m.later = now.Add(by)
	}
	return m.later
}

// keepOne makes one checkpoint by the machine's rule, and removes those that are too many.
func (m *machine) keepOne(ctx context.Context) {
	if _, err := m.checkpointAs(ctx, saving{scheduled: true}); err != nil {
		m.d.log.Warn("a checkpoint that was due could not be made: it is tried again when the next is due", "machine", m.name(), "error", err)
		return
	}
	m.thin()
}

// thin removes what the rule does not keep.
func (m *machine) thin() {
	k := m.record().Keep
	if k == nil {
		return
	}
	for _, c := range k.surplus(m.kept(), m.d.usedCheckpoints()) {
		if err := m.d.removeCheckpoint(c, fmt.Sprintf("the last %d are kept", k.Keep)); err != nil {
			m.d.log.Warn("a checkpoint that is too old stays", "checkpoint", c.ID, "error", err)
		}
	}
}

// usedCheckpoints are those that a machine goes on from, or comes from and could be put back to.
func (d *Daemon) usedCheckpoints() map[checkpoint.ID]bool {
	used := map[checkpoint.ID]bool{}
	for _, m := range d.all() {
		rec := m.record()
		for _, id := range []checkpoint.ID{rec.Checkpoint, rec.Resume, rec.Rollback} {
			used[id] = true
		}
		if rec.Run != nil {
			used[rec.Run.Shared] = true
		}
	}
	return used
}

// setKeep puts a rule in force, or with nil takes it away; what it made stays then.
func (m *machine) setKeep(ctx context.Context, k *keepRule) error {
	if k != nil && m.rec.replayMode() != "" {
		return fmt.Errorf("%s: a machine that is recorded or replayed can't be saved in the middle: %w", m.name(), errState)
	}
	if old := m.record().Keep; old != nil && k != nil {
		k.Since = old.Since
	}
	if err := m.change(ctx, func(r *record) { r.Keep = k }); err != nil {
		return err
	}
	m.mu.Lock()
	m.later = time.Time{}
	m.mu.Unlock()
	m.thin()
	return nil
}
