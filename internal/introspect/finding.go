package introspect

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

// Finding is one thing in the guest's memory that should not be so, with what shows it. Text of the guest's in it is
// made printable and cut.
type Finding struct {
	Kind     string     `json:"kind"`    // text.changed, process.hidden, …: doc/introspection.md lists all
	Subject  string     `json:"subject"` // what it is about: a symbol, a module's name, "comm (pid)"
	Detail   string     `json:"detail"`  // one sentence for a person
	Severity Severity   `json:"severity"`
	Evidence []Evidence `json:"evidence,omitempty"`
}

// Evidence is what was read, and what should have been there.
type Evidence struct {
	Address  uint64 `json:"address"`            // virtual, of the running kernel
	Bytes    []byte `json:"bytes,omitempty"`    // as found; up to 64
	Expected []byte `json:"expected,omitempty"` // as long as Bytes, where it is known
	Note     string `json:"note,omitempty"`     // what lies there
}
