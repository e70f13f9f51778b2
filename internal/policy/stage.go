package policy

import (
	"slices"
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
	Marks []mark `json:"marks"` // by time; of one time, as they came
	Sum   int    `json:"sum"`   // of their weights
}

// mark is one event of a count.
type mark struct {
	Time   time.Time `json:"time"`
	ID     string    `json:"id"`
	Weight int       `json:"weight,omitempty"`
	Value  string    `json:"value,omitempty"`
}

func (g *group) latest() time.Time { return g.Marks[len(g.Marks)-1].Time }

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
	for st.marks > maxMarks && len(st.groups) > 1 {
		e.dropGroup(c, st, by, ev.Time)
	}
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

// groupFor finds the group of a value, making room where there are too many.
func (e *Engine) groupFor(c *count, st *stage, by string, now time.Time) *group {
	if g := st.groups[by]; g != nil {
		return g
	}
	if st.groups == nil {
		st.groups = map[string]*group{}
	}
	for len(st.groups) >= maxGroups {
		e.dropGroup(c, st, by, now)
	}
	g := &group{}
	st.groups[by] = g
	return g
}

// dropGroup lets go of the group that was longest unheard of, and is not the one of keep.
func (e *Engine) dropGroup(c *count, st *stage, keep string, now time.Time) {
	oldest, at := "", time.Time{}
	for key, g := range st.groups {
		if t := g.latest(); key != keep && (at.IsZero() || t.Before(at) || t.Equal(at) && key < oldest) {
			oldest, at = key, t
		}
	}
	if now.Sub(at) <= c.within {
		e.stats.Groups++
	}
	st.marks -= len(st.groups[oldest].Marks)
	delete(st.groups, oldest)
}

// add puts a mark into the group and forgets what is out of the window, and what the count needs no more. Of marks of
// one value, where values are counted, it keeps the latest.
func (g *group) add(c *count, m mark) {
	if c.distinct != nil {
		if i := slices.IndexFunc(g.Marks, func(o mark) bool { return o.Value == m.Value }); i >= 0 {
			if g.Marks[i].Time.After(m.Time) {
				return
			}
			g.Sum -= g.Marks[i].Weight
			g.Marks = slices.Delete(g.Marks, i, i+1)
		}
	}
	at := len(g.Marks)
	for at > 0 && g.Marks[at-1].Time.After(m.Time) {
		at--
	}
	g.Marks = slices.Insert(g.Marks, at, m)
	g.Sum += m.Weight
	drop := 0
	for len(g.Marks)-drop > c.atLeast || g.latest().Sub(g.Marks[drop].Time) > c.within {
		g.Sum -= g.Marks[drop].Weight
		drop++
	}
	g.Marks = slices.Delete(g.Marks, 0, drop)
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
