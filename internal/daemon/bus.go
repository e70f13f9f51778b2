package daemon

import (
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
	"strings"
	"sync"
	"time"

	"vigia/internal/event"
	"vigia/internal/ledger"
	"vigia/internal/link"
	"vigia/internal/policy"
)

// Bounds of the bus: events that wait for the ledger, and those that a slow reader of `events -f` may be behind.
const (
	pendingMax = 4 * link.OutboxSize
	shareMax   = link.OutboxSize // of one source
	shareBytes = 16 << 20        // likewise
	bytesMax   = 64 << 20        // of all
	readerMax  = 1024
	appendMax  = 512
)

// bus is where all events meet: rules see an event at once, and it is handed to the ledger; nothing waits for the
// ledger. An event that comes twice, because a daemon died before it could say that it had it, is known by its id.
type bus struct {
	source string
	now    func() time.Time
	log    *slog.Logger
	decide func(policy.Decision) // carries a decision out; must not block
	// panicked is told of a guest that stands still in a panic, and what rules decided on it; must not block.
	panicked func(machine string, decisions []policy.Decision)

	mu      sync.Mutex
	seq     uint64
	last    map[string]uint64 // the highest sequence number taken, by source
	engine  *policy.Engine
	pending []pendingEvent
	waits   map[string]*share // by source
	bytes   int               // of all that wait
	lost    int64
	budgets budgets
	wake    chan struct{}
	readers map[*reader]bool

	// What the next daemon could not know without being told: see debts.go.
	tally   *link.Tally
	kept    uint64 // highest of its own numbers that is in the ledger
	held    int64  // own events that wait to be joined
	orphans int64  // pending events whose worker is dead
	owed    int64  // losses whose telling is not in the ledger yet
}

type pendingEvent struct {
	entry  []byte // nil: it was summed, and is only to be acknowledged
	source string
	seq    uint64
	ack    func(seq uint64) // nil: nobody waits for it
	orphan bool             // its worker is dead and can't give it again
}

// share is what one source's events take of the room: a guard that sends without end crowds out no other's.
type share struct {
	events, bytes int
	lost          int64  // for which there was no room, and which are not told of yet
	machine       string // of the lost ones
}

// reader follows the events as they come.
type reader struct {
	events chan event.Event
	since  int64 // when it began to follow, in nanoseconds since 1970
}

func newBus(source string, log *slog.Logger) *bus {
	return &bus{source: source, now: time.Now, log: log, engine: policy.NewEngine(nil), last: map[string]uint64{},
		waits: map[string]*share{}, wake: make(chan struct{}, 1), readers: map[*reader]bool{}, decide: func(policy.Decision) {},
		panicked: func(string, []policy.Decision) {}}
}

// recall learns from the ledger's end which events of workers that still live are there already.
func (b *bus) recall(ctx context.Context, l *ledger.Log) error {
	return eachRecent(ctx, l, func(e event.Event) {
		if source, seq, ok := event.SplitID(e.ID); ok {
			b.last[source] = max(b.last[source], seq)
		}
	})
}

// exchange puts other rules in force. Those that stay as they were keep what they have seen; new ones begin now.
func (b *bus) exchange(rules []policy.Rule) error {
	b.mu.Lock()
	defer b.mu.Unlock()
	seen, err := b.engine.Snapshot()
	if err != nil {
		return err
	}
	engine := policy.NewEngine(rules)
	if err := engine.Restore(seen); err != nil {
		return err
	}
	b.engine = engine
	return nil
}

// rebuild puts rules in force at a start, and lets them see the recent past from the ledger: a sequence that began
// before a restart is not forgotten. It returns what the last daemon left undone.
func (b *bus) rebuild(ctx context.Context, l *ledger.Log, rules []policy.Rule) (unfinished, error) {
	engine := policy.NewEngine(rules)
	var u unfinished
	err := eachRecent(ctx, l, func(e event.Event) {
		u.decided = append(u.decided, engine.Event(e)...)
		u.follow(e)
	})
	if err != nil {
		return unfinished{}, err
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	b.engine = engine
	return u, nil
}

// eachRecent gives the events at the ledger's end: more than any worker's outbox holds.
func eachRecent(ctx context.Context, l *ledger.Log, f func(event.Event)) error {
	entries, err := l.Tail(ctx, pendingMax)
	if err != nil {
		return err
	}
	for _, entry := range entries {
		if e, err := event.Unmarshal(entry.Data); err == nil { // an older version's event may be unknown to this one
			f(e)
		}
	}
	return nil
}

// emit is for the daemon's own events.
func (b *bus) emit(machine string, kind event.Kind, fields event.Fields) event.Event {
	b.mu.Lock()
	defer b.mu.Unlock()
	e, _ := b.emitThen(machine, kind, fields, nil)
	return e
}

// ask is emit for what is told before it is done: it returns what the rules decide on that very event.
func (b *bus) ask(machine string, kind event.Kind, fields event.Fields) (event.Event, []policy.Decision) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.emitThen(machine, kind, fields, nil)
}

