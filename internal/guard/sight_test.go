package guard

import (
	"errors"
	"testing"
	"time"

	"vigia/internal/event"
	"vigia/internal/introspect"
)

// TestKernelThatIsGone: a kernel that was seen and is not found any more is told of once, and again if it came back
// meanwhile; never one that has not been seen since the machine's start.
func TestKernelThatIsGone(t *testing.T) {
	var s sight
	at := time.Unix(1e9, 0)
	none := introspect.ErrNotReady
	for _, step := range []struct {
		name        string
		after       time.Duration
		err         error
		reset       bool
		gone, fresh bool
	}{
		{name: "it boots", after: time.Hour, err: none},
		{name: "it boots still", after: time.Hour, err: none},
		{name: "it is seen"},
		{name: "not found once", after: time.Second, err: none},
		{name: "other errors are none", after: time.Minute, err: errors.New("torn")},
		{name: "not found for long", after: time.Second, err: none, gone: true, fresh: true},
		{name: "told once", after: time.Second, err: none, gone: true},
		{name: "seen again", after: time.Second},
		{name: "and not", after: time.Second, err: none},
		{name: "for some seconds", after: goneAfter - time.Second, err: none},
		{name: "for long", after: time.Second, err: none, gone: true, fresh: true},
		{name: "the machine is reset", after: time.Second, err: none, reset: true},
		{name: "it boots again", after: time.Hour, err: none},
	} {
		if at = at.Add(step.after); step.reset {
			s.begin()
		}
		if gone, fresh := s.looked(step.err, at); gone != step.gone || fresh != step.fresh {
			t.Errorf("%s: gone %v, fresh %v", step.name, gone, fresh)
		}
	}
	kind, fields := findingEvent(gone)
	e := event.Event{Time: time.Now(), Kind: kind, Fields: fields}
	if err := e.Check(); err != nil || kind != event.KernelTampered {
		t.Errorf("%v: %v", kind, err)
	}
}

// TestBlindnessIsTold: the guard's own round tells it, by itself and to who asks.
func TestBlindnessIsTold(t *testing.T) {
	var told []string
	c := &checker{attach: func(time.Time) (*introspect.Guest, error) { return nil, introspect.ErrNotReady }, heard: func(error) {},
		emit: func(_ event.Kind, f event.Fields) { told = append(told, f["finding"].(string)) }}
	if _, err := c.round(false); !errors.Is(err, introspect.ErrNotReady) {
		t.Errorf("before it was ever seen: %v", err)
	}
	c.sight.seen, c.sight.lost = true, time.Now().Add(-goneAfter)
	for range 3 {
		r, err := c.round(true)
		if err != nil || len(r.Findings) != 1 || r.Findings[0].Kind != "kernel.gone" {
			t.Errorf("%+v, %v", r, err)
		}
	}
	if len(told) != 1 {
		t.Errorf("told %d times", len(told))
	}
}
