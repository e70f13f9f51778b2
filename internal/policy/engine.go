package policy

import (
	"path"
	"slices"
	"time"

	"vigia/internal/event"
)

// Bounds of what the engine keeps.
const (
	maxMachines  = 4096 // machines with state; the longest unseen makes room
	maxSequences = 16   // begun and not complete, for each rule and machine
	maxGroups    = 256  // values of count's by, for each count
	maxMarks     = 4096 // events and values remembered by one count, over all groups
	maxEvents    = 64   // ids in a decision
	maxText      = 256  // bytes of a value of by or distinct that are compared
)

// Late is how much older than the newest event of its machine an event may be and still count. Sources deliver each at
// its own pace; what comes later than this is not looked at, and counted in Stats.
const Late = 30 * time.Second

// skew is how much older than the event before it the event of a later step may be: two sources see two things in one
// order and deliver them in the other.
const skew = 2 * time.Second

// Stats count what the engine saw and what it let go. Each stays at zero where nothing is wrong but Events, Alerts and
// Suppressed.
type Stats struct {
	Events     uint64 `json:"events"`
	Alerts     uint64 `json:"alerts"`
	Suppressed uint64 `json:"suppressed"` // rules fulfilled again too soon after an alert
	Late       uint64 `json:"late"`       // events too old to look at
	Dropped    uint64 `json:"dropped"`    // sequences begun that had to make room
	Forgotten  uint64 `json:"forgotten"`  // machines that had to make room
	Groups     uint64 `json:"groups"`     // groups of a count that had to make room
	Errors     uint64 `json:"errors"`     // conditions that could not be evaluated, hence did not hold
}

// Engine runs rules over events. It is not safe for concurrent use.
type Engine struct {
	rules    []Rule
	byKind   map[event.Kind][]int
	machines map[string]*machine
	stats    Stats
}

// machine is what is kept of one machine.
type machine struct {
	newest time.Time // the latest time of its events
	seen   uint64    // the engine's count of events when it was last heard of
	rules  map[int]*progress
}

// progress is how far one rule is on one machine.
type progress struct {
	root  stage       // of the first step
	open  []*sequence // begun sequences, oldest first
	quiet time.Time   // no alert before this
}

// sequence is one that has begun: steps before next are fulfilled.
type sequence struct {
	next   int
	start  time.Time
	last   time.Time
	events []string
	named  map[string]*event.Event
	stage  stage
}

// stage is the progress of one step that needs more than one event.
type stage struct {
	run    *run
	groups map[string]*group
	marks  int
}

// NewEngine makes an engine for rules that Parse made.
func NewEngine(rules []Rule) *Engine {
	e := &Engine{rules: slices.Clone(rules), byKind: map[event.Kind][]int{}, machines: map[string]*machine{}}
	for i := range e.rules {
		for _, k := range e.rules[i].Kinds() {
			e.byKind[k] = append(e.byKind[k], i)
		}
	}
	return e
}

// Stats returns the counts so far.
func (e *Engine) Stats() Stats { return e.stats }

// Rules returns the engine's rules.
func (e *Engine) Rules() []Rule { return slices.Clone(e.rules) }

// Wants reports whether any rule looks at events of the kind.
func (e *Engine) Wants(kind event.Kind) bool { return len(e.byKind[kind]) > 0 }

// Event takes the next event and returns what it decides, in the order of the rules. Events of one time are taken in
// the order they come.
func (e *Engine) Event(ev event.Event) []Decision {
	e.stats.Events++
	if ev.Kind == event.MachineRemoved {
		defer delete(e.machines, ev.Machine)
	}
	wanted := e.byKind[ev.Kind]
	m := e.machines[ev.Machine]
	if m == nil {
		if len(wanted) == 0 {
			return nil
		}
		m = e.admit(ev.Machine)
	}
	m.seen = e.stats.Events
	if ev.Time.After(m.newest) {
		m.newest = ev.Time
	}
	if m.newest.Sub(ev.Time) > Late {
		if len(wanted) > 0 {
			e.stats.Late++
		}
		return nil
	}
	var decisions []Decision
	for _, i := range wanted {
		if r := &e.rules[i]; r.covers(ev.Machine) {
			if d := e.apply(r, m.progress(i), m.newest, &ev); d != nil {
				decisions = append(decisions, *d)
			}
		}
	}
	return decisions
}

// Tick says that time has come to now, where no event did: what can no longer be completed is let go. It decides
// nothing, so that decisions depend on the events alone; it returns a list for the sake of rules about what does not
// happen, which do not exist yet.
func (e *Engine) Tick(now time.Time) []Decision {
	for name, m := range e.machines {
		for i, p := range m.rules {
			p.expire(&e.rules[i], now)
			if p.idle(&e.rules[i], now) {
				delete(m.rules, i)
			}
		}
		if len(m.rules) == 0 && now.Sub(m.newest) > Late {
			delete(e.machines, name)
		}
	}
	return nil
}

