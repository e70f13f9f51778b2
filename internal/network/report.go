package network

import (
	"net/netip"
	"sync"
	"time"

	"golang.org/x/time/rate"

	"vigia/internal/event"
)

// reporter turns what happens into events, at a bounded rate. Refusals that are alike are one event at once and
// then a count every reportEvery; what is beyond the rate is counted in vigia.lost.
type reporter struct {
	emit func(event.Kind, event.Fields)

	mu     sync.Mutex
	refuse map[refusal]*tally
	timer  *time.Timer
	fresh  *rate.Limiter // refusals of a new sort
	flows  *rate.Limiter
	names  *rate.Limiter
	inputs *rate.Limiter
	lost   map[event.Kind]int64
	total  int64
	closed bool

	waiting int64 // counted and not told yet
	held    func(int64)
}

type refusal struct {
	reason reason
	detail string
	key    flowKey
}

type tally struct {
	count int64
	name  string
}

const (
	reportEvery  = 10 * time.Second
	refusalsKept = 256
)

func newReporter(emit func(event.Kind, event.Fields), perSecond int) *reporter {
	limiter := func() *rate.Limiter { return rate.NewLimiter(rate.Limit(perSecond), 4*perSecond) }
	return &reporter{emit: emit, refuse: map[refusal]*tally{}, lost: map[event.Kind]int64{}, fresh: limiter(), flows: limiter(), names: limiter(), inputs: limiter()}
}

// denied reports a refusal. Its near port is left out where it differs in every try.
func (r *reporter) denied(why reason, detail string, k flowKey, name string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.closed {
		return
	}
	like := refusal{why, detail, k}
	if !k.in && k.near.IsValid() {
		like.key.near = addrOnly(k.near)
	}
	if t := r.refuse[like]; t != nil {
		t.count++
		r.wait(1)
		return
	}
	if len(r.refuse) >= refusalsKept || !r.fresh.Allow() {
		like.key = flowKey{proto: knownProto(k.proto), in: k.in}
		name = ""
		if t := r.refuse[like]; t != nil {
			t.count++
			r.wait(1)
			return
		}
	}
	r.refuse[like] = &tally{name: name}
	r.tell(like, 1, name)
	r.arm()
}

func (r *reporter) tell(like refusal, count int64, name string) {
	f := like.key.fields(name)
	f["reason"] = like.reason.String()
	if like.detail != "" {
		f["reason"] = like.detail
	}
	f["count"] = count
	r.emit(event.NetDenied, f)
}

// knownProto keeps the kinds of refusal few when a guest tries all 256 protocols.
func knownProto(p uint8) uint8 {
	if p == protoTCP || p == protoUDP || p == protoICMP {
		return p
	}
	return 0
}

func addrOnly(a netip.AddrPort) netip.AddrPort { return netip.AddrPortFrom(a.Addr(), 0) }

// flow and dns report one each while the rate allows.
func (r *reporter) flow(f event.Fields) { r.limited(event.NetFlow, r.flows, f) }
func (r *reporter) dns(f event.Fields)  { r.limited(event.NetDNS, r.names, f) }

// input reports what is given again.
func (r *reporter) input(f event.Fields) { r.limited(event.InputGiven, r.inputs, f) }

func (r *reporter) limited(kind event.Kind, l *rate.Limiter, f event.Fields) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.closed {
		return
	}
	if l.Allow() {
		r.emit(kind, f)
		return
	}
	r.lost[kind]++
	r.total++
	r.wait(1)
	r.arm()
}

// wait counts what waits to be told.
func (r *reporter) wait(n int64) {
	r.waiting += n
	if r.held != nil {
		r.held(r.waiting)
	}
}

// arm sets the clock for the next counts. No clock runs while there is nothing to count.
func (r *reporter) arm() {
	if r.timer == nil {
		r.timer = time.AfterFunc(reportEvery, r.tick)
	}
}

func (r *reporter) tick() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.timer = nil
	if r.closed {
		return
	}
	if r.flush(); len(r.refuse) > 0 {
		r.arm()
	}
}

// flush reports what was counted. A refusal that did not happen again is forgotten: the next is news.
func (r *reporter) flush() {
	for like, t := range r.refuse {
		if t.count == 0 {
			delete(r.refuse, like)
			continue
		}
		r.tell(like, t.count, t.name)
		r.wait(-t.count)
		t.count = 0
	}
	for kind, count := range r.lost {
		r.emit(event.EventsLost, event.Fields{"count": count, "source": "gate", "reason": "more " + string(kind) + " events than its rate"})
		r.wait(-count)
		delete(r.lost, kind)
	}
}

func (r *reporter) lostTotal() int64 {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.total
}

func (r *reporter) close() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.flush()
	r.closed = true
	if r.timer != nil {
		r.timer.Stop()
	}
}