// emitThen emits with the lock held, and calls sealed once the event is in the ledger.
func (b *bus) emitThen(machine string, kind event.Kind, fields event.Fields, sealed func(uint64)) (event.Event, []policy.Decision) {
	b.seq++
	e := event.Event{ID: event.MakeID(b.source, b.seq), Machine: machine, Time: b.now().UTC(), Kind: kind, Fields: fields}
	decisions := b.take(e, sealed)
	b.count()
	return e, decisions
}

// deliver takes a worker's batch. machine is what the daemon knows the worker to guard: a worker that was taken over
// can speak for no other. ack is called, in order, once events are in the ledger.
func (b *bus) deliver(machine, worker, source string, batch []json.RawMessage, ack func(seq uint64)) error {
	for _, raw := range batch {
		e, err := event.Unmarshal(raw)
		if err != nil {
			return err
		}
		from, seq, ok := event.SplitID(e.ID)
		if !ok || from != source || e.Machine != machine {
			return fmt.Errorf("%w: event %q of %q where %q of %q was expected", link.ErrProtocol, event.Text([]byte(e.ID)), event.Text([]byte(e.Machine)), source, machine)
		}
		if ahead := b.now().Add(time.Minute); e.Time.After(ahead) { // one clock is the host's: rules are not to be put off
			e.Time = b.now().UTC()
		}
		if !saysOf(worker, e.Kind) {
			return fmt.Errorf("%w: a %s has no word on %s", link.ErrProtocol, worker, e.Kind)
		}
		b.mu.Lock()
		if seq > b.last[source] {
			b.last[source] = seq
			b.take(e, ack)
		} else {
			b.again(source, seq, ack)
		}
		b.mu.Unlock()
	}
	return nil
}

// saysOf tells what guards and gates tell of. All else is the daemon's: one that was taken over can't say that an alert was
// answered, or that somebody asked for something.
func saysOf(worker string, kind event.Kind) bool {
	area, _, _ := strings.Cut(string(kind), ".")
	switch {
	case kind == event.EventsLost:
		return true
	case worker == "gate":
		return area == "net" || kind == event.InputGiven // of a clone that is given its past
	}
	switch area {
	case "machine":
		return kind == event.MachineRebooted || kind == event.MachinePanicked
	case "net", "policy", "checkpoint", "clone", "replay", "response", "access", "incident", "vigia":
		return false
	}
	return true
}

// again acknowledges an event that is known: at once if the ledger has it, with the others if it still waits.
func (b *bus) again(source string, seq uint64, ack func(uint64)) {
	for i := range b.pending {
		if b.pending[i].source == source && b.pending[i].seq == seq {
			b.pending[i].ack = ack
			return
		}
	}
	go ack(seq)
}

// take is called with the lock held, so that rules, ledger and readers see one order.
func (b *bus) take(e event.Event, ack func(uint64)) []policy.Decision {
	decisions := b.engine.Event(e)
	if e.Kind == event.MachinePanicked {
		b.panicked(e.Machine, decisions)
	} else {
		for _, d := range decisions {
			b.decide(d)
		}
	}
	b.keep(e, ack)
	return decisions
}

// keep hands an event to the ledger and to readers.
func (b *bus) keep(e event.Event, ack func(uint64)) {
	entry, err := e.Marshal()
	if err != nil {
		b.log.Error("event does not keep to its kind", "kind", e.Kind, "error", err)
		return
	}
	source, seq, _ := event.SplitID(e.ID)
	if source != b.source && !b.budgets.admit(e.Machine, e.Kind, e.Fields, len(entry), b.now()) {
		b.wait(pendingEvent{source: source, seq: seq, ack: ack}, e.Machine)
		b.count()
		return
	}
	b.wait(pendingEvent{entry: entry, source: source, seq: seq, ack: ack}, e.Machine)
	for r := range b.readers {
		select {
		case r.events <- e:
		default:
			delete(b.readers, r)
			close(r.events)
		}
	}
}

// wait puts an event behind those that wait for the ledger, if there is room for it and its source has room left.
func (b *bus) wait(p pendingEvent, machine string) {
	s := b.waits[p.source]
	if s == nil {
		s = &share{}
		b.waits[p.source] = s
	}
	s.machine = machine
	if len(b.pending) >= pendingMax || b.bytes+len(p.entry) > bytesMax || s.events >= shareMax || s.bytes+len(p.entry) > shareBytes {
		s.lost++
		b.lost++
		b.count()
		return
	}
	b.reportLost(p.source)
	b.push(p)
}

