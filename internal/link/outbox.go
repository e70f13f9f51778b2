package link

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"sync"
	"time"

	"vigia/internal/event"
)

// Bounds of an Outbox, in events. Counts and console lines stop at LowWater, so that a flood of them leaves room for
// what rules wait for.
const (
	OutboxSize = 8192
	LowWater   = 6144
	BatchSize  = 256
)

// Outbox keeps a worker's events until the daemon has said that they are in the ledger.
//
// It is what makes the death of the daemon lose nothing: the next daemon is given everything that was not
// acknowledged, in order, under the same ids. What does not fit is counted and told as vigia.lost.
type Outbox struct {
	source  string
	machine string
	now     func() time.Time
	// Told, if set, is called with each event that is put in, by who puts it in.
	Told func(event.Kind, event.Fields)

	mu    sync.Mutex
	seq   uint64
	queue []event.Event // unacknowledged, oldest first
	lost  int64
	held  int64 // events that wait before this outbox, to be joined
	tally *Tally
	// delivered is the highest sequence number that a daemon has taken.
	delivered uint64
	signal    chan struct{}
}

// NewOutbox makes an empty outbox for one life of one worker of the machine.
func NewOutbox(machine string) *Outbox {
	var b [8]byte
	rand.Read(b[:])
	return &Outbox{source: hex.EncodeToString(b[:]), machine: machine, now: time.Now, signal: make(chan struct{}, 1)}
}

// KeepTally notes from now on in t what is not in the ledger yet.
func (o *Outbox) KeepTally(t *Tally) {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.tally = t
	o.count()
}

// Holder gives what holds events back before this outbox a way to say how many: they have no number yet, and die with
// the process too.
func (o *Outbox) Holder() func(n int64) {
	said := int64(0)
	return func(n int64) {
		o.mu.Lock()
		defer o.mu.Unlock()
		o.held, said = o.held+n-said, n
		o.count()
	}
}

// count brings the tally up to date; the lock is held. Kept is all before the queue.
func (o *Outbox) count() {
	o.tally.Set(Count{Given: o.seq, Kept: o.seq - uint64(len(o.queue)), Untold: uint64(o.lost + o.held)})
}

// Source is the first part of the ids of this outbox's events.
func (o *Outbox) Source() string { return o.source }

// SetMachine names the machine of all events that are here and to come.
func (o *Outbox) SetMachine(name string) {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.machine = name
	for i := range o.queue {
		o.queue[i].Machine = name
	}
}

// Emit puts an event in. It never blocks.
func (o *Outbox) Emit(kind event.Kind, fields event.Fields) {
	if o.Told != nil {
		o.Told(kind, fields)
	}
	o.mu.Lock()
	defer o.mu.Unlock()
	defer o.count()
	limit := OutboxSize
	if Bulk(kind, fields) {
		limit = LowWater
	}
	if len(o.queue) >= limit {
		o.lost++
		return
	}
	o.reportLost()
	o.add(kind, fields)
}

func (o *Outbox) add(kind event.Kind, fields event.Fields) {
	o.seq++
	o.queue = append(o.queue, event.Event{ID: event.MakeID(o.source, o.seq), Machine: o.machine, Time: o.now().UTC(), Kind: kind, Fields: fields})
	select {
	case o.signal <- struct{}{}:
	default:
	}
}

// reportLost tells of what was dropped as soon as there is room for saying so.
func (o *Outbox) reportLost() {
	if o.lost > 0 && len(o.queue) < LowWater {
		n := o.lost
		o.lost = 0
		o.add(event.EventsLost, event.Fields{"count": n, "source": o.source, "reason": "the daemon did not take events for too long"})
	}
}

// Bulk tells what a guest makes by the thousand from what rules wait for.
func Bulk(kind event.Kind, fields event.Fields) bool {
	switch kind {
	case event.ConsoleLine, event.GuestLog, event.NetDNS, event.NetFlow, event.NetDenied, event.ProcessForked, event.ProcessExited:
		return true
	case event.DiskRead, event.DiskWrite:
		watched, _ := fields["watched"].(bool)
		return !watched
	}
	return false
}

// Send delivers what has not been delivered on this connection, in order, until ctx ends or deliver fails. Delivered
// events stay in the outbox until Ack: rules see an event at once, and nothing waits for the ledger.
// deliver says how many of a batch it took.
func (o *Outbox) Send(ctx context.Context, deliver func(context.Context, []event.Event) (int, error)) error {
	var sent uint64
	for {
		batch := o.after(sent)
		if len(batch) == 0 {
			select {
			case <-o.signal:
				continue
			case <-ctx.Done():
				return ctx.Err()
			}
		}
		n, err := deliver(ctx, batch)
		if err != nil {
			return err
		}
		_, sent, _ = event.SplitID(batch[n-1].ID)
		o.mu.Lock()
		o.delivered = sent
		o.mu.Unlock()
	}
}

// after returns the next events behind a sequence number. The queue has no gaps.
func (o *Outbox) after(sent uint64) []event.Event {
	o.mu.Lock()
	defer o.mu.Unlock()
	first := o.seq + 1 - uint64(len(o.queue))
	skip := 0
	if sent >= first {
		skip = int(sent - first + 1)
	}
	rest := o.queue[skip:]
	return append([]event.Event(nil), rest[:min(len(rest), BatchSize)]...)
}

// Drained returns once the events that are in now have been delivered on some connection, or ctx has ended.
func (o *Outbox) Drained(ctx context.Context) error {
	o.mu.Lock()
	want := o.seq
	o.mu.Unlock()
	for {
		o.mu.Lock()
		done := o.delivered >= want
		o.mu.Unlock()
		if done {
			return nil
		}
		select {
		case <-time.After(5 * time.Millisecond):
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// Ack drops the events up to and including seq: they are in the ledger.
func (o *Outbox) Ack(seq uint64) {
	o.mu.Lock()
	defer o.mu.Unlock()
	first := o.seq + 1 - uint64(len(o.queue))
	if seq < first || seq > o.seq {
		return
	}
	n := int(seq - first + 1)
	rest := copy(o.queue, o.queue[n:])
	clear(o.queue[rest:])
	o.queue = o.queue[:rest]
	o.reportLost()
	o.count()
}
