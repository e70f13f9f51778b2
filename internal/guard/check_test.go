package guard

import (
	"testing"
	"time"

	"vigia/internal/event"
	"vigia/internal/introspect"
)

// TestFindingsAreEvents: what any finding becomes keeps to its kind's table, and says what was found.
func TestFindingsAreEvents(t *testing.T) {
	p := &introspect.Process{PID: 812, PPID: 1, UID: 1000, Comm: "x", Exe: "/tmp/x (deleted)", Cmdline: "x"}
	for want, f := range map[event.Kind]introspect.Finding{
		event.ProcessHidden:  {Kind: introspect.KindProcessHidden, Subject: "x (812)", Process: p, Listed: []string{"pid table"}, Missing: []string{"task list"}},
		event.ModuleHidden:   {Kind: introspect.KindModuleHidden, Subject: "evil", Listed: []string{"sysfs"}, Missing: []string{"module list"}},
		event.KernelTampered: {Kind: introspect.KindCredRaised, Subject: "x (812)", Process: p},
	} {
		f.Detail, f.Severity = "a sentence", introspect.Critical
		kind, fields := findingEvent(f)
		e := event.Event{Time: time.Now(), Kind: kind, Fields: fields}
		if err := e.Check(); err != nil || kind != want || fields["finding"] != f.Kind || fields["subject"] != f.Subject || fields["severity"] != "critical" {
			t.Errorf("%s: %v %v: %v", want, kind, fields, err)
		}
		if kind == event.ModuleHidden && fields["name"] != "evil" || f.Process != nil && fields["pid"] != int64(812) {
			t.Errorf("%s: %v", kind, fields)
		}
	}
}
