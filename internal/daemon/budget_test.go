package daemon

import (
	"fmt"
	"testing"
	"time"

	"vigia/internal/event"
)

// TestBudgetOfADay has a guest, or its guard, write without end for days: the ledger grows by what is allowed, every event
// is an entry or part of a sum, and what rules wait for is not crowded out.
func TestBudgetOfADay(t *testing.T) {
	const day, size, days = 1 << 20, 300, 3
	b := &budgets{day: day}
	now := time.Unix(1_000_000, 0)
	var entries, bytes, given, counted, facts, gap int64
	for second := range days * 24 * 3600 {
		now = now.Add(time.Second)
		for range 10 {
			given++
			if b.admit("web", event.ConsoleLine, nil, size, now) {
				entries, bytes = entries+1, bytes+size
			}
		}
		if second%60 == 0 { // a fact now and then is within its budget
			if given++; b.admit("web", event.FileChanged, nil, size, now) {
				entries, facts = entries+1, facts+1
			} else {
				gap++
			}
		}
		if !b.admit("db", event.ConsoleLine, nil, 1, now) {
			t.Fatal("a quiet machine is bounded by another's flood")
		}
		for _, s := range b.due(now, second == days*24*3600-1) {
			counted += s.count
		}
	}
	if bytes < days*day || bytes > (days+1)*day+size {
		t.Errorf("%d bytes in %d days, with a budget of %d each", bytes, days, day)
	}
	if entries+counted != given || b.waiting() != 0 {
		t.Errorf("%d events: %d entries and %d in sums", given, entries, counted)
	}
	if gap > 0 || facts != days*24*60 {
		t.Errorf("of the facts %d are entries, %d are not", facts, gap)
	}
}

// TestBudgetOfFacts has a guard invent facts: they are bounded too, and still told one by one now and then.
func TestBudgetOfFacts(t *testing.T) {
	b := &budgets{day: 1 << 20}
	now := time.Unix(1_000_000, 0)
	passed := 0
	for range 100_000 {
		now = now.Add(100 * time.Millisecond)
		if b.admit("web", event.FileChanged, nil, 16<<10, now) {
			passed++
		}
	}
	if passed < 900 || passed > 1100 {
		t.Errorf("%d of 100,000 in 10,000 seconds passed", passed)
	}
}

// TestBudgetOnTheBus sees that what is summed is acknowledged, and told with its number.
func TestBudgetOnTheBus(t *testing.T) {
	l := openLedger(t, t.TempDir())
	b := newBus("ffffffffffffffff", silent)
	b.budgets.day = 4096
	stop := writing(t, b, l)
	var a acked
	const n = 1000
	for seq := range uint64(n) {
		if err := b.deliver("web", "guard", worker1, batchOf(line(worker1, seq+1, "web")), a.ack); err != nil {
			t.Fatal(err)
		}
	}
	a.wait(t, n)
	b.sumUp()
	for !b.settled() {
		time.Sleep(time.Millisecond)
	}
	lines, summed := int64(0), int64(0)
	err := eachRecent(t.Context(), l, func(e event.Event) {
		switch e.Kind {
		case event.ConsoleLine:
			lines++
		case event.EventsSummed:
			if e.Machine != "web" || e.Fields["kind"] != "console.line" {
				t.Errorf("%v", e)
			}
			summed += e.Fields["count"].(int64)
		}
	})
	if err != nil || lines+summed != n || summed < n/2 || lines == 0 {
		t.Errorf("%d lines and %d in sums, of %d: %v", lines, summed, n, err)
	}
	stop()
}

// TestOneGuardCrowdsOutNoOther has one guard send while the ledger stands still: there is room left for another's events,
// and memory is bounded.
func TestOneGuardCrowdsOutNoOther(t *testing.T) {
	b := newBus("ffffffffffffffff", silent)
	big := func(source string, seq uint64, machine string) event.Event {
		list := make([]string, 15)
		for i := range list {
			list[i] = fmt.Sprintf("%01000d", i)
		}
		return event.Event{ID: event.MakeID(source, seq), Machine: machine, Time: time.Now().UTC(), Kind: event.ProcessHidden, Fields: event.Fields{"views": list}}
	}
	const worker2 = "99112233445566aa"
	for seq := range uint64(3 * shareMax) {
		e := big(worker1, seq+1, "web")
		raw, err := e.Marshal()
		if err != nil {
			t.Fatal(err)
		}
		if err := b.deliver("web", "guard", worker1, batchOf(raw), func(uint64) {}); err != nil {
			t.Fatal(err)
		}
	}
	if b.bytes > shareBytes {
		t.Errorf("%d MiB wait, of one guard", b.bytes>>20)
	}
	for seq := range uint64(100) {
		if err := b.deliver("db", "guard", worker2, batchOf(line(worker2, seq+1, "db")), func(uint64) {}); err != nil {
			t.Fatal(err)
		}
	}
	if s := b.waits[worker2]; s.lost > 0 || s.events != 100 {
		t.Errorf("of another guard's 100 events %d wait, %d are lost", s.events, s.lost)
	}
}

// TestFutureEvents gives an event a time to come, by which rules would be put off: it gets the host's.
func TestFutureEvents(t *testing.T) {
	b := newBus("ffffffffffffffff", silent)
	r := b.follow()
	e := event.Event{ID: event.MakeID(worker1, 1), Machine: "web", Time: time.Now().Add(24 * time.Hour), Kind: event.MachineRebooted}
	raw, err := e.Marshal()
	if err != nil {
		t.Fatal(err)
	}
	if err := b.deliver("web", "guard", worker1, batchOf(raw), func(uint64) {}); err != nil {
		t.Fatal(err)
	}
	if got := <-r.events; time.Until(got.Time) > time.Minute {
		t.Errorf("it is from %s", got.Time)
	}
}
