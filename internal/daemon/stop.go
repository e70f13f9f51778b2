package daemon

import (
	"context"
	"encoding/json"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"google.golang.org/protobuf/types/known/timestamppb"

	"vigia/internal/api/vigiav1"
	"vigia/internal/event"
	"vigia/internal/link"
	"vigia/internal/vm"
)

// A replay stops by itself where it was told to: the guard sees to it (guard/until.go), so that it does also while there is no daemon.

// stopped is where a replay has stopped by itself.
type stopped struct {
	Instruction int64     `json:"instruction"`
	Exact       bool      `json:"exact"`           // there, and not merely as soon as the event was known
	Event       string    `json:"event,omitempty"` // what it stopped for, in a line
	Recorded    time.Time `json:"recorded"`        // when that was, by the host's clock; zero: not known
}

// resolve says where in a recording a moment is. id is of a machine that has the recording's times.
func (d *Daemon) resolve(id vm.ID, r recording, at vm.Moment) (link.Until, error) {
	switch {
	case at.Instruction != 0:
		return link.Until{Instruction: at.Instruction}, nil
	case at.Kind != "":
		return link.Until{Kind: at.Kind, Fields: at.Fields}, checkEvent(at)
	}
	times, err := readTimes(d.files.recordingTimes(id))
	if err != nil {
		return link.Until{}, fmt.Errorf("%s: when what was executed is not known of this recording: %w", at, err)
	}
	when := at.Time
	if at.After != 0 {
		when = times[0].at.Add(at.After)
	}
	n, ok := times.instruction(when)
	if !ok {
		return link.Until{}, fmt.Errorf("%w: %s: it was recorded from %s to %s", vm.ErrInvalid, at, times[0].at.Format(time.RFC3339), times[len(times)-1].at.Format(time.RFC3339))
	}
	return link.Until{Instruction: max(n, 1)}, nil
}

// checkEvent refuses what no event is.
func checkEvent(at vm.Moment) error {
	schema, ok := event.Kinds[event.Kind(at.Kind)]
	if !ok {
		return fmt.Errorf("%w: there are no events of kind %q: vigia events --kind lists some, doc/events.md all", vm.ErrInvalid, at.Kind)
	}
	if !saysOf("guard", event.Kind(at.Kind)) {
		return fmt.Errorf("%w: a replay can't stop at %s: use what is seen of the guest itself", vm.ErrInvalid, at.Kind)
	}
	for name := range at.Fields {
		if !slices.ContainsFunc(schema.Fields, func(f event.Field) bool { return f.Name == name }) {
			return fmt.Errorf("%w: %s has no field %q", vm.ErrInvalid, at.Kind, name)
		}
	}
	return nil
}

// awaitStop waits until a replay has stopped where it was to.
func (d *Daemon) awaitStop(m *machine, r *run) {
	if rec := m.record(); rec.Replays == nil || rec.Replays.Until == nil {
		return
	}
	d.spawn(func() {
		for m.record().Replays.Until != nil {
			var at link.Reached
			if _, err := m.callGuard(d.ctx, link.CallReached, nil, &at); err == nil {
				m.hasStopped(at)
				return
			}
			if waitFor(d.ctx, r.ended, time.Second) || d.ctx.Err() != nil { // a new guard was told too
				return
			}
		}
	})
}

// hasStopped notes where, once.
func (m *machine) hasStopped(at link.Reached) {
	s := stopped{Instruction: at.Instruction, Exact: at.Exact, Event: inWords(at)}
	if times, err := readTimes(m.d.files.recordingTimes(m.id())); err == nil {
		s.Recorded = times.when(at.Instruction)
	}
	first := false
	err := m.change(context.WithoutCancel(m.d.ctx), func(r *record) {
		if r.Replays == nil || r.Replays.Until == nil || r.Run == nil {
			return
		}
		again := *r.Replays
		again.Until, again.At, r.Paused, first = nil, &s, true, true
		r.Replays = &again
	})
	if err != nil || !first {
		return
	}
	fields := event.Fields{"of": m.record().Replays.Name, "instruction": s.Instruction, "exact": s.Exact}
	if s.Event != "" {
		fields["event"] = s.Event
	}
	if !s.Recorded.IsZero() {
		fields["recorded"] = s.Recorded.UTC().Format(time.RFC3339Nano)
	}
	m.d.bus.emit(m.name(), event.ReplayStopped, fields)
}

// inWords is an event in a line. It comes from the guard, which may be the guest's.
func inWords(at link.Reached) string {
	if at.Kind == "" {
		return ""
	}
	var fields map[string]any
	if json.Unmarshal(at.Fields, &fields) != nil {
		return event.Text([]byte(at.Kind))
	}
	words := []string{at.Kind}
	for _, name := range slices.Sorted(maps.Keys(fields)) {
		words = append(words, fmt.Sprintf("%s=%v", name, fields[name]))
	}
	return event.Text([]byte(strings.Join(words, " ")))
}

// text says in a line how far a replay is.
func (r *replaying) text() string {
	s := "replays the last run of " + r.Name
	switch {
	case r.Until != nil:
		s += ", until " + event.Text([]byte(r.Until.String()))
	case r.At != nil:
		s += fmt.Sprintf(", stopped at instruction %d", r.At.Instruction)
		if r.At.Event != "" {
			s += ": " + r.At.Event
		}
	}
	return s
}

func (r *replaying) show(debugger string) *vigiav1.Replay {
	if r == nil {
		return nil
	}
	out := &vigiav1.Replay{Of: r.Name, Gdb: debugger}
	if r.Until != nil {
		out.Until = r.Until.String()
	}
	if at := r.At; at != nil {
		out.Instruction, out.Event, out.Exact = at.Instruction, at.Event, at.Exact
		if !at.Recorded.IsZero() {
			out.Recorded = timestamppb.New(at.Recorded)
		}
	}
	return out
}
