package guard

import (
	"fmt"
	"os"
	"path/filepath"
	"testing"
	"time"

	"vigia/internal/event"
)

func TestLoadIsTakenFromTheThreadsAndTheirWait(t *testing.T) {
	stat := filepath.Join(t.TempDir(), "schedstat")
	write := func(s string) {
		if err := os.WriteFile(stat, []byte(s), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	write("1000000000 0 7\n")
	f, err := os.Open(stat)
	if err != nil {
		t.Fatal(err)
	}
	var got []event.Fields
	s := &sampler{cpus: 1, emit: func(k event.Kind, f event.Fields) { got = append(got, f) },
		process: func(time.Duration) (busiest, bool) { return busiest{pid: 7, comm: "john", percent: 97}, true }}
	s.clock.set([]*os.File{f})
	defer s.clock.set(nil)

	t0 := time.Unix(1000, 0)
	s.sample(t0) // only a beginning
	if len(got) != 0 {
		t.Fatal("an event from one reading")
	}
	write("1500000000 450000000 9\n") // ran half the second, waited for the host almost all the rest
	s.sample(t0.Add(time.Second))
	if len(got) != 1 || got[0]["percent"] != 95.0 || got[0]["process"] != "john" || got[0]["pid"] != int64(7) {
		t.Fatalf("busy guest on a busy host: %v", got)
	}
	e := event.Event{Kind: event.CPUUsage, Time: t0, Fields: got[0]}
	if err := e.Check(); err != nil {
		t.Error(err)
	}
	write("2450000000 450000000 9\n")
	s.sample(t0.Add(2 * time.Second))
	if len(got) != 1 {
		t.Error("an event each second: nothing changed")
	}
	for i := 3; i <= 7; i++ {
		write(fmt.Sprintf("%d000000 450000000 9\n", 1500+950*(i-1)))
		s.sample(t0.Add(time.Duration(i) * time.Second))
	}
	if len(got) != 2 {
		t.Errorf("%d events in seven busy seconds, want one each five", len(got))
	}
	s.sample(t0.Add(8 * time.Second)) // the clock stands: idle
	if len(got) != 3 || got[2]["percent"] != 0.0 || got[2]["process"] != nil {
		t.Errorf("the fall to idle: %v", got)
	}
}

// TestUsed: the clock of a guest that has not run stands, though it waited; where nobody can read it nothing is known.
func TestUsed(t *testing.T) {
	var c vcpuClock
	used := c.used()
	if _, known := used(); known {
		t.Error("known without a clock")
	}
	f := filepath.Join(t.TempDir(), "schedstat")
	file, err := os.Create(f)
	if err != nil {
		t.Fatal(err)
	}
	c.set([]*os.File{file})
	defer c.set(nil)
	for _, step := range []struct {
		text string
		used time.Duration
	}{{"100 20 3\n", 100}, {"100 20 3\n", 0}, {"100 29 3\n", 0}, {"130 29 4\n", 30}} {
		if err := os.WriteFile(f, []byte(step.text), 0o600); err != nil {
			t.Fatal(err)
		}
		if got, known := used(); got != step.used || !known {
			t.Errorf("%q: %v %v, want %v", step.text, got, known, step.used)
		}
	}
}
