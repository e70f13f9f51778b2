// Package event is the vocabulary of what happened.
//
// An Event is a fact about one machine, or about vigia itself: typed, small and bounded. Its Kind decides which
// fields it may carry; the table in kinds.go names each field, its type and its meaning, and is what the policy
// checks conditions against and what doc/events.md is made from.
//
//	{"id":"6f0c2d1e-00000000000000a7","machine":"web","time":"2026-01-02T03:04:05.678Z",
//	 "kind":"disk.read","fields":{"path":"/etc/shadow","bytes":4096}}
//
// Text from a guest is hostile: it is cut to MaxText bytes, and bytes that are not UTF-8 or not printable are
// escaped, before it becomes a field.
package event

import (
	"encoding/json"
	"errors"
	"fmt"
	"strconv"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"
)

// Limits of an event: the encoded whole, and one text field, in bytes.
const (
	MaxEvent = 16 << 10
	MaxText  = 1 << 10
)

// ErrTooLarge and ErrMalformed are returned by Unmarshal and Check.
var (
	ErrTooLarge  = errors.New("event too large")
	ErrMalformed = errors.New("malformed event")
)

// Fields are an event's own values: string, bool, int64, float64 or []string, as kinds.go says.
type Fields map[string]any

// Event is one fact. ID is "<source>-<sequence>": source names one life of one process, sequence counts its events
// from 1 in 16 hexadecimal digits, so that an event delivered twice is known by its ID.
type Event struct {
	ID      string    `json:"id"`
	Machine string    `json:"machine,omitempty"`
	Time    time.Time `json:"time"` // the host's clock
	Kind    Kind      `json:"kind"`
	Fields  Fields    `json:"fields,omitempty"`
}

// MakeID joins a source and a sequence number.
func MakeID(source string, seq uint64) string { return fmt.Sprintf("%s-%016x", source, seq) }

// SplitID takes an ID apart; ok is false where it has not MakeID's form.
func SplitID(id string) (source string, seq uint64, ok bool) {
	i := strings.LastIndexByte(id, '-')
	if i <= 0 || len(id)-i-1 != 16 {
		return "", 0, false
	}
	seq, err := strconv.ParseUint(id[i+1:], 16, 64)
	return id[:i], seq, err == nil
}

// Marshal encodes the event as one line of JSON without a newline. It fails where Check does.
func (e *Event) Marshal() ([]byte, error) {
	if err := e.Check(); err != nil {
		return nil, err
	}
	b, err := json.Marshal(e)
	if err != nil {
		return nil, fmt.Errorf("%w: %v", ErrMalformed, err)
	}
	if len(b) > MaxEvent {
		return nil, fmt.Errorf("%w: %s: %d bytes", ErrTooLarge, e.Kind, len(b))
	}
	return b, nil
}

// Unmarshal decodes and checks what Marshal wrote. Numbers come back as int64 or float64 as the kind says.
func Unmarshal(b []byte) (Event, error) {
	var e Event
	if len(b) > MaxEvent {
		return e, ErrTooLarge
	}
	if err := json.Unmarshal(b, &e); err != nil {
		return Event{}, fmt.Errorf("%w: %v", ErrMalformed, err)
	}
	if err := e.normalize(); err != nil {
		return Event{}, err
	}
	if err := e.Check(); err != nil {
		return Event{}, err
	}
	return e, nil
}

// normalize gives fields that JSON made float64 or []any the types of the kind's table.
func (e *Event) normalize() error {
	schema, ok := Kinds[e.Kind]
	if !ok {
		return fmt.Errorf("%w: unknown kind %q", ErrMalformed, e.Kind)
	}
	for name, v := range e.Fields {
		f, ok := schema.Field(name)
		if !ok {
			return fmt.Errorf("%w: %s has no field %q", ErrMalformed, e.Kind, name)
		}
		switch x := v.(type) {
		case float64:
			if f.Type == Int {
				if x != float64(int64(x)) {
					return fmt.Errorf("%w: %s.%s: %v is not a whole number", ErrMalformed, e.Kind, name, x)
				}
				e.Fields[name] = int64(x)
			}
		case []any:
			list := make([]string, 0, len(x))
			for _, item := range x {
				s, ok := item.(string)
				if !ok {
					return fmt.Errorf("%w: %s.%s: not a list of text", ErrMalformed, e.Kind, name)
				}
				list = append(list, s)
			}
			e.Fields[name] = list
		}
	}
	return nil
}

// Check reports whether the event keeps to its kind's table and to the limits.
func (e *Event) Check() error {
	schema, ok := Kinds[e.Kind]
	if !ok {
		return fmt.Errorf("%w: unknown kind %q", ErrMalformed, e.Kind)
	}
	if e.Time.IsZero() {
		return fmt.Errorf("%w: %s: no time", ErrMalformed, e.Kind)
	}
	for name, v := range e.Fields {
		f, ok := schema.Field(name)
		if !ok {
			return fmt.Errorf("%w: %s has no field %q", ErrMalformed, e.Kind, name)
		}
		if !f.Type.holds(v) {
			return fmt.Errorf("%w: %s.%s: %T where %s is wanted", ErrMalformed, e.Kind, name, v, f.Type)
		}
	}
	return nil
}

// Text makes guest-supplied bytes fit for a field: at most MaxText bytes (a cut one ends in "…"), valid UTF-8,
// no control characters.
func Text(b []byte) string {
	cut := len(b) > MaxText
	if cut {
		b = b[:MaxText]
	}
	var out strings.Builder
	for len(b) > 0 {
		r, n := utf8.DecodeRune(b)
		switch {
		case r == utf8.RuneError && n == 1:
			fmt.Fprintf(&out, `\x%02x`, b[0])
		case unicode.IsPrint(r):
			out.WriteRune(r)
		case r < 0x80:
			fmt.Fprintf(&out, `\x%02x`, r)
		default:
			fmt.Fprintf(&out, `\u%04x`, r)
		}
		b = b[n:]
		if out.Len() > MaxText {
			cut = true
			break
		}
	}
	if cut {
		return out.String() + "…"
	}
	return out.String()
}
