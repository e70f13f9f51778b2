package event

import (
	"sync"
	"time"
)

// Bounds of a Flood. Whatever repeats, it lets through at most floodSorts×floodBurst events at once, and from then on
// about floodSorts×floodBurst every floodCalm and floodTick every floodPeriod.
const (
	floodBurst  = 4                // events of a sort that pass at once
	floodCalm   = 10 * time.Second // after which a sort's burst is its own again
	floodPeriod = time.Second
	floodTick   = 32  // held events that a period lets go
	floodSorts  = 256 // sorts that are told apart, beside those that always are
)

// Flood stands before a ledger where somebody hostile may repeat what he does: a guest that reads a watched file for
// ever, or reboots for ever. The first events of a sort pass at once; those that follow are joined into one a second,
// in which counts are sums and all else is the last one's. Nothing is dropped but what is told of as vigia.lost: more
// sorts at one time than can be kept apart.
type Flood struct {
	source string
	emit   func(Event)
	now    func() time.Time
	after  func(time.Duration, func())

	mu    sync.Mutex
	sorts map[string]*floodSort
	held  []*floodSort // that hold an event back, oldest first
	lost  int64
	armed bool

	// Waiting, where it is set, is told how many events are held back or lost and not told of, whenever that changes. It is
	// called with a lock held.
	Waiting func(int64)
	waiting int64
}

// Alike says how an event is joined with others.
type Alike struct {
	Sort   string   // events of one sort are joined
	Sum    []string // fields of type Int that add up; one that is absent counts as 1
	Always bool     // the sort is told apart however many there are: the caller has few of these
}

type floodSort struct {
	left int
	seen time.Time
	held *Event
	n    int64 // events that were joined to it, itself among them
}

// NewFlood makes a Flood whose losses are told in the name of source. emit is called with a lock held: it must not
// block, nor call the Flood.
func NewFlood(source string, emit func(Event)) *Flood {
	return &Flood{source: source, emit: emit, now: time.Now, sorts: map[string]*floodSort{},
		after: func(d time.Duration, f func()) { time.AfterFunc(d, f) }}
}

// Emit passes an event on, now or joined with others within seconds. The fields are the Flood's from then on.
func (f *Flood) Emit(a Alike, e Event) {
	f.mu.Lock()
	defer f.mu.Unlock()
	now := f.now()
	s := f.sorts[a.Sort]
	if s == nil {
		if f.arm(); len(f.sorts) >= floodSorts && !a.Always {
			f.lost++
			f.wait(1)
			return
		}
		s = &floodSort{}
		f.sorts[a.Sort] = s
	}
	if now.Sub(s.seen) >= floodCalm && s.held == nil {
		s.left = floodBurst
	}
	s.seen = now
	switch {
	case s.held != nil:
		s.join(a.Sum, e)
		f.wait(1)
	case s.left > 0:
		s.left--
		f.emit(e)
	default:
		s.held, s.n = &e, 1
		f.held = append(f.held, s)
		f.wait(1)
	}
}

// wait counts what waits.
func (f *Flood) wait(n int64) {
	f.waiting += n
	if f.Waiting != nil {
		f.Waiting(f.waiting)
	}
}

// join adds the counts of what is held to those of the event that takes its place.
func (s *floodSort) join(sum []string, e Event) {
	count := func(e *Event, name string) int64 {
		if n, ok := e.Fields[name].(int64); ok {
			return n
		}
		return 1
	}
	for _, name := range sum {
		total := count(s.held, name) + count(&e, name)
		if e.Fields == nil {
			e.Fields = Fields{}
		}
		e.Fields[name] = total
	}
	s.held = &e
	s.n++
}

// arm sets the clock. No clock runs while nothing is held and no sort is remembered.
func (f *Flood) arm() {
	if !f.armed {
		f.armed = true
		f.after(floodPeriod, f.tick)
	}
}

func (f *Flood) tick() {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.armed = false
	f.flush(floodTick)
	now := f.now()
	for name, s := range f.sorts {
		if s.held == nil && now.Sub(s.seen) >= floodCalm {
			delete(f.sorts, name)
		}
	}
	if len(f.sorts) > 0 {
		f.arm()
	}
}

// flush lets up to most held events go.
func (f *Flood) flush(most int) {
	n := min(most, len(f.held))
	for _, s := range f.held[:n] {
		f.emit(*s.held)
		f.wait(-s.n)
		s.held, s.n = nil, 0
	}
	f.held = append(f.held[:0], f.held[n:]...)
	if f.lost > 0 {
		f.emit(Event{Kind: EventsLost, Fields: Fields{"count": f.lost, "source": f.source, "reason": "more sorts of events at one time than are told apart"}})
		f.wait(-f.lost)
		f.lost = 0
	}
}

// Flush lets all go that is held: what comes after is the end.
func (f *Flood) Flush() {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.flush(len(f.held))
}
