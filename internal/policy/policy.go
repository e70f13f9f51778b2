// Package policy decides: events go in, one after the other, and decisions come out. It performs nothing, reads no
// file and no clock: the times are those of the events, so the same rules give the same alerts on the same events,
// whenever and wherever they are run.
//
// # Idea
//
// A rule is a sequence of steps. A step names the kinds of event it looks at and a condition in CEL; a condition may
// have to hold for a while, or so many events may have to meet it within a window. The engine keeps, for each rule
// and machine, the sequences that have begun and are not complete.
//
//	id: password-cracking
//	title: The password file is read, then the CPU stays busy
//	severity: high
//	sequence:
//	  within: 10m
//	  steps:
//	    - on: disk.read
//	      when: event.path in ["/etc/shadow", "/etc/gshadow"]
//	    - on: cpu.usage
//	      when: event.percent >= 90.0
//	      for: 30s
//	respond: [quarantine]
//
// Conditions are checked against the table of event kinds when a rule is read: a field that a kind has not, or a
// comparison of unlike types, is an error with its line and column. doc/rules.md is the manual.
//
// # Bounds
//
// A guest chooses much of what comes in, so everything kept is bounded, and what is let go is counted in Stats:
// sequences begun, machines, groups of a count. A sequence that makes room is never the oldest one: repeating the
// first step must not help anybody to be forgotten.
package policy

import (
	"fmt"
	"slices"
	"strings"
	"time"

	"vigia/internal/event"
)

// Severity says how much a rule's alert matters.
type Severity string

// The severities, in order.
const (
	Low      Severity = "low"
	Medium   Severity = "medium"
	High     Severity = "high"
	Critical Severity = "critical"
)

var severities = []Severity{Low, Medium, High, Critical}

// Rule is a rule that was read and checked. It is made by Parse only.
type Rule struct {
	ID       string
	Title    string
	About    string
	Severity Severity
	Machines []string // patterns of machine names; empty: all
	Respond  []string
	Within   time.Duration // of a sequence of several steps
	Every    time.Duration // the least time between two alerts on one machine
	File     string
	Line     int
	Text     string // as it was written

	steps []step
	watch []string
	print string // fingerprint of the text, for restored state
}

// step is one step of a rule.
type step struct {
	name  string
	kinds []event.Kind
	when  *condition // nil: every event of the kinds
	hold  time.Duration
	gap   time.Duration
	count *count
}

type count struct {
	atLeast  int
	within   time.Duration
	by       *condition // events are counted apart for each value
	distinct *condition // what is counted are the different values
	weight   *condition // an event counts for so many
}

// Decision is a rule fulfilled on a machine.
type Decision struct {
	Rule     string    `json:"rule"`
	Title    string    `json:"title"`
	Severity Severity  `json:"severity"`
	Machine  string    `json:"machine"`
	Time     time.Time `json:"time"`   // of the event that completed it
	Events   []string  `json:"events"` // ids of the events that fulfilled it, in order
	Respond  []string  `json:"respond"`
}

// Kinds returns the kinds of event that the rule looks at.
func (r *Rule) Kinds() []event.Kind {
	var kinds []event.Kind
	for _, s := range r.steps {
		kinds = append(kinds, s.kinds...)
	}
	slices.Sort(kinds)
	return slices.Compact(kinds)
}

// Problem is one thing wrong with a rule file.
type Problem struct {
	File   string
	Line   int
	Column int
	Reason string
}

func (p Problem) String() string {
	return fmt.Sprintf("%s:%d:%d: %s", p.File, p.Line, p.Column, p.Reason)
}

// Refuse is the response that forbids what an event announces, a rollback for one. A rule that has it is never quiet.
const Refuse = "refuse"

// Problems is the error of Parse: everything that is wrong, in the order of the file.
type Problems []Problem

func (ps Problems) Error() string {
	lines := make([]string, len(ps))
	for i, p := range ps {
		lines[i] = p.String()
	}
	return strings.Join(lines, "\n")
}
