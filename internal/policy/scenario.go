package policy

import (
	"fmt"
	"strconv"
	"strings"
	"time"
	"unicode"

	"github.com/rogpeppe/go-internal/txtar"

	"vigia/internal/event"
)

// Scenario is a story about rules, told in a txtar archive: the rules, the events, the alerts that must follow.
//
//	Cracking is found after half a minute of it.
//	-- rule.yaml --
//	id: password-cracking
//	…
//	-- events --
//	0s          web  disk.read  path=/etc/shadow bytes=4096
//	5s..40s/1s  web  cpu.usage  percent=98
//	-- alerts --
//	35s web password-cracking high quarantine e1 e2 e32
//
// A line of events is a time since the beginning, or a first and last time and a step; the machine; the kind; the
// fields. Events are numbered e1, e2, … as they come. "-- events.jsonl --" has events as JSON lines instead. Without
// rule.yaml the scenario is about the rules that come with vigia.
type Scenario struct {
	Name    string
	Comment string
	Rules   []Rule
	Events  []event.Event
	Alerts  string // as FormatAlerts writes them
}

// Epoch is when scenarios begin.
var Epoch = time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)

// maxScenario bounds the events that a scenario's short lines may stand for.
const maxScenario = 100_000

// ParseScenario reads a scenario.
func ParseScenario(name string, data []byte, responses []string) (*Scenario, error) {
	a := txtar.Parse(data)
	s := &Scenario{Name: name, Comment: strings.TrimSpace(string(a.Comment))}
	var err error
	for _, f := range a.Files {
		switch f.Name {
		case "rule.yaml":
			s.Rules, err = Parse(name+"/"+f.Name, f.Data, responses)
		case "events":
			s.Events, err = shortEvents(name+"/"+f.Name, string(f.Data))
		case "events.jsonl":
			s.Events, err = jsonEvents(name+"/"+f.Name, string(f.Data))
		case "alerts":
			s.Alerts = string(f.Data)
		default:
			err = fmt.Errorf("%s: unknown part %q: there are rule.yaml, events, events.jsonl, alerts", name, f.Name)
		}
		if err != nil {
			return nil, err
		}
	}
	if s.Rules == nil {
		s.Rules, err = Starter(responses)
	}
	return s, err
}

// Run runs the scenario's rules over its events.
func (s *Scenario) Run() []Decision {
	engine := NewEngine(s.Rules)
	var decisions []Decision
	for _, e := range s.Events {
		decisions = append(decisions, engine.Event(e)...)
	}
	return decisions
}

// FormatAlerts writes decisions as a scenario expects them, one a line: time, machine, rule, severity, responses,
// events.
func FormatAlerts(decisions []Decision) string {
	var out strings.Builder
	for _, d := range decisions {
		fmt.Fprintf(&out, "%s %s %s %s %s %s\n", d.Time.Sub(Epoch), d.Machine, d.Rule, d.Severity,
			strings.Join(d.Respond, ","), strings.Join(d.Events, " "))
	}
	return out.String()
}

func jsonEvents(name, data string) (events []event.Event, err error) {
	for i, line := range strings.Split(data, "\n") {
		if line = strings.TrimSpace(line); line == "" || line[0] == '#' {
			continue
		}
		e, err := event.Unmarshal([]byte(line))
		if err != nil {
			return nil, fmt.Errorf("%s:%d: %w", name, i+1, err)
		}
		events = append(events, e)
	}
	return events, nil
}

func shortEvents(name, data string) (events []event.Event, err error) {
	for i, line := range strings.Split(data, "\n") {
		if line = strings.TrimSpace(line); line == "" || line[0] == '#' {
			continue
		}
		if events, err = shortLine(events, words(line)); err != nil {
			return nil, fmt.Errorf("%s:%d: %w", name, i+1, err)
		}
	}
	return events, nil
}

// words splits a line at spaces outside quotes, and takes the quotes off.
func words(line string) []string {
	quoted := false
	parts := strings.FieldsFunc(line, func(r rune) bool {
		if r == '"' {
			quoted = !quoted
		}
		return !quoted && unicode.IsSpace(r)
	})
	for i := range parts {
		parts[i] = strings.ReplaceAll(parts[i], `"`, "")
	}
	return parts
}

func shortLine(events []event.Event, parts []string) ([]event.Event, error) {
	if len(parts) < 3 {
		return nil, fmt.Errorf("an event is TIME MACHINE KIND FIELD=VALUE…")
	}
	first, last, every, err := times(parts[0])
	if err != nil {
		return nil, err
	}
	for at, n := first, 0; at <= last; at, n = at+every, n+1 {
		if len(events) >= maxScenario {
			return nil, fmt.Errorf("more than %d events", maxScenario)
		}
		e := event.Event{ID: fmt.Sprintf("e%d", len(events)+1), Machine: parts[1], Time: Epoch.Add(at), Kind: event.Kind(parts[2])}
		if e.Fields, err = shortFields(e.Kind, parts[3:], n); err != nil {
			return nil, err
		}
		if err := e.Check(); err != nil {
			return nil, err
		}
		events = append(events, e)
	}
	return events, nil
}

// times reads "5s" or "5s..40s/1s".
func times(s string) (first, last, every time.Duration, err error) {
	a, rest, isRange := strings.Cut(s, "..")
	if first, err = time.ParseDuration(a); err != nil || !isRange {
		return first, first, 1, err
	}
	b, c, ok := strings.Cut(rest, "/")
	if !ok {
		return 0, 0, 0, fmt.Errorf("%q: a range of times is FIRST..LAST/STEP", s)
	}
	if last, err = time.ParseDuration(b); err != nil {
		return 0, 0, 0, err
	}
	if every, err = time.ParseDuration(c); err == nil && every <= 0 {
		err = fmt.Errorf("%q: the step must be more than 0", s)
	}
	return first, last, every, err
}

// shortFields reads FIELD=VALUE by the types of the kind; {n} in a value is the number of the event in its range.
func shortFields(kind event.Kind, parts []string, n int) (event.Fields, error) {
	fields := event.Fields{}
	for _, p := range parts {
		name, value, ok := strings.Cut(p, "=")
		f, known := event.Kinds[kind].Field(name)
		if !ok || !known {
			return nil, fmt.Errorf("%q is no field of %s", p, kind)
		}
		value = strings.ReplaceAll(value, "{n}", strconv.Itoa(n))
		var err error
		switch f.Type {
		case event.String:
			fields[name] = value
		case event.Int:
			fields[name], err = strconv.ParseInt(value, 10, 64)
		case event.Float:
			fields[name], err = strconv.ParseFloat(value, 64)
		case event.Bool:
			fields[name], err = strconv.ParseBool(value)
		case event.List:
			fields[name] = strings.Split(value, ",")
		}
		if err != nil {
			return nil, fmt.Errorf("%s: %w", name, err)
		}
	}
	return fields, nil
}
