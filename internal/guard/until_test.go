package guard

import (
	"encoding/json"
	"testing"

	"vigia/internal/event"
	"vigia/internal/link"
)

func TestUntil(t *testing.T) {
	var u until
	shell := event.Fields{"exe": "/usr/bin/dash", "pid": int64(7), "uid": int64(0)}
	if u.held(event.ProcessStarted, shell) {
		t.Error("it stops though nobody asked")
	}
	for _, c := range []struct {
		kind   event.Kind
		fields map[string]string
		stops  bool
	}{
		{event.ProcessStarted, nil, true},
		{event.ProcessForked, nil, false},
		{event.ProcessStarted, map[string]string{"exe": "/usr/bin/dash"}, true},
		{event.ProcessStarted, map[string]string{"exe": "/usr/bin/das"}, false},
		{event.ProcessStarted, map[string]string{"exe": "*dash"}, true},
		{event.ProcessStarted, map[string]string{"exe": "/usr*"}, true},
		{event.ProcessStarted, map[string]string{"exe": "*bin*"}, true},
		{event.ProcessStarted, map[string]string{"exe": "*sbin*"}, false},
		{event.ProcessStarted, map[string]string{"pid": "7", "uid": "0"}, true},
		{event.ProcessStarted, map[string]string{"pid": "7", "uid": "1"}, false},
		{event.ProcessStarted, map[string]string{"cmdline": "*"}, false}, // it has none
	} {
		u.set(&link.Until{Kind: string(c.kind), Fields: c.fields})
		if got := u.held(event.ProcessStarted, shell); got != c.stops {
			t.Errorf("%s %v: stops: %v", c.kind, c.fields, got)
		}
		if u.held(event.ProcessStarted, shell) {
			t.Errorf("%s %v: stops twice", c.kind, c.fields)
		}
	}
	u.set(&link.Until{Kind: string(event.ProcessStarted)})
	u.is(event.ProcessStarted, shell, false)
	var fields event.Fields
	if err := json.Unmarshal(u.hit.Fields, &fields); err != nil || u.hit.Exact || fields["exe"] != "/usr/bin/dash" {
		t.Errorf("%+v %v %v", u.hit, fields, err)
	}
}