func (b *bus) push(p pendingEvent) {
	s := b.waits[p.source]
	s.events, s.bytes, b.bytes = s.events+1, s.bytes+len(p.entry), b.bytes+len(p.entry)
	b.pending = append(b.pending, p)
	select {
	case b.wake <- struct{}{}:
	default:
	}
}

// reportLost puts the count of what a source had no room for before its next event that has.
func (b *bus) reportLost(source string) {
	s := b.waits[source]
	if s.lost == 0 {
		return
	}
	b.seq++
	e := event.Event{ID: event.MakeID(b.source, b.seq), Machine: s.machine, Time: b.now().UTC(), Kind: event.EventsLost,
		Fields: event.Fields{"count": s.lost, "source": source, "reason": "they came faster than the ledger could be written"}}
	b.lost -= s.lost
	s.lost = 0
	if entry, err := e.Marshal(); err == nil {
		if b.waits[b.source] == nil {
			b.waits[b.source] = &share{}
		}
		b.push(pendingEvent{entry: entry, source: b.source, seq: b.seq})
	}
}

// tick lets rules that wait for time to pass see it.
func (b *bus) tick(now time.Time) {
	b.mu.Lock()
	defer b.mu.Unlock()
	for _, d := range b.engine.Tick(now) {
		b.decide(d)
	}
	b.tellSums(now, false)
}

// write moves pending events into the ledger until ctx ends, then the rest. A ledger that can't be written (a full
// disk) is tried again each second; meanwhile events wait, and past the bound they are counted.
func (b *bus) write(ctx context.Context, l *ledger.Log) {
	complained := false
	for {
		batch := b.front()
		if len(batch) == 0 {
			select {
			case <-b.wake:
				continue
			case <-ctx.Done():
				return
			}
		}
		var entries [][]byte
		for _, p := range batch {
			if p.entry != nil {
				entries = append(entries, p.entry)
			}
		}
		if _, err := l.AppendAll(context.WithoutCancel(ctx), entries); err != nil {
			if !complained {
				b.log.Error("the ledger can't be written, events wait in memory: make room on the disk", "error", err)
				complained = true
			}
			select {
			case <-time.After(time.Second):
				continue
			case <-ctx.Done():
				return
			}
		}
		if complained {
			b.log.Info("the ledger is written again")
			complained = false
		}
		b.written(len(batch))
	}
}

func (b *bus) front() []pendingEvent {
	b.mu.Lock()
	defer b.mu.Unlock()
	return append([]pendingEvent(nil), b.pending[:min(len(b.pending), appendMax)]...)
}

// written drops the first n pending events and acknowledges the last of each source.
func (b *bus) written(n int) {
	b.mu.Lock()
	acks := map[string]pendingEvent{}
	var own []pendingEvent
	for _, p := range b.pending[:n] {
		s := b.waits[p.source]
		s.events, s.bytes, b.bytes = s.events-1, s.bytes-len(p.entry), b.bytes-len(p.entry)
		if p.orphan {
			b.orphans--
		}
		switch {
		case p.source == b.source:
			b.kept = p.seq
			own = append(own, p)
		case p.ack != nil:
			acks[p.source] = p
		}
	}
	rest := copy(b.pending, b.pending[n:])
	clear(b.pending[rest:]) // the entries are garbage now
	b.pending = b.pending[:rest]
	b.tellWaited()
	b.count()
	b.mu.Unlock()
	for _, p := range acks {
		p.ack(p.seq)
	}
	for _, p := range own {
		if p.ack != nil {
			p.ack(p.seq)
		}
	}
}

// tellWaited tells what had no room of sources that send no more, and forgets them.
func (b *bus) tellWaited() {
	for source, s := range b.waits {
		if s.lost > 0 && len(b.pending) < pendingMax/2 {
			b.reportLost(source)
		}
		if s.events == 0 && s.lost == 0 && source != b.source {
			delete(b.waits, source)
		}
	}
}

// settled reports whether everything taken so far is in the ledger.
func (b *bus) settled() bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	return len(b.pending) == 0
}

// follow registers a reader; what it does not read in time ends it.
func (b *bus) follow() *reader {
	b.mu.Lock()
	defer b.mu.Unlock()
	r := &reader{events: make(chan event.Event, readerMax), since: b.now().Add(-time.Hour).UnixNano()}
	b.readers[r] = true
	return r
}

// waiting are the entries that the ledger does not have yet.
func (b *bus) waiting() [][]byte {
	b.mu.Lock()
	defer b.mu.Unlock()
	var out [][]byte
	for _, p := range b.pending {
		if p.entry != nil {
			out = append(out, p.entry)
		}
	}
	return out
}

func (b *bus) unfollow(r *reader) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.readers[r] {
		delete(b.readers, r)
		close(r.events)
	}
}
