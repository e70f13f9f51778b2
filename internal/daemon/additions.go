package daemon

import (
	"cmp"
	"context"
	"crypto/rand"
	"fmt"
	"math"
	"net"
	"net/netip"
	"time"

	"vigia/internal/api/vigiav1"
	"vigia/internal/checkpoint"
	"vigia/internal/event"
	"vigia/internal/link"
	qemu "vigia/internal/machine"
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
	r.Reseeds = done.Reseeds
	if r.Disk = checkpoint.CrashConsistent; done.Frozen {
		r.Disk = checkpoint.Frozen
	} else {
		r.DiskWhy = event.Text([]byte(done.NotFrozen))
	}
}

// arrivalTime bounds the help for a guest that goes on from a checkpoint; arrivalWait is how long who put it back waits for that.
const (
	arrivalTime  = time.Minute
	arrivalTries = 2
	arrivalWait  = 3 * time.Second
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
		err := m.help(ctx, from)
		for range arrivalTries { // its guard may have died of something else
			if err == nil || m.running() == nil || ctx.Err() != nil {
				break
			}
			err = m.help(ctx, from)
		}
		if err != nil && m.d.ctx.Err() == nil {
			m.d.log.Warn("a guest that goes on from a checkpoint was not helped", "machine", m.name(), "checkpoint", from, "error", err)
		}
	})
}

// arrival is how a guest stands that goes on from a checkpoint.
type arrival struct {
	Behind   float64 `json:"behind"`   // seconds that its clock is behind; less than 0: ahead
	Measured bool    `json:"measured"` // read in its memory; else it is the checkpoint's age, or 0 by the agent's word
	Set      bool    `json:"set"`      // by its agent
	Random   string  `json:"random"`   // who made it reseed; empty: nobody, or nobody knows yet
	Why      string  `json:"why"`      // why nobody; empty: nobody knows yet
}

// help has the guard do it, and notes that it is done: a daemon that dies before leaves it to the next one.
func (m *machine) help(ctx context.Context, id checkpoint.ID) error {
	from, err := m.d.checkpoints.Get(id)
	if err != nil {
		from = checkpoint.Record{ID: id, Disk: checkpoint.Frozen, Time: time.Now()} // removed meanwhile: to thaw once too often is no harm
	}
	m.noteArrival(arrival{Behind: time.Since(from.Time).Seconds()})
	var told link.Arrived
	ask := link.Arrive{Frozen: from.Disk == checkpoint.Frozen || from.FrozenSeconds > 0, Reseeds: from.Reseeds, Identify: m.identity()}
	if _, err := m.callGuard(ctx, link.CallArrive, ask, &told); err != nil {
		return err
	}
	m.noteArrival(m.tellArrival(from, told))
	return m.change(ctx, func(r *record) {
		if r.Run != nil && r.Run.Arriving == id {
			run := *r.Run // the old one may be being read
			run.Arriving = ""
			r.Run = &run
		}
	})
}

// noteArrival keeps it for who looks at the machine.
func (m *machine) noteArrival(a arrival) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.rec.Run != nil {
		run := *m.rec.Run
		run.Arrival = &a
		m.rec.Run = &run
	}
}

// clockClose is how far a clock may be off that is called right, in seconds: what is read in a guest that rests may be that old.
const clockClose = 1

// tellArrival makes events of what the guard has told.
func (m *machine) tellArrival(from checkpoint.Record, told link.Arrived) arrival {
	a := arrival{Set: told.ClockSet, Measured: told.Behind != nil, Random: told.ReseededBy, Why: event.Text([]byte(told.ReseedWhy))}
	switch {
	case told.Behind != nil:
		a.Behind = *told.Behind
	case !a.Set:
		a.Behind = time.Since(from.Time).Seconds()
	}
	why := event.Text([]byte(told.ClockWhy))
	if a.Set && math.Abs(a.Behind) > clockClose {
		a.Set, why = false, "the guest's agent says that it is set"
	}
	id := string(from.ID)
	m.tellIdentity(told)
	if a.Set {
		m.d.bus.emit(m.name(), event.ClockSet, event.Fields{"checkpoint": id, "behind": a.Behind, "measured": a.Measured})
	} else if math.Abs(a.Behind) > clockClose {
		m.d.bus.emit(m.name(), event.ClockBehind, event.Fields{"checkpoint": id, "behind": a.Behind, "measured": a.Measured, "why": why})
	}
	if a.Random != link.ByVMGenID && a.Random != link.ByAdditions {
		a.Random = ""
		m.d.bus.emit(m.name(), event.RandomReused, event.Fields{"checkpoint": id, "why": a.Why})
		return a
	}
	m.d.bus.emit(m.name(), event.RandomReseeded, event.Fields{"checkpoint": id, "by": a.Random, "seen": told.ReseedSeen})
	return a
}

