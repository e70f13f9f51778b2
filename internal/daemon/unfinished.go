package daemon

import (
	"slices"
	"time"

	"vigia/internal/event"
	"vigia/internal/policy"
)

// untoldFor is how old what the last daemon left undone may be to be done still: whoever looks at a machine later than
// that has seen the alert, or the lack of it.
const untoldFor = 10 * time.Minute

// unfinished is what a daemon had decided and did not live to carry out, as the ledger shows it: a rule was fulfilled and
// there is no alert; there is an alert, and a response that it asks for was neither done nor failed. Carrying a
// response out twice does no harm, so what may have been done is done again.
type unfinished struct {
	decided []policy.Decision // not told yet
	alerted []policy.Decision // told; Respond is what is left of it
}

// follow takes out what an event of the ledger shows to have come to its end.
func (u *unfinished) follow(e event.Event) {
	rule, _ := e.Fields["rule"].(string)
	switch e.Kind {
	case event.PolicyAlert:
		u.decided = slices.DeleteFunc(u.decided, func(d policy.Decision) bool { return d.Machine == e.Machine && d.Rule == rule })
		if respond, _ := e.Fields["respond"].([]string); len(respond) > 0 {
			title, _ := e.Fields["title"].(string)
			severity, _ := e.Fields["severity"].(string)
			events, _ := e.Fields["events"].([]string)
			u.alerted = append(u.alerted, policy.Decision{Rule: rule, Title: title, Severity: policy.Severity(severity),
				Machine: e.Machine, Time: e.Time, Events: events, Respond: slices.Clone(respond)})
		}
	case event.ResponseDone, event.ResponseFailed:
		response, _ := e.Fields["response"].(string)
		u.ended(e.Machine, rule, response)
	case event.MachineRemoved:
		gone := func(d policy.Decision) bool { return d.Machine == e.Machine }
		u.decided, u.alerted = slices.DeleteFunc(u.decided, gone), slices.DeleteFunc(u.alerted, gone)
	}
}

// ended takes a response from the oldest alert that waits for it.
func (u *unfinished) ended(machine, rule, response string) {
	for i := range u.alerted {
		d := &u.alerted[i]
		at := slices.Index(d.Respond, response)
		if d.Machine != machine || d.Rule != rule || at < 0 {
			continue
		}
		d.Respond = slices.Delete(d.Respond, at, at+1)
		if len(d.Respond) == 0 {
			u.alerted = slices.Delete(u.alerted, i, i+1)
		}
		return
	}
}

// finish goes on with what the last daemon left undone; what is too old is told to have failed.
func (d *Daemon) finish(u unfinished, now time.Time) {
	for _, p := range u.decided {
		if now.Sub(p.Time) <= untoldFor {
			d.decided(p)
		}
	}
	for _, p := range u.alerted {
		d.spawn(func() {
			if now.Sub(p.Time) > untoldFor {
				d.tooLate(p)
				return
			}
			d.log.Warn("responses of the last daemon are carried out", "rule", p.Rule, "machine", p.Machine, "respond", p.Respond)
			d.carryOutAll(d.ctx, p)
		})
	}
}

func (d *Daemon) tooLate(p policy.Decision) {
	for _, r := range p.Respond {
		d.bus.emit(p.Machine, event.ResponseFailed, event.Fields{"response": r, "rule": p.Rule,
			"reason": "the daemon ended before it was carried out, and the next one came too late: see to the machine yourself"})
	}
}