// admit makes room for a machine not heard of before.
func (e *Engine) admit(name string) *machine {
	if len(e.machines) >= maxMachines {
		oldest, least := "", ^uint64(0)
		for n, m := range e.machines {
			if m.seen < least {
				oldest, least = n, m.seen
			}
		}
		delete(e.machines, oldest)
		e.stats.Forgotten++
	}
	m := &machine{rules: map[int]*progress{}}
	e.machines[name] = m
	return m
}

func (m *machine) progress(rule int) *progress {
	p := m.rules[rule]
	if p == nil {
		p = &progress{}
		m.rules[rule] = p
	}
	return p
}

func (r *Rule) covers(machine string) bool {
	if len(r.Machines) == 0 {
		return true
	}
	return slices.ContainsFunc(r.Machines, func(pattern string) bool {
		ok, _ := path.Match(pattern, machine)
		return ok
	})
}

// apply takes one event into one rule's progress. An event fulfils at most one step of each sequence that is open,
// oldest first, and then may begin a new one.
func (e *Engine) apply(r *Rule, p *progress, newest time.Time, ev *event.Event) *Decision {
	p.expire(r, newest)
	for _, q := range p.open {
		ids, ok := e.advance(&r.steps[q.next], &q.stage, q, ev)
		if !ok || !q.fits(r, ev) {
			continue
		}
		q.take(r, ids, ev)
		if q.next == len(r.steps) {
			return e.fire(r, p, q, ev)
		}
	}
	ids, ok := e.advance(&r.steps[0], &p.root, nil, ev)
	if !ok {
		return nil
	}
	p.root = stage{}
	q := &sequence{start: ev.Time, last: ev.Time}
	q.take(r, ids, ev)
	if q.next == len(r.steps) {
		return e.fire(r, p, q, ev)
	}
	if len(p.open) >= maxSequences {
		// The newest gives way, not the oldest: a guest that repeats the first step can't push out what it began with.
		p.open = p.open[:maxSequences-1]
		e.stats.Dropped++
	}
	p.open = append(p.open, q)
	return nil
}

// advance looks at one event for one step.
func (e *Engine) advance(s *step, st *stage, q *sequence, ev *event.Event) (ids []string, fulfilled bool) {
	if !slices.Contains(s.kinds, ev.Kind) {
		return nil, false
	}
	if q != nil && ev.Time.Before(q.last.Add(-skew)) {
		return nil, false
	}
	var named map[string]*event.Event
	if q != nil {
		named = q.named
	}
	holds := e.holds(s.when, ev, named)
	switch {
	case s.hold > 0:
		return st.sample(s, ev, holds)
	case !holds:
		return nil, false
	case s.count != nil:
		return e.tally(s.count, st, ev, named)
	}
	return []string{ev.ID}, true
}

func (e *Engine) holds(c *condition, ev *event.Event, named map[string]*event.Event) bool {
	if c == nil {
		return true
	}
	v, err := c.eval(ev, named)
	if err != nil {
		e.stats.Errors++
		return false
	}
	ok, _ := v.Value().(bool)
	return ok
}

// fits reports whether the sequence, with ev in it, keeps to the rule's window.
func (q *sequence) fits(r *Rule, ev *event.Event) bool {
	return r.Within == 0 || ev.Time.Sub(q.start) <= r.Within
}

// take notes that the next step is fulfilled.
func (q *sequence) take(r *Rule, ids []string, ev *event.Event) {
	q.events = append(q.events, ids...)
	if len(q.events) > maxEvents {
		q.events = q.events[:maxEvents]
	}
	if name := r.steps[q.next].name; name != "" {
		if q.named == nil {
			q.named = map[string]*event.Event{}
		}
		kept := *ev
		q.named[name] = &kept
	}
	if ev.Time.After(q.last) {
		q.last = ev.Time
	}
	q.next++
	q.stage = stage{}
}

// fire ends what was begun, and decides unless the rule has just alerted.
func (e *Engine) fire(r *Rule, p *progress, q *sequence, ev *event.Event) *Decision {
	p.open, p.root = nil, stage{}
	if ev.Time.Before(p.quiet) {
		e.stats.Suppressed++
		return nil
	}
	p.quiet = ev.Time.Add(r.Every)
	e.stats.Alerts++
	return &Decision{
		Rule: r.ID, Title: r.Title, Severity: r.Severity, Machine: ev.Machine, Time: ev.Time,
		Events: slices.Clone(q.events), Respond: slices.Clone(r.Respond),
	}
}

// expire lets go of sequences that no event in time can complete any more.
func (p *progress) expire(r *Rule, newest time.Time) {
	p.open = slices.DeleteFunc(p.open, func(q *sequence) bool {
		return r.Within > 0 && newest.Sub(q.start) > r.Within+Late
	})
}

// idle reports whether nothing of the progress can matter after now.
func (p *progress) idle(r *Rule, now time.Time) bool {
	if len(p.open) > 0 || now.Before(p.quiet) {
		return false
	}
	first := &r.steps[0]
	if p.root.run != nil && now.Sub(p.root.run.Last) <= first.gap+Late {
		return false
	}
	for _, g := range p.root.groups {
		if now.Sub(g.latest()) <= first.count.within+Late {
			return false
		}
	}
	return true
}
