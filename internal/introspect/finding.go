package introspect

import (
	"fmt"
	"slices"
	"strings"
)

// Severity says how bad a finding is, in the words of the rules (package policy).
type Severity string

// The severities of findings. Info is a fact worth listing that a healthy guest may show: a known hook in its place.
const (
	Info     Severity = "info"
	Low      Severity = "low"
	Medium   Severity = "medium"
	High     Severity = "high"
	Critical Severity = "critical"
)

// severities, the worst first.
var severities = []Severity{Critical, High, Medium, Low, Info}

// Finding is one thing in the guest's memory that should not be so, with what shows it. Text of the guest's in it is
// made printable and cut.
type Finding struct {
	Kind     string     `json:"kind"`    // text.changed, process.hidden, …: doc/introspection.md lists all
	Subject  string     `json:"subject"` // what it is about: a symbol, a module's name, "comm (pid)"
	Detail   string     `json:"detail"`  // one sentence for a person
	Severity Severity   `json:"severity"`
	Evidence []Evidence `json:"evidence,omitempty"`

	// Of what one view lists and another does not: which do, and which do not.
	Listed  []string `json:"listed,omitempty"`
	Missing []string `json:"missing,omitempty"`
	// Process describes the process it is about, where it is about one.
	Process *Process `json:"process,omitempty"`

	// Key tells one finding from the next over samples, where kind, subject and the first address do not: a task's address
	// and start time, say.
	Key string `json:"-"`

	checks []string // which gave it
}

// Evidence is what was read, and what should have been there.
type Evidence struct {
	Address  uint64 `json:"address"`            // virtual, of the running kernel
	Bytes    []byte `json:"bytes,omitempty"`    // as found; up to 64
	Expected []byte `json:"expected,omitempty"` // as long as Bytes, where it is known
	Note     string `json:"note,omitempty"`     // what lies there
}

// identity is what a finding has in common with itself in another sample.
func (f *Finding) identity() string {
	if f.Key != "" {
		return f.Kind + "\x00" + f.Key
	}
	var at uint64
	if len(f.Evidence) > 0 {
		at = f.Evidence[0].Address
	}
	return fmt.Sprintf("%s\x00%s\x00%x", f.Kind, f.Subject, at)
}

// bound cuts what a report has no room for.
func (f *Finding) bound() {
	f.Evidence = f.Evidence[:min(len(f.Evidence), maxEvidence)]
	for i := range f.Evidence {
		e := &f.Evidence[i]
		e.Bytes, e.Expected = e.Bytes[:min(len(e.Bytes), maxShown)], e.Expected[:min(len(e.Expected), maxShown)]
	}
}

// Serious reports whether a finding is more than a fact worth listing.
func (f *Finding) Serious() bool { return f.Severity != Info }

// byWorst orders findings for a reader: the worst first, those of a kind together.
func byWorst(list []Finding) {
	slices.SortStableFunc(list, func(a, b Finding) int {
		if d := slices.Index(severities, a.Severity) - slices.Index(severities, b.Severity); d != 0 {
			return d
		}
		if d := strings.Compare(a.Kind, b.Kind); d != 0 {
			return d
		}
		return strings.Compare(a.Subject, b.Subject)
	})
}
