package guard

import (
	"errors"
	"sync"
	"time"

	"vigia/internal/introspect"
)

// goneAfter is how long a kernel that was seen may not be found: longer than anything that passes by itself.
const goneAfter = 10 * time.Second

// sight remembers whether the guest's kernel was seen. One that was, and is not found any more though the machine was not reset,
// is no kernel that still boots: another was started in its place, or it has made itself unfindable.
type sight struct {
	mu   sync.Mutex
	seen bool
	lost time.Time // since when it is not found
	told bool
}

// looked is told how a look ended. gone: the kernel that was seen is not there any more; fresh: and that was not told yet.
func (s *sight) looked(err error, now time.Time) (gone, fresh bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	switch {
	case err == nil:
		s.seen, s.lost, s.told = true, time.Time{}, false
		return false, false
	case !s.seen || !errors.Is(err, introspect.ErrNotReady):
		return false, false
	case s.lost.IsZero():
		s.lost = now
		return false, false
	case now.Sub(s.lost) < goneAfter:
		return false, false
	}
	fresh, s.told = !s.told, true
	return true, fresh
}

// begin forgets: the machine was reset, or has other memory now.
func (s *sight) begin() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.seen, s.lost, s.told = false, time.Time{}, false
}

// gone is what is told of it.
var gone = introspect.Finding{Kind: "kernel.gone", Subject: "the kernel", Severity: introspect.Critical,
	Detail: "the kernel that was seen in memory is not found any more, and the machine was not reset: another kernel was started in its place, or what it is found by is written over; nothing can be seen in this machine"}
