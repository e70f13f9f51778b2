package daemon

import (
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
	"sync"
	"testing"
	"time"

	"vigia/internal/event"
	"vigia/internal/ledger"
	"vigia/internal/policy"
)

const pausedRule = `id: paused
title: A machine was paused
severity: low
every: 1ms
on: machine.paused
respond: [alert]
`

func rules(t *testing.T, text string) []policy.Rule {
	t.Helper()
	rules, err := policy.Parse("test.yaml", []byte(text), Responses)
	if err != nil {
		t.Fatal(err)
	}
	return rules
}

// station is a bus with a ledger in a directory of its own, as a daemon has it.
type station struct {
	*bus
	log     *ledger.Log
	decided []policy.Decision
	stop    func()
}

func newStation(t *testing.T, dir, source string, rs []policy.Rule) (*station, []policy.Decision) {
	t.Helper()
	l, err := ledger.Open(t.Context(), dir, ledger.Options{})
	if err != nil {
		t.Fatal(err)
	}
	s := &station{bus: newBus(source, slog.New(slog.DiscardHandler)), log: l}
	s.decide = func(d policy.Decision) { s.decided = append(s.decided, d) }
	if err := s.recall(t.Context(), l); err != nil {
		t.Fatal(err)
	}
	untold, err := s.rebuild(t.Context(), l, rs)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() {
		s.write(ctx, l)
		close(done)
	}()
	var once sync.Once
	s.stop = func() {
		once.Do(func() {
			cancel()
			<-done
			l.Close(context.Background())
		})
	}
	t.Cleanup(s.stop)
	return s, untold
}

// settle waits until everything taken is in the ledger.
func (s *station) settle(t *testing.T) {
	t.Helper()
	for range 1000 {
		if s.settled() {
			return
		}
		time.Sleep(5 * time.Millisecond)
	}
	t.Fatal("the ledger does not take what the bus has")
}

// noon is near now, since decisions of long ago are not taken up again.
var noon = time.Now().UTC().Truncate(time.Second).Add(-time.Minute)

// batch is what a worker sends: n pauses of the machine, numbered from first on.
func batch(t *testing.T, source string, first uint64, n int) (out []json.RawMessage) {
	t.Helper()
	for i := range n {
		e := event.Event{ID: event.MakeID(source, first+uint64(i)), Machine: "web", Time: noon.Add(time.Duration(first+uint64(i)) * time.Second), Kind: event.MachinePaused}
		b, err := e.Marshal()
		if err != nil {
			t.Fatal(err)
		}
		out = append(out, b)
	}
	return out
}

// acks collects acknowledgements, which come from other goroutines.
type acks struct {
	mu   sync.Mutex
	seqs []uint64
}

func (a *acks) ack(seq uint64) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.seqs = append(a.seqs, seq)
}

func (a *acks) highest() (most uint64) {
	a.mu.Lock()
	defer a.mu.Unlock()
	for _, s := range a.seqs {
		most = max(most, s)
	}
	return most
}

func (s *station) ids(t *testing.T) map[string]int {
	t.Helper()
	out := map[string]int{}
	for entry, err := range s.log.Read(t.Context(), 0, s.log.Head().Size) {
		if err != nil {
			t.Fatal(err)
		}
		e, err := event.Unmarshal(entry.Data)
		if err != nil {
			t.Fatal(err)
		}
		out[e.ID]++
	}
	return out
}

// TestEventsOfADeadDaemonComeOnce: a worker gives again what its daemon did not acknowledge. The ledger has each event
// once, and the rules see each once.
func TestEventsOfADeadDaemonComeOnce(t *testing.T) {
	dir := t.TempDir()
	first, _ := newStation(t, dir, "d1", rules(t, pausedRule))
	var a acks
	if err := first.deliver("web", "w", batch(t, "w", 1, 5), a.ack); err != nil {
		t.Fatal(err)
	}
	first.settle(t)
	if a.highest() != 5 {
		t.Errorf("acknowledged up to %d of 5", a.highest())
	}
	first.stop() // it dies before the worker hears of it

	second, _ := newStation(t, dir, "d2", rules(t, pausedRule))
	var again acks
	if err := second.deliver("web", "w", batch(t, "w", 3, 5), again.ack); err != nil {
		t.Fatal(err)
	}
	second.settle(t)
	time.Sleep(20 * time.Millisecond) // acknowledgements of known events are sent beside
	if again.highest() != 7 {
		t.Errorf("acknowledged up to %d of 7", again.highest())
	}
	ids := second.ids(t)
	for i := uint64(1); i <= 7; i++ {
		if n := ids[event.MakeID("w", i)]; n != 1 {
			t.Errorf("event %d is in the ledger %d times", i, n)
		}
	}
	if len(second.decided) != 2 {
		t.Errorf("the rules saw %d new events, want 2", len(second.decided))
	}
}

