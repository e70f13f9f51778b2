package network

import (
	"net/netip"
	"testing"
	"time"

	"vigia/internal/event"
)

func testFlow(port uint16) *flow {
	return &flow{key: flowKey{proto: protoTCP, near: netip.AddrPortFrom(netip.AddrFrom4(guestIP), port), far: netip.MustParseAddrPort(outside + ":80")}}
}

// A full table makes room by the flow that has been idle longest, if any has been for long.
func TestFullTableEndsTheIdlest(t *testing.T) {
	w := newWorld(t, Config{Limits: Limits{Flows: 3}})
	var flows []*flow
	for i := range 3 {
		f := testFlow(uint16(i + 1))
		if why := w.n.begin(f, false); why != allowed {
			t.Fatal(why)
		}
		flows = append(flows, f)
	}
	if why := w.n.begin(testFlow(9), false); why != reasonTooManyFlows {
		t.Errorf("a fourth of three busy flows: %v", why)
	}
	cut := false
	flows[1].onCut(func() { cut = true })
	flows[0].last.Store(time.Now().Add(-2 * evictAfter).UnixNano())
	flows[1].last.Store(time.Now().Add(-3 * evictAfter).UnixNano())
	if why := w.n.begin(testFlow(9), false); why != allowed || !cut {
		t.Errorf("no room was made: %v, cut %v", why, cut)
	}
	w.await(event.NetFlow, "idle", "10.77.0.2:2")
	if w.n.flows.len() != 3 {
		t.Errorf("%d flows", w.n.flows.len())
	}
}

// Openings that ended without a word do not fill the count for ever.
func TestStaleOpeningsAreSwept(t *testing.T) {
	w := newWorld(t, Config{Limits: Limits{Pending: 2}})
	for i := range 2 {
		f := testFlow(uint16(i + 1))
		w.n.begin(f, true)
		f.began = f.began.Add(-2 * openTimeout)
	}
	if why := w.n.begin(testFlow(3), true); why != allowed {
		t.Errorf("refused: %v", why)
	}
	if why := w.n.begin(testFlow(4), true); why != allowed {
		t.Errorf("refused: %v", why)
	}
	if why := w.n.begin(testFlow(5), true); why != reasonTooManyOpening {
		t.Errorf("a third of two: %v", why)
	}
}

// A flow that is cut while it ends is told of once, and what a cut must do is done once.
func TestFlowEndsOnce(t *testing.T) {
	w := newWorld(t, Config{})
	f := testFlow(1)
	w.n.begin(f, false)
	cuts := 0
	f.onCut(func() { cuts++ })
	w.n.cut(f, endQuarantine)
	w.n.cut(f, endStopped)
	w.n.finish(f, endClosed)
	if n := len(w.all()); n != 1 || cuts != 1 || f.onCut(func() {}) {
		t.Errorf("%d events, %d cuts", n, cuts)
	}
}
