package daemon

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"slices"
	"sync"
	"testing"
	"time"

	"vigia/internal/event"
	"vigia/internal/ledger"
)

var silent = slog.New(slog.NewTextHandler(io.Discard, nil))

func openLedger(t *testing.T, dir string) *ledger.Log {
	t.Helper()
	l, err := ledger.Open(t.Context(), dir, ledger.Options{})
	if err != nil {
		t.Fatal(err)
	}
	return l
}

// writing runs the bus's writer until the test calls stop.
func writing(t *testing.T, b *bus, l *ledger.Log) (stop func()) {
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() {
		b.write(ctx, l)
		close(done)
	}()
	return func() {
		t.Helper()
		for deadline := time.Now().Add(20 * time.Second); !b.settled(); time.Sleep(5 * time.Millisecond) {
			if time.Now().After(deadline) {
				t.Fatal("events are not written")
			}
		}
		cancel()
		<-done
		if err := l.Close(context.Background()); err != nil {
			t.Fatal(err)
		}
	}
}

func line(source string, seq uint64, machine string) json.RawMessage {
	e := event.Event{ID: event.MakeID(source, seq), Machine: machine, Time: time.Now().UTC(), Kind: event.ConsoleLine, Fields: event.Fields{"line": fmt.Sprint(seq)}}
	b, err := e.Marshal()
	if err != nil {
		panic(err)
	}
	return b
}

type acked struct {
	sync.Mutex
	seq uint64
}

func (a *acked) ack(seq uint64) {
	a.Lock()
	defer a.Unlock()
	a.seq = max(a.seq, seq)
}

func (a *acked) wait(t *testing.T, want uint64) {
	t.Helper()
	for deadline := time.Now().Add(20 * time.Second); ; time.Sleep(5 * time.Millisecond) {
		a.Lock()
		got := a.seq
		a.Unlock()
		if got == want {
			return
		}
		if got > want || time.Now().After(deadline) {
			t.Fatalf("acknowledged up to %d, want %d", got, want)
		}
	}
}

const worker1 = "00112233445566aa"

// TestEventsComeTwice gives the same events to one daemon again and again, and to the next: each is in the ledger once, and
// acknowledged each time.
func TestEventsComeTwice(t *testing.T) {
	dir := t.TempDir()
	var batch []json.RawMessage
	for seq := range uint64(300) {
		batch = append(batch, line(worker1, seq+1, "web"))
	}
	for life := range 3 {
		l := openLedger(t, dir)
		b := newBus(fmt.Sprintf("%016x", life), silent)
		if err := b.recall(t.Context(), l); err != nil {
			t.Fatal(err)
		}
		stop := writing(t, b, l)
		var wg sync.WaitGroup
		for range 3 { // as a worker does whose connection was lost
			var a acked
			wg.Go(func() {
				if err := b.deliver("web", "guard", worker1, batch[:100*(life+1)], a.ack); err != nil {
					t.Error(err)
				}
			})
			wg.Wait()
			a.wait(t, uint64(100*(life+1)))
		}
		stop()
	}
	l := openLedger(t, dir)
	defer l.Close(t.Context())
	var seen []string
	for entry, err := range l.Read(t.Context(), 0, l.Head().Size) {
		if err != nil {
			t.Fatal(err)
		}
		e, err := event.Unmarshal(entry.Data)
		if err != nil {
			t.Fatal(err)
		}
		seen = append(seen, e.ID)
	}
	if len(seen) != 300 || len(slices.Compact(slices.Sorted(slices.Values(seen)))) != 300 {
		t.Errorf("%d entries, %d of them different; want 300", len(seen), len(slices.Compact(slices.Sorted(slices.Values(seen)))))
	}
}

// TestForeignEvents are what a worker that was taken over may send: for another machine, under another's id, nonsense.
func TestForeignEvents(t *testing.T) {
	b := newBus("ffffffffffffffff", silent)
	for name, raw := range map[string]json.RawMessage{
		"another machine": line(worker1, 1, "db"),
		"another source":  line("0000000000000000", 1, "web"),
		"nonsense":        json.RawMessage(`{"id":7}`),
		"no JSON":         json.RawMessage(`}`),
		"the daemon's":    kindOf(event.ResponseDone),
		"a gate's":        kindOf(event.NetFlow),
		"a call":          kindOf(event.AccessCall),
	} {
		if err := b.deliver("web", "guard", worker1, []json.RawMessage{raw}, func(uint64) {}); err == nil {
			t.Errorf("%s is taken", name)
		}
	}
	if !b.settled() {
		t.Error("something of it waits for the ledger")
	}
}

// TestOverflowIsCounted lets more come than can wait: what has no room is told as a number.
func TestOverflowIsCounted(t *testing.T) {
	b := newBus("ffffffffffffffff", silent)
	const over = 7
	for seq := range uint64(shareMax + over) {
		if err := b.deliver("web", "guard", worker1, []json.RawMessage{line(worker1, seq+1, "web")}, func(uint64) {}); err != nil {
			t.Fatal(err)
		}
	}
	b.written(2)
	b.emit("web", event.MachinePaused, event.Fields{"reason": "a test"})
	b.mu.Lock()
	defer b.mu.Unlock()
	e, err := event.Unmarshal(b.pending[len(b.pending)-2].entry)
	if err != nil || e.Kind != event.EventsLost || e.Fields["count"] != int64(over) || e.Fields["source"] != worker1 {
		t.Errorf("%v, %v: want %d lost", e, err, over)
	}
	if len(b.pending) > pendingMax {
		t.Errorf("%d wait", len(b.pending))
	}
}

// TestReaders sees that one who follows and does not read is let go, and holds nobody up.
func TestReaders(t *testing.T) {
	b := newBus("ffffffffffffffff", silent)
	slow, quick := b.follow(), b.follow()
	got := 0
	for range readerMax + 10 {
		b.emit("", event.VigiaStopped, nil)
		<-quick.events
		got++
	}
	n := 0
	for range slow.events {
		n++
	}
	if n != readerMax || got != readerMax+10 {
		t.Errorf("the slow one got %d, the quick one %d", n, got)
	}
	b.unfollow(quick)
	b.unfollow(slow)
}

func batchOf(events ...json.RawMessage) []json.RawMessage { return events }

func kindOf(kind event.Kind) json.RawMessage {
	e := event.Event{ID: event.MakeID(worker1, 1), Machine: "web", Time: time.Now().UTC(), Kind: kind}
	b, err := e.Marshal()
	if err != nil {
		panic(err)
	}
	return b
}