// showArrival says it in words.
func (m *machine) showArrival(out *vigiav1.Machine) {
	m.mu.Lock()
	defer m.mu.Unlock()
	i := m.rec.Spec.Identity
	if out.Mac, out.Hostname = i.MAC, i.Hostname; i.Address.IsValid() {
		out.Address = i.Address.String()
	}
	if m.rec.Run == nil || m.rec.Run.Arrival == nil {
		return
	}
	a := *m.rec.Run.Arrival
	out.ClockBehindSeconds = &a.Behind
	off := fmt.Sprintf("%.1f s behind", a.Behind)
	if a.Behind < 0 {
		off = fmt.Sprintf("%.1f s ahead", -a.Behind)
	}
	switch {
	case a.Set && !a.Measured:
		out.Clock = "set, by the word of the guest's agent"
	case a.Set:
		out.Clock = "set by the guest's agent"
	case a.Measured && math.Abs(a.Behind) <= clockClose:
		out.Clock = "right"
	case a.Measured:
		out.Clock = off
	default:
		out.Clock = "about " + off + ", by the age of the checkpoint"
	}
	switch {
	case a.Random != "":
		out.Random = "reseeded by " + a.Random
	case a.Why != "":
		out.Random = "may repeat: " + a.Why
	default:
		out.Random = "not known yet"
	}
}

// read takes what a clone is to be called out of a request.
func (o *cloneOrder) read(r *vigiav1.CloneRequest) (err error) {
	for _, p := range r.Publish {
		port, err := vm.ParsePublish(p)
		if err != nil {
			return err
		}
		o.publish = append(o.publish, port)
	}
	if r.OwnName {
		o.identity.Hostname = r.NewName
	}
	if o.identity.MAC = r.Mac; r.Mac == "new" {
		o.identity.MAC = newMAC()
	}
	if r.Address != "" {
		if o.identity.Address, err = netip.ParseAddr(r.Address); err != nil {
			return fmt.Errorf("%w: address %.60q: use one of %v", vm.ErrInvalid, r.Address, vm.Subnet)
		}
	}
	return o.identity.Check()
}

// identify puts into a clone's spec what it is to be called. The guest must learn of it, and only its agent can tell it.
func (o *cloneOrder) identify(spec *vm.Spec) error {
	i := o.identity
	if (i != vm.Identity{}) && !spec.Has(vm.AdditionExec) {
		return fmt.Errorf("%w: a name or an address of its own: the guest must be told, and %s runs without --additions exec", vm.ErrInvalid, spec.Name)
	}
	if spec.Net.Mode != vm.NetNAT && (i.MAC != "" || i.Address.IsValid() || len(o.publish) > 0) {
		return fmt.Errorf("%w: %s has no network", vm.ErrInvalid, spec.Name)
	}
	spec.Identity.Hostname = cmp.Or(i.Hostname, spec.Identity.Hostname)
	spec.Identity.MAC = cmp.Or(i.MAC, spec.Identity.MAC)
	if i.Address.IsValid() {
		spec.Identity.Address = i.Address
	}
	return nil
}

// own says whether a clone has ports or addresses of its own: one made ahead has a gate that knows the other's.
func own(rec record) bool { return len(rec.Spec.Publish) > 0 || rec.Spec.Identity != (vm.Identity{}) }

// identity is what the machine's guest is to be told of its own; nil: nothing. It is told each time that it goes on from a checkpoint: that
// may be one from before.
func (m *machine) identity() *link.Identify {
	rec := m.record()
	i := rec.Spec.Identity
	if (i == vm.Identity{}) {
		return nil
	}
	out := &link.Identify{OldMAC: qemu.MAC(rec.origin()).String(), MAC: i.MAC, Hostname: i.Hostname}
	if i.Address.IsValid() {
		out.Address, out.Gateway = netip.PrefixFrom(i.Address, vm.Subnet.Bits()).String(), vm.Subnet.Addr().Next().String()
	}
	return out
}

func (m *machine) tellIdentity(told link.Arrived) {
	i := m.record().Spec.Identity
	if (i == vm.Identity{}) {
		return
	}
	address := ""
	if i.Address.IsValid() {
		address = i.Address.String()
	}
	m.d.bus.emit(m.name(), event.CloneIdentity, event.Fields{"hostname": i.Hostname, "mac": i.MAC, "address": address,
		"done": told.Identified, "why": event.Text([]byte(told.IdentifyWhy))})
}

// newMAC is one of QEMU's range, that nobody chose.
func newMAC() string {
	var b [3]byte
	rand.Read(b[:])
	return net.HardwareAddr{0x52, 0x54, 0x00, b[0], b[1], b[2]}.String()
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
