package introspect

import (
	"testing"
	"time"
)

// TestPatience: executable memory that is nobody's is told only when it has been there for longer than the kernel takes to
// free it; other findings do not wait for that.
func TestPatience(t *testing.T) {
	for _, c := range []struct {
		name  string
		kind  string
		lasts time.Duration
		found bool
		waits time.Duration
	}{
		{"a module's code for its start", KindCodeUnowned, 1200 * time.Millisecond, false, 2 * time.Second},
		{"code of nobody's", KindCodeUnowned, time.Hour, true, 8 * time.Second},
		{"a change of code", KindTextChanged, time.Hour, true, 500 * time.Millisecond},
		{"a passing change", KindTextChanged, 100 * time.Millisecond, false, 200 * time.Millisecond},
	} {
		var waited time.Duration
		r := Checker{settle: []time.Duration{15 * time.Millisecond, 40 * time.Millisecond, 100 * time.Millisecond, 250 * time.Millisecond}, patience: patience,
			known: map[string]map[string]bool{}, torn: map[string]int{}, sleep: func(d time.Duration) { waited += d }}
		k := &check{name: "text", run: func(*Checker) (Result, error) {
			if waited >= c.lasts {
				return Result{}, nil
			}
			return Result{Findings: []Finding{{Kind: c.kind, Subject: "x", Severity: Critical}}}, nil
		}}
		res, err := r.confirmed(k)
		if found := len(res.Findings) > 0; err != nil || found != c.found || waited > c.waits {
			t.Errorf("%s: found %v after %v, %v", c.name, found, waited, err)
		}
		once := waited
		if _, err := r.confirmed(k); err != nil || c.found && waited != once {
			t.Errorf("%s: what was given waits again", c.name)
		}
	}
}
