package policy

import (
	"strconv"
	"time"

	"cel.dev/cel-go/common/types/ref"

	"vigia/internal/event"
)

// run is a condition that has held since Since, when last looked at.
type run struct {
	Since time.Time `json:"since"`
	Last  time.Time `json:"last"`
	First string    `json:"first"` // id of the sample it began with
}

// sample takes one sample of a condition that has to hold for a while. It has held from the first of a row of samples,
// all of which fulfil it, none further than the gap from the one before. Between samples nothing is assumed: the sample
// that makes the row long enough is the one that fulfils the step.
func (st *stage) sample(s *step, ev *event.Event, holds bool) ([]string, bool) {
	r := st.run
	if r != nil && ev.Time.Before(r.Last) {
		// One that comes late: it can break the row, not lengthen it.
		if !holds && !ev.Time.Before(r.Since) {
			r.Since = r.Last
		}
		return nil, false
	}
	if !holds {
		st.run = nil
		return nil, false
	}
	if r == nil || ev.Time.Sub(r.Last) > s.gap {
		r = &run{Since: ev.Time, First: ev.ID}
		st.run = r
	}
	r.Last = ev.Time
	if r.Last.Sub(r.Since) < s.hold {
		return nil, false
	}
	if r.First == ev.ID {
		return []string{ev.ID}, true
	}
	return []string{r.First, ev.ID}, true
}

// group is what a count remembers for one value of by.
type group struct {
	Marks []mark `json:"marks"`
	Sum   int    `json:"sum"` // of the weights; not kept where values are counted
}

// mark is one event of a count.
type mark struct {
	Time   time.Time `json:"time"`
	ID     string    `json:"id"`
	Weight int       `json:"weight,omitempty"`
	Value  string    `json:"value,omitempty"`
}

func (g *group) latest() time.Time {
	var t time.Time
	for _, m := range g.Marks {
		if m.Time.After(t) {
			t = m.Time
		}
	}
	return t
}

// tally takes one event into a count.
func (e *Engine) tally(c *count, st *stage, ev *event.Event, named map[string]*event.Event) ([]string, bool) {
	by, value, weight, ok := e.measure(c, ev, named)
	if !ok {
		return nil, false
	}
	g := e.groupFor(c, st, by, ev.Time)
	st.marks -= len(g.Marks)
	g.add(c, mark{Time: ev.Time, ID: ev.ID, Weight: weight, Value: value})
	st.marks += len(g.Marks)
	if c.distinct != nil && len(g.Marks) >= c.atLeast || c.distinct == nil && g.Sum >= c.atLeast {
		return g.ids(), true
	}
	return nil, false
}

// measure evaluates a count's expressions on an event.
func (e *Engine) measure(c *count, ev *event.Event, named map[string]*event.Event) (by, value string, weight int, ok bool) {
	weight = 1
	for _, x := range []struct {
		c    *condition
		take func(v ref.Val)
	}{
		{c.by, func(v ref.Val) { by = scalar(v) }},
		{c.distinct, func(v ref.Val) { value = scalar(v) }},
		{c.weight, func(v ref.Val) {
			n, _ := v.Value().(int64)
			weight = int(min(max(n, 1), maxAtLeast))
		}},
	} {
		if x.c == nil {
			continue
		}
		v, err := x.c.eval(ev, named)
		if err != nil {
			e.stats.Errors++
			return "", "", 0, false
		}
		x.take(v)
	}
	return by, value, weight, true
}

func scalar(v ref.Val) string {
	switch x := v.Value().(type) {
	case string:
		return x[:min(len(x), maxText)]
	case int64:
		return strconv.FormatInt(x, 10)
	}
	return ""
}

// groupFor finds the group of a value, making room by dropping what is out of the window, then the longest unheard of.
func (e *Engine) groupFor(c *count, st *stage, by string, now time.Time) *group {
	if g := st.groups[by]; g != nil {
		return g
	}
	if st.groups == nil {
		st.groups = map[string]*group{}
	}
	for len(st.groups) >= maxGroups || len(st.groups) > 0 && st.marks >= maxMarks {
		oldest, at := "", time.Time{}
		for key, g := range st.groups {
			if t := g.latest(); at.IsZero() || t.Before(at) || t.Equal(at) && key < oldest {
				oldest, at = key, t
			}
		}
		if now.Sub(at) <= c.within {
			e.stats.Groups++
		}
		st.marks -= len(st.groups[oldest].Marks)
		delete(st.groups, oldest)
	}
	g := &group{}
	st.groups[by] = g
	return g
}

// add puts a mark into the group, forgets what is out of the window, and no more than the count needs.
func (g *group) add(c *count, m mark) {
	kept := g.Marks[:0]
	newest := m.Time
	for _, o := range g.Marks {
		if o.Time.After(newest) {
			newest = o.Time
		}
	}
	for _, o := range append(g.Marks, m) {
		if newest.Sub(o.Time) > c.within || c.distinct != nil && o.ID != m.ID && o.Value == m.Value {
			continue
		}
		kept = append(kept, o)
	}
	if len(kept) > c.atLeast {
		kept = append(kept[:0], kept[len(kept)-c.atLeast:]...)
	}
	g.Marks, g.Sum = kept, 0
	for _, o := range kept {
		g.Sum += o.Weight
	}
}

// maxIDs is how many of a count's events a decision names: the latest.
const maxIDs = 16

func (g *group) ids() []string {
	marks := g.Marks[max(0, len(g.Marks)-maxIDs):]
	ids := make([]string, len(marks))
	for i, m := range marks {
		ids[i] = m.ID
	}
	return ids
}
