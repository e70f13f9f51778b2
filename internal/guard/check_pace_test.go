package guard

import (
	"testing"
	"time"
)

// TestRestingGuestIsCheckedLessOften: a guest that rests is spared four rounds of five, and none once it works.
func TestRestingGuestIsCheckedLessOften(t *testing.T) {
	var s turns
	for i, step := range []struct{ worked, want bool }{
		{true, true}, {true, true},
		{false, false}, {false, false}, {false, false}, {false, false}, {false, true},
		{false, false}, {true, true},
		{false, false}, {false, false}, {false, false}, {false, false}, {false, true},
	} {
		if got := s.due(step.worked); got != step.want {
			t.Errorf("round %d, worked %v: due %v", i, step.worked, got)
		}
	}
}

// TestWorked: any of what a guest does keeps it from being taken for one that rests, and so does not knowing.
func TestWorked(t *testing.T) {
	used, known, stirred, written := time.Duration(0), true, false, int64(0)
	w := &work{used: func() (time.Duration, bool) { return used, known }, stirred: func() bool { return stirred }, written: func() int64 { return written }}
	worked := func(why string, want bool) {
		t.Helper()
		w.asked = time.Now().Add(-time.Second)
		if w.worked() != want {
			t.Errorf("%s: worked %v", why, !want)
		}
	}
	worked("nothing", false)
	used = 10 * time.Millisecond
	worked("its timers", false)
	used = time.Minute
	worked("it computes", true)
	used, known = 0, false
	worked("nobody knows", true)
	known, stirred = true, true
	worked("a process", true)
	stirred, written = false, 1
	worked("a write", true)
	worked("nothing more", false)
}