// TestAWorkerSpeaksForItsOwnMachineOnly: one that its guest took over forges events of another, or of another source.
func TestAWorkerSpeaksForItsOwnMachineOnly(t *testing.T) {
	s, _ := newStation(t, t.TempDir(), "d", nil)
	for name, try := range map[string]error{
		"another machine": s.deliver("db", "w", batch(t, "w", 1, 1), func(uint64) {}),
		"another source":  s.deliver("web", "v", batch(t, "w", 1, 1), func(uint64) {}),
		"no event":        s.deliver("web", "w", []json.RawMessage{[]byte(`{"kind":"machine.exploded"}`)}, func(uint64) {}),
		"a huge one":      s.deliver("web", "w", []json.RawMessage{fmt.Appendf(nil, `{"id":%q}`, make([]byte, event.MaxEvent))}, func(uint64) {}),
	} {
		if try == nil {
			t.Errorf("%s is believed", name)
		}
	}
	s.settle(t)
	if n := s.log.Head().Size; n != 0 {
		t.Errorf("%d forged events are in the ledger", n)
	}
}

// TestADecisionThatWasNotToldIsNotLost: the daemon died between a rule's last event and its alert.
func TestADecisionThatWasNotToldIsNotLost(t *testing.T) {
	dir := t.TempDir()
	first, _ := newStation(t, dir, "d1", rules(t, pausedRule))
	if err := first.deliver("web", "w", batch(t, "w", 1, 1), func(uint64) {}); err != nil {
		t.Fatal(err)
	}
	first.settle(t)
	first.stop()

	second, untold := newStation(t, dir, "d2", rules(t, pausedRule))
	if len(untold) != 1 || untold[0].Rule != "paused" || untold[0].Machine != "web" {
		t.Fatalf("untold: %+v", untold)
	}
	second.emit("web", event.PolicyAlert, event.Fields{"rule": "paused", "title": "x", "severity": "low", "events": []string{}, "respond": []string{}})
	second.settle(t)
	second.stop()
	if _, untold := newStation(t, dir, "d3", rules(t, pausedRule)); len(untold) != 0 {
		t.Errorf("told, and told again: %+v", untold)
	}
}

// TestAReloadKeepsWhatRulesHaveSeen and acts on nothing that was before it.
func TestAReloadKeepsWhatRulesHaveSeen(t *testing.T) {
	twice := "id: twice\ntitle: Paused twice\nseverity: low\nsequence:\n  within: 1h\n  steps:\n    - on: machine.paused\n    - on: machine.resumed\nrespond: [alert]\n"
	s, _ := newStation(t, t.TempDir(), "d", rules(t, twice))
	s.emit("web", event.MachinePaused, nil)
	if err := s.exchange(rules(t, twice+"---\n"+pausedRule)); err != nil {
		t.Fatal(err)
	}
	if len(s.decided) != 0 {
		t.Errorf("a new rule acted on the past: %+v", s.decided)
	}
	s.emit("web", event.MachineResumed, nil)
	if len(s.decided) != 1 || s.decided[0].Rule != "twice" {
		t.Errorf("half a sequence was forgotten: %+v", s.decided)
	}
}

// TestWhatHasNoRoomIsCounted: the ledger can't be written for long, and a flood comes.
func TestWhatHasNoRoomIsCounted(t *testing.T) {
	b := newBus("d", slog.New(slog.DiscardHandler)) // nobody writes
	for range pendingMax + 10 {
		b.emit("web", event.MachinePaused, nil)
	}
	if n := len(b.waiting()); n != pendingMax {
		t.Fatalf("%d events wait, the bound is %d", n, pendingMax)
	}
	b.written(2)
	b.emit("web", event.MachineResumed, nil)
	all := b.waiting()
	lost, err := event.Unmarshal(all[len(all)-2])
	if err != nil || lost.Kind != event.EventsLost || lost.Fields["count"] != int64(10) {
		t.Errorf("after the flood: %+v, %v", lost, err)
	}
}
