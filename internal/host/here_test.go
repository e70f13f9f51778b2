package host

import (
	"os"
	"testing"
)

// What this host is: for people who read the log of a test.
func TestInspectHere(t *testing.T) {
	h := &Host{State: t.TempDir()}
	fs := h.Inspect(t.Context())
	if len(fs) != len(questions) {
		t.Fatalf("%d findings, want %d", len(fs), len(questions))
	}
	for _, f := range fs {
		if f.Name == "" || f.Seen == "" || f.Status != OK && f.Status != Degraded && f.Status != Missing {
			t.Errorf("incomplete finding: %+v", f)
		}
		if f.Status == Missing && f.Consequence == "" {
			t.Errorf("%s is missing, and nobody says what follows", f.Name)
		}
	}
	if testing.Verbose() {
		fs.Write(os.Stdout)
	}
	t.Logf("%+v", h.Accelerator())
}
