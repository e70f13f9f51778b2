package daemon

import (
	"context"
	"time"

	"vigia/internal/checkpoint"
	"vigia/internal/event"
	"vigia/internal/link"
	"vigia/internal/vm"
)

// What the guest's own agent does for a checkpoint, and for a machine that was put back to one. It is the guest that does it, or
// says so: nothing here is waited for longer than a moment, and nothing depends on it.

// asItIs is the kind of checkpoint for which the guest is not asked to hold its file systems still: a rule's, for instance, since the
// guest of an alert may be an attacker's, who would hear of it and could take his second.
type asItIs struct{}

// withoutFreezing makes the checkpoints that are taken under ctx such ones.
func withoutFreezing(ctx context.Context) context.Context {
	return context.WithValue(ctx, asItIs{}, true)
}

// freezes says whether the guest is asked.
func (c *checkpointMaking) freezes(ctx context.Context) bool {
	return ctx.Value(asItIs{}) == nil && c.record.Spec.Has(vm.AdditionExec)
}

// frozen notes how the guest's file systems stood, by the guard's word.
func (c *checkpointMaking) frozen(done link.Checkpointed) {
	r := &c.record
	r.FrozenSeconds = done.FrozenSeconds
	if r.Disk = checkpoint.CrashConsistent; done.Frozen {
		r.Disk = checkpoint.Frozen
	} else {
		r.DiskWhy = event.Text([]byte(done.NotFrozen))
	}
}

// arrivalTime bounds the help for a guest that goes on from a checkpoint; arrivalWait is how long who put it back waits for that.
const (
	arrivalTime = time.Minute
	arrivalWait = 3 * time.Second
)

// arrive begins to help a guest that goes on from a checkpoint, if this run does, and the guard has not yet been asked to.
func (m *machine) arrive(r *run) {
	m.mu.Lock()
	from := m.rec.Run.Arriving
	if from != "" {
		r.arrived = make(chan struct{})
	}
	m.mu.Unlock()
	if from == "" {
		return
	}
	m.d.spawn(func() {
		defer close(r.arrived)
		ctx, cancel := context.WithTimeout(m.d.ctx, arrivalTime)
		defer cancel()
		if err := m.help(ctx, from); err != nil && m.d.ctx.Err() == nil {
			m.d.log.Warn("a guest that goes on from a checkpoint was not helped", "machine", m.name(), "checkpoint", from, "error", err)
		}
	})
}

// help has the guard do it, and notes that it is done: a daemon that dies before leaves it to the next one.
func (m *machine) help(ctx context.Context, id checkpoint.ID) error {
	from, err := m.d.checkpoints.Get(id)
	if err != nil {
		from.Disk = checkpoint.Frozen // removed meanwhile: to thaw once too often is no harm
	}
	var told link.Arrived
	if _, err := m.callGuard(ctx, link.CallArrive, link.Arrive{Frozen: from.Disk == checkpoint.Frozen || from.FrozenSeconds > 0}, &told); err != nil {
		return err
	}
	return m.change(ctx, func(r *record) {
		if r.Run != nil && r.Run.Arriving == id {
			run := *r.Run // the old one may be being read
			run.Arriving = ""
			r.Run = &run
		}
	})
}

// awaitArrival waits for the help where the guest's agent gives it, so that who asked finds a guest that can be used.
func (m *machine) awaitArrival(ctx context.Context) {
	m.mu.Lock()
	r := m.run
	var arrived chan struct{}
	if r != nil && m.rec.Spec.Has(vm.AdditionExec) {
		arrived = r.arrived
	}
	m.mu.Unlock()
	if arrived == nil {
		return
	}
	select {
	case <-arrived:
	case <-r.ended:
	case <-ctx.Done():
	case <-time.After(arrivalWait):
	}
}
