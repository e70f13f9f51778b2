package network

import (
	"fmt"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"

	"vigia/internal/event"
)

// flowKey names a flow as the guest sees it: near is its own end, far the other.
type flowKey struct {
	proto     uint8
	in        bool // the outside began it
	near, far netip.AddrPort
}

func (k flowKey) direction() string {
	if k.in {
		return "in"
	}
	return "out"
}

func protoName(p uint8) string {
	switch p {
	case protoICMP:
		return "icmp"
	case protoTCP:
		return "tcp"
	case protoUDP:
		return "udp"
	case 0:
		return ""
	}
	return fmt.Sprintf("%d", p)
}

// fields are the ends of a flow as every net event gives them.
func (k flowKey) fields(name string) event.Fields {
	f := event.Fields{"direction": k.direction()}
	if p := protoName(k.proto); p != "" {
		f["protocol"] = p
	}
	if k.near.IsValid() {
		f["local"] = k.near.String()
	}
	if k.far.IsValid() {
		f["remote"] = k.far.String()
	}
	if name != "" {
		f["name"] = event.Text([]byte(name))
	}
	return f
}

// ending says why a flow is over, in net.flow's words.
type ending string

const (
	endClosed     ending = "closed"
	endReset      ending = "reset"
	endIdle       ending = "idle"
	endQuarantine ending = "quarantine"
	endDenied     ending = "denied"
	endStopped    ending = "stopped"
)

// flow is one open flow.
type flow struct {
	key      flowKey
	client   netip.AddrPort // of an inbound flow: who really called, where far is a stand-in
	target   netip.AddrPort // of an outbound flow: where its socket goes
	internal bool           // ends in the gateway itself: no event, no rule
	name     string
	began    time.Time
	last     atomic.Int64 // UnixNano of the last payload

	bytesOut, bytesIn, packetsOut, packetsIn atomic.Int64

	keep atomic.Pointer[keeping] // what comes in on it is kept

	send    func([]byte) // of a datagram flow: what the guest sent
	pending bool         // a TCP flow being opened; guarded by the table's mutex

	mu    sync.Mutex
	cutFn []func() // close both ends at once
	ended ending   // empty: open
}

func (f *flow) touch() { f.last.Store(time.Now().UnixNano()) }

// onCut adds what a cut must do. It returns false, having done nothing, if the flow has been cut already.
func (f *flow) onCut(fn func()) bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.ended != "" {
		return false
	}
	f.cutFn = append(f.cutFn, fn)
	return true
}

// end marks the flow as over for the first reason given, and returns what a cut must do; nil if it was over before.
func (f *flow) end(why ending) (first bool, cuts []func()) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.ended != "" {
		return false, nil
	}
	f.ended = why
	cuts, f.cutFn = f.cutFn, nil
	return true, cuts
}

// flowTable holds the open flows of a machine.
type flowTable struct {
	mu         sync.Mutex
	byKey      map[flowKey]*flow
	pending    int
	closed     bool // quarantine: none may begin
	max, maxUp int
}

func newFlowTable(max, maxPending int) *flowTable {
	return &flowTable{byKey: map[flowKey]*flow{}, max: max, maxUp: maxPending}
}

func (t *flowTable) get(k flowKey) *flow {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.byKey[k]
}

func (t *flowTable) len() int {
	t.mu.Lock()
	defer t.mu.Unlock()
	return len(t.byKey)
}

func (t *flowTable) list() []*flow {
	t.mu.Lock()
	defer t.mu.Unlock()
	all := make([]*flow, 0, len(t.byKey))
	for _, f := range t.byKey {
		all = append(all, f)
	}
	return all
}

func (t *flowTable) shut() { t.setClosed(true) }
func (t *flowTable) open() { t.setClosed(false) }
func (t *flowTable) setClosed(v bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.closed = v
}

