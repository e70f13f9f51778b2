package event

import (
	"fmt"
	"testing"
	"time"
)

// flooded is a Flood on a clock of its own.
func flooded() (f *Flood, got *[]Event, pass func(time.Duration)) {
	got = new([]Event)
	f = NewFlood("guard", func(e Event) { *got = append(*got, e) })
	now := time.Unix(1000, 0)
	var due func()
	f.now = func() time.Time { return now }
	f.after = func(_ time.Duration, g func()) { due = g }
	pass = func(d time.Duration) {
		for range d / time.Second {
			now = now.Add(time.Second)
			if g := due; g != nil {
				due = nil
				g()
			}
		}
	}
	return f, got, pass
}

func read(path string) (Alike, Event) {
	return Alike{Sort: path, Sum: []string{"bytes", "requests"}}, Event{Kind: DiskRead, Fields: Fields{"path": path, "bytes": int64(4096), "requests": int64(1)}}
}

func TestFloodLetsTheFirstPassAtOnce(t *testing.T) {
	f, got, pass := flooded()
	f.Emit(read("/etc/shadow"))
	f.Emit(read("/etc/passwd"))
	if len(*got) != 2 {
		t.Fatalf("%v", *got)
	}
	pass(time.Hour)
	f.Emit(read("/etc/shadow"))
	if len(*got) != 3 {
		t.Errorf("%v", *got)
	}
}

func TestFloodJoinsWhatRepeatsAndLosesNoCount(t *testing.T) {
	f, got, pass := flooded()
	const seconds, each = 60, 10_000
	for range seconds {
		for range each {
			f.Emit(read("/etc/shadow"))
		}
		pass(time.Second)
	}
	pass(time.Minute)
	var requests, bytes int64
	for _, e := range *got {
		requests += e.Fields["requests"].(int64)
		bytes += e.Fields["bytes"].(int64)
	}
	if requests != seconds*each || bytes != 4096*seconds*each {
		t.Errorf("%d requests and %d bytes are told of, %d were made", requests, bytes, seconds*each)
	}
	if n := len(*got); n > seconds+floodBurst+1 {
		t.Errorf("%d events in %d seconds", n, seconds)
	}
}

func TestFloodOfSortsIsBoundedAndTold(t *testing.T) {
	f, got, pass := flooded()
	const seconds, each = 100, 5000
	for s := range seconds {
		for i := range each {
			f.Emit(read(fmt.Sprintf("/home/u/%d", s*each+i)))
		}
		pass(time.Second)
	}
	pass(time.Minute)
	told, lost := 0, int64(0)
	for _, e := range *got {
		if e.Kind == EventsLost {
			lost += e.Fields["count"].(int64)
		} else {
			told++
		}
	}
	if told+int(lost) != seconds*each {
		t.Errorf("%d told, %d lost, of %d", told, lost, seconds*each)
	}
	if most := floodSorts * (seconds/10 + 1); told > most {
		t.Errorf("%d events, at most %d are fine", told, most)
	}
	if len(f.sorts) != 0 || len(f.held) != 0 || f.armed {
		t.Error("it does not come to rest")
	}
	a, e := read("/etc/shadow")
	for i := range floodSorts + 10 {
		f.Emit(read(fmt.Sprint(i)))
	}
	before := len(*got)
	a.Always = true
	if f.Emit(a, e); len(*got) != before+1 {
		t.Error("a flood of others hides what is always told apart")
	}
}

func TestFloodCountsWhatHasNoCount(t *testing.T) {
	f, got, pass := flooded()
	for range 100 {
		f.Emit(Alike{Sort: "reboot", Sum: []string{"count"}}, Event{Kind: MachineRebooted})
	}
	f.Flush()
	pass(time.Minute)
	last := (*got)[len(*got)-1]
	if len(*got) != floodBurst+1 || last.Fields["count"] != int64(100-floodBurst) {
		t.Errorf("%d events, the last %v", len(*got), last)
	}
	last.Time = time.Unix(1, 0)
	if err := last.Check(); err != nil {
		t.Error(err)
	}
}
