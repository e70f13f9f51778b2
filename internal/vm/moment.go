package vm

import (
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"
	"time"
)

// Moment is a place in a recording. One of its parts says which.
type Moment struct {
	Instruction int64             `json:"instruction,omitempty"` // after so many instructions
	Time        time.Time         `json:"time,omitzero"`         // when the host's clock said so, while it was recorded
	After       time.Duration     `json:"after,omitempty"`       // so long after the recorded run's begin, by the host's clock
	Kind        string            `json:"kind,omitempty"`        // at the first event of that kind
	Fields      map[string]string `json:"fields,omitempty"`      // with these fields; a value may begin and end with *
}

// mostWords bounds a moment's text, in bytes.
const mostWords = 4096

// ParseMoment reads a moment: 123456789, +90s, 2026-11-22T10:00:00Z, or KIND[,FIELD=VALUE]….
func ParseMoment(s string) (Moment, error) {
	if s == "" || len(s) > mostWords {
		return Moment{}, fmt.Errorf("%w: a moment of %d bytes: use a number of instructions, +90s, a time, or the kind of an event", ErrInvalid, len(s))
	}
	if n, err := strconv.ParseInt(strings.ReplaceAll(s, "_", ""), 10, 64); err == nil && s[0] >= '0' && s[0] <= '9' {
		if n == 0 {
			return Moment{}, fmt.Errorf("%w: instruction 0: a machine has no earlier one than its first", ErrInvalid)
		}
		return Moment{Instruction: n}, nil
	}
	if rest, ok := strings.CutPrefix(s, "+"); ok {
		d, err := time.ParseDuration(rest)
		if err != nil || d <= 0 {
			return Moment{}, fmt.Errorf("%w: moment %q: use a time after the begin as in +90s or +1h5m", ErrInvalid, s)
		}
		return Moment{After: d}, nil
	}
	if s[0] >= '0' && s[0] <= '9' {
		t, err := time.Parse(time.RFC3339, s)
		if err != nil {
			return Moment{}, fmt.Errorf("%w: moment %q: use a number of instructions, or a time as in 2026-11-22T10:00:00Z", ErrInvalid, s)
		}
		return Moment{Time: t.UTC()}, nil
	}
	return parseEvent(s)
}

func parseEvent(s string) (Moment, error) {
	words := strings.Split(s, ",")
	m := Moment{Kind: words[0]}
	for _, w := range words[1:] {
		name, value, ok := strings.Cut(w, "=")
		if !ok || name == "" {
			return Moment{}, fmt.Errorf("%w: %q of moment %q: use FIELD=VALUE", ErrInvalid, w, s)
		}
		if m.Fields == nil {
			m.Fields = map[string]string{}
		}
		m.Fields[name] = value
	}
	return m, nil
}

// String is what ParseMoment reads.
func (m Moment) String() string {
	switch {
	case m.Instruction != 0:
		return strconv.FormatInt(m.Instruction, 10)
	case m.After != 0:
		return "+" + m.After.String()
	case !m.Time.IsZero():
		return m.Time.Format(time.RFC3339Nano)
	}
	s := m.Kind
	for _, name := range slices.Sorted(maps.Keys(m.Fields)) {
		s += "," + name + "=" + m.Fields[name]
	}
	return s
}