// add puts a flow in, or says why not. Where the table is full it may name an idle flow to be ended instead.
func (t *flowTable) add(f *flow, pending bool) (why reason, evict *flow) {
	t.mu.Lock()
	defer t.mu.Unlock()
	switch {
	case t.closed:
		return reasonQuarantine, nil
	case pending && t.pending >= t.maxUp && !t.sweep():
		return reasonTooManyOpening, nil
	case len(t.byKey) >= t.max:
		if evict = t.idlest(); evict == nil {
			return reasonTooManyFlows, nil
		}
		t.forget(evict)
	}
	f.began = time.Now()
	f.last.Store(f.began.UnixNano())
	f.pending = pending
	if pending {
		t.pending++
	}
	t.byKey[f.key] = f
	return allowed, evict
}

// sweep takes out flows whose opening was given up without a word. It says whether there were any.
func (t *flowTable) sweep() bool {
	for _, f := range t.byKey {
		if f.pending && time.Since(f.began) > openTimeout {
			t.forget(f)
		}
	}
	return t.pending < t.maxUp
}

// evictAfter is how long a flow is safe from making room for another.
const evictAfter = time.Minute

func (t *flowTable) idlest() *flow {
	var worst *flow
	least := time.Now().Add(-evictAfter).UnixNano()
	for _, f := range t.byKey {
		if at := f.last.Load(); at < least && !f.pending {
			worst, least = f, at
		}
	}
	return worst
}

// opened takes a flow out of the count of those being opened, and says how many are open.
func (t *flowTable) opened(f *flow) int {
	t.mu.Lock()
	defer t.mu.Unlock()
	if f.pending {
		f.pending = false
		t.pending--
	}
	return len(t.byKey) - t.pending
}

// forget takes a flow out. The caller holds mu.
func (t *flowTable) forget(f *flow) {
	if t.byKey[f.key] == f {
		delete(t.byKey, f.key)
	}
	if f.pending {
		f.pending = false
		t.pending--
	}
}

func (t *flowTable) remove(f *flow) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.forget(f)
}

// begin tries to open a flow, and reports where it can't.
func (n *Network) begin(f *flow, pending bool) reason {
	f.name = n.names.nameOf(f.key.far.Addr(), time.Now())
	why, evict := n.flows.add(f, pending)
	if evict != nil {
		n.cut(evict, endIdle)
	}
	if why == allowed {
		n.stats.flows.Add(1)
		n.keepFlow(f)
	}
	return why
}

// finish ends a flow that ended by itself, and reports it once.
func (n *Network) finish(f *flow, why ending) {
	first, _ := f.end(why)
	n.flows.remove(f)
	if first {
		n.reportFlow(f)
	}
}

// abandon takes out a flow that never came to be. It is not reported.
func (n *Network) abandon(f *flow) {
	f.end(endReset)
	n.flows.remove(f)
}

// cut ends a flow now: both ends are closed before it returns.
func (n *Network) cut(f *flow, why ending) bool {
	first, cuts := f.end(why)
	n.flows.remove(f)
	for _, fn := range cuts {
		fn()
	}
	if first {
		n.reportFlow(f)
	}
	return first
}

func (n *Network) cutAll(why ending) int {
	count := 0
	for _, f := range n.flows.list() {
		if n.cut(f, why) && !f.internal {
			count++
		}
	}
	return count
}

func (n *Network) reportFlow(f *flow) {
	if f.internal {
		return
	}
	f.keep.Load().ended(f.ended)
	k := f.key
	if f.client.IsValid() {
		k.far = f.client
	}
	fields := k.fields(f.name)
	fields["bytes_out"], fields["bytes_in"] = f.bytesOut.Load(), f.bytesIn.Load()
	fields["packets_out"], fields["packets_in"] = f.packetsOut.Load(), f.packetsIn.Load()
	fields["seconds"] = time.Since(f.began).Seconds()
	fields["reason"] = string(f.ended)
	n.report.flow(fields)
}
