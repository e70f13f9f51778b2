package probe

import (
	"errors"
	"sync/atomic"

	"vigia/internal/event"
)

// ErrTold is why a sampler does not walk: somebody else tells all there is.
var ErrTold = errors.New("the plugin tells")

// teller is who tells what processes do instead of the sampler: QEMU's plugin. QEMU may be its guest's, and what may be silenced is
// not relied upon: while the kernel counts new tasks and nothing is heard of any, the sampler looks for itself.
type teller struct {
	heard  func() (tasks uint64, alive bool) // new tasks that it told of, or said it had not been able to
	life   uint64
	forks  uint64 // as the kernel counted them at the last look
	last   uint64 // heard of until then
	unsaid int64  // counted since it was last heard
	owed   int64  // counted and never told of: they are new, or somebody keeps them back
	recent int64  // counted between the last two looks
	silent atomic.Bool
}

// Verify has the sampler rest while heard, which says how many new tasks somebody else has told of, keeps up with the kernel's count.
func (s *Sampler) Verify(heard func() (tasks uint64, alive bool)) { s.teller.heard = heard }

// Silenced reports whether what somebody else tells was found wanting. It may be called from any goroutine.
func (s *Sampler) Silenced() bool { return s.teller.silent.Load() }

// told reports whether there is nothing to sample. A task is counted a little before it is heard of: so one look with a count and
// no word is none too many, and two are.
func (s *Sampler) told(p Pulse) bool {
	t := &s.teller
	if t.heard == nil {
		return false
	}
	heard, alive := t.heard()
	if !alive {
		t.life = 0
		t.silent.Store(false)
		return false
	}
	more := int64(p.Forks - t.forks)
	known := t.life == p.Life && p.Counted
	before := t.unsaid
	if !known || heard != t.last {
		t.unsaid = 0
		t.silent.Store(false)
	} else if t.unsaid += more; more > 0 && before > 0 && !t.silent.Load() {
		t.silent.Store(true)
		s.emit(event.ProcessMissed, event.Fields{"count": t.unsaid, "threads": true, "reason": "the plugin did not tell of them"})
	}
	if known {
		s.withheld(more, int64(heard-t.last))
	} else {
		t.owed, t.recent = 0, 0
	}
	t.life, t.forks, t.last = p.Life, p.Forks, heard
	return !t.silent.Load()
}

// withheld tells of tasks that were counted and not told of, though others were. Those of the last two looks may yet have to run for the
// first time, which is when they are told of; older ones have, in a guest that runs.
func (s *Sampler) withheld(counted, told int64) {
	t := &s.teller
	if t.silent.Load() { // the sampler looks for itself
		t.owed, t.recent = 0, 0
		return
	}
	t.owed = max(0, t.owed+counted-told)
	if missing := t.owed - counted - t.recent; missing > 0 && told > 0 {
		t.owed -= missing
		s.emit(event.ProcessMissed, event.Fields{"count": missing, "threads": true, "reason": "the plugin told of others only"})
	}
	t.recent = counted
}
