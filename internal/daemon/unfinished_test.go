package daemon

import (
	"fmt"
	"testing"
	"time"

	"vigia/internal/event"
	"vigia/internal/policy"
)

// TestWhatADaemonLeavesUndone gives ledgers that end at each instant between an alert and its last response.
func TestWhatADaemonLeavesUndone(t *testing.T) {
	alert := func(machine string) event.Event {
		return event.Event{Machine: machine, Time: time.Unix(1000, 0), Kind: event.PolicyAlert, Fields: event.Fields{"rule": "r", "severity": "high", "respond": []string{"quarantine", "pause"}}}
	}
	ended := func(kind event.Kind, machine, response string) event.Event {
		return event.Event{Machine: machine, Kind: kind, Fields: event.Fields{"rule": "r", "response": response}}
	}
	all := []event.Event{alert("web"), ended(event.ResponseDone, "web", "quarantine"), alert("db"), ended(event.ResponseFailed, "web", "pause"),
		alert("db"), ended(event.ResponseDone, "db", "pause"), ended(event.ResponseDone, "db", "quarantine"), ended(event.ResponseDone, "db", "pause"),
		ended(event.ResponseDone, "db", "quarantine"), alert("web"), {Machine: "web", Kind: event.MachineRemoved}}
	want := []string{"", "web[quarantine pause]", "web[pause]", "web[pause]db[quarantine pause]", "db[quarantine pause]", "db[quarantine pause]db[quarantine pause]",
		"db[quarantine]db[quarantine pause]", "db[quarantine pause]", "db[quarantine]", "", "web[quarantine pause]", ""}
	for n := range want {
		u := unfinished{decided: []policy.Decision{{Machine: "web", Rule: "r"}}}
		for _, e := range all[:n] {
			u.follow(e)
		}
		got := ""
		for _, d := range u.alerted {
			got += fmt.Sprint(d.Machine, d.Respond)
		}
		if got != want[n] {
			t.Errorf("after %d events: %q, want %q", n, got, want[n])
		}
		if (len(u.decided) > 0) != (n == 0) {
			t.Errorf("after %d events: untold %v", n, u.decided)
		}
	}
}
