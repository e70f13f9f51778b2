package daemon

import (
	"encoding/json"
	"testing"

	"vigia/internal/event"
	"vigia/internal/link"
)

// FuzzDeliver gives the daemon a worker's batch: what is taken is of that worker and its machine, and of a kind that it may
// tell of.
func FuzzDeliver(f *testing.F) {
	for _, raw := range []json.RawMessage{line(worker1, 1, "web"), kindOf(event.NetFlow), kindOf(event.ResponseDone), line(worker1, 1<<63, "db"), json.RawMessage(`{"id":7}`)} {
		body, err := json.Marshal(link.Events{Events: []json.RawMessage{raw, line(worker1, 2, "web")}})
		if err != nil {
			f.Fatal(err)
		}
		f.Add("guard", []byte(body))
		f.Add("gate", []byte(body))
	}
	f.Fuzz(func(t *testing.T, worker string, body []byte) {
		var e link.Events
		r := link.Request{Method: link.CallEvents, Body: body}
		if r.Decode(&e) != nil {
			return
		}
		b := newBus("ffffffffffffffff", silent)
		b.budgets.day = 1 << 20
		b.deliver("web", worker, worker1, e.Events, func(uint64) {})
		for _, p := range b.pending {
			got, err := event.Unmarshal(p.entry)
			if err != nil {
				t.Fatalf("it took what it can't read: %v", err)
			}
			source, _, _ := event.SplitID(got.ID)
			if source != worker1 || got.Machine != "web" || !saysOf(worker, got.Kind) {
				t.Fatalf("it took %v", got)
			}
		}
	})
}
