package policy

import (
	"encoding/json"
	"errors"
	"fmt"
	"time"

	"vigia/internal/event"
)

// ErrSnapshot is returned by Restore for what Snapshot did not write.
var ErrSnapshot = errors.New("not a policy snapshot")

// snapshotVersion is that of the snapshot's form.
const snapshotVersion = 1

type engineState struct {
	Version  int                      `json:"version"`
	Stats    Stats                    `json:"stats"`
	Machines map[string]*machineState `json:"machines"`
}

type machineState struct {
	Newest time.Time                 `json:"newest"`
	Seen   uint64                    `json:"seen"`
	Rules  map[string]*progressState `json:"rules"` // by id
}

type progressState struct {
	Print string           `json:"print"` // of the rule's text
	Root  stageState       `json:"root"`
	Open  []*sequenceState `json:"open,omitempty"`
	Quiet time.Time        `json:"quiet"`
}

type sequenceState struct {
	Next   int                        `json:"next"`
	Start  time.Time                  `json:"start"`
	Last   time.Time                  `json:"last"`
	Events []string                   `json:"events"`
	Named  map[string]json.RawMessage `json:"named,omitempty"`
	Stage  stageState                 `json:"stage"`
}

type stageState struct {
	Run    *run              `json:"run,omitempty"`
	Groups map[string]*group `json:"groups,omitempty"`
}

// Snapshot writes down what has begun, as JSON, so that a daemon started anew goes on where the last one ended.
func (e *Engine) Snapshot() ([]byte, error) {
	s := engineState{Version: snapshotVersion, Stats: e.stats, Machines: map[string]*machineState{}}
	for name, m := range e.machines {
		ms := &machineState{Newest: m.newest, Seen: m.seen, Rules: map[string]*progressState{}}
		for i, p := range m.rules {
			ps, err := p.state(e.rules[i].print)
			if err != nil {
				return nil, fmt.Errorf("snapshot of %s: %w", e.rules[i].ID, err)
			}
			ms.Rules[e.rules[i].ID] = ps
		}
		s.Machines[name] = ms
	}
	return json.Marshal(s)
}

// Restore takes up a snapshot. What belongs to a rule that is gone or has another text now is left out. After an error
// the engine is as it was.
func (e *Engine) Restore(data []byte) error {
	var s engineState
	if err := json.Unmarshal(data, &s); err != nil {
		return fmt.Errorf("%w: %v", ErrSnapshot, err)
	}
	if s.Version != snapshotVersion {
		return fmt.Errorf("%w: version %d, this vigia knows %d", ErrSnapshot, s.Version, snapshotVersion)
	}
	if len(s.Machines) > maxMachines {
		return fmt.Errorf("%w: %d machines", ErrSnapshot, len(s.Machines))
	}
	byID := map[string]int{}
	for i, r := range e.rules {
		byID[r.ID] = i
	}
	machines := map[string]*machine{}
	for name, ms := range s.Machines {
		if ms == nil {
			return fmt.Errorf("%w: machine %q is empty", ErrSnapshot, name)
		}
		m := &machine{newest: ms.Newest, seen: ms.Seen, rules: map[int]*progress{}}
		for id, ps := range ms.Rules {
			i, ok := byID[id]
			if !ok || ps == nil || ps.Print != e.rules[i].print {
				continue
			}
			p, err := ps.progress(&e.rules[i])
			if err != nil {
				return fmt.Errorf("%w: %s on %s: %v", ErrSnapshot, id, name, err)
			}
			m.rules[i] = p
		}
		machines[name] = m
	}
	e.machines, e.stats = machines, s.Stats
	return nil
}

func (p *progress) state(print string) (*progressState, error) {
	ps := &progressState{Print: print, Root: p.root.state(), Quiet: p.quiet}
	for _, q := range p.open {
		qs := &sequenceState{Next: q.next, Start: q.start, Last: q.last, Events: q.events, Stage: q.stage.state()}
		for name, ev := range q.named {
			b, err := json.Marshal(ev)
			if err != nil {
				return nil, err
			}
			if qs.Named == nil {
				qs.Named = map[string]json.RawMessage{}
			}
			qs.Named[name] = b
		}
		ps.Open = append(ps.Open, qs)
	}
	return ps, nil
}

func (ps *progressState) progress(r *Rule) (*progress, error) {
	root, err := ps.Root.stage(&r.steps[0])
	if err != nil {
		return nil, err
	}
	p := &progress{root: root, quiet: ps.Quiet}
	if len(ps.Open) > maxSequences {
		return nil, fmt.Errorf("%d sequences", len(ps.Open))
	}
	for _, qs := range ps.Open {
		if qs == nil || qs.Next < 1 || qs.Next >= len(r.steps) || len(qs.Events) > maxEvents {
			return nil, errors.New("a sequence that can't be")
		}
		q := &sequence{next: qs.Next, start: qs.Start, last: qs.Last, events: qs.Events}
		if q.stage, err = qs.Stage.stage(&r.steps[qs.Next]); err != nil {
			return nil, err
		}
		if q.named, err = qs.named(r); err != nil {
			return nil, err
		}
		p.open = append(p.open, q)
	}
	return p, nil
}

// named reads the events of the steps that later ones may speak of; each such step must have its own.
func (qs *sequenceState) named(r *Rule) (map[string]*event.Event, error) {
	var named map[string]*event.Event
	for _, s := range r.steps[:qs.Next] {
		if s.name == "" {
			continue
		}
		ev, err := event.Unmarshal(qs.Named[s.name])
		if err != nil {
			return nil, fmt.Errorf("step %s: %w", s.name, err)
		}
		if named == nil {
			named = map[string]*event.Event{}
		}
		named[s.name] = &ev
	}
	return named, nil
}

func (st *stage) state() stageState { return stageState{Run: st.run, Groups: st.groups} }

func (ss *stageState) stage(s *step) (stage, error) {
	st := stage{run: ss.Run, groups: ss.Groups}
	if st.run != nil && s.hold == 0 || len(st.groups) > 0 && s.count == nil || len(st.groups) > maxGroups {
		return stage{}, errors.New("progress that its step has not")
	}
	for _, g := range st.groups {
		if g == nil || len(g.Marks) == 0 || len(g.Marks) > maxAtLeast {
			return stage{}, errors.New("a count that can't be")
		}
		st.marks += len(g.Marks)
	}
	if st.marks > maxMarks+1 {
		return stage{}, errors.New("a count too large")
	}
	return st, nil
}
