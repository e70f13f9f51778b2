package probe

import (
	"context"
	"errors"
	"runtime"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"vigia/internal/event"
)

const (
	// SamplePeriod is how often a guest is looked at that works, calmPeriod how often one that has hardly done so in its last calmLooks:
	// its virtual CPUs ran for less than one part in calmShare of the time, and no task came or went. To wake is what a look costs.
	SamplePeriod = 20 * time.Millisecond
	calmPeriod   = 100 * time.Millisecond
	calmLooks    = 10
	calmShare    = 50
	// share of one core that looking may take: a look that costs c is followed by none for share×c.
	share = 125
	// stillPeriod is how often one is looked at that does not run.
	stillPeriod = time.Second
	// absentPeriod is how often a guest whose kernel is not there (yet) is looked for.
	absentPeriod = 250 * time.Millisecond
	// toldPeriod is how often what somebody else tells is held against the kernel's own count.
	toldPeriod = 2 * time.Second
	// maxKnown bounds what is kept of a guest's processes. A guest of ordinary size has room for 32,768.
	maxKnown = 1 << 16
)

// Sampler finds out by looking again and again. It is for one goroutine.
type Sampler struct {
	// Used says how long the guest's virtual CPUs have run since it was last asked, where that is known: what has not run has not
	// changed. It may be nil.
	Used func() (time.Duration, bool)

	guest func() (Guest, error) // that there is now
	emit  Emit

	pulse   Pulse
	known   map[name]*member // nil: no life has been seen yet
	modules map[loadedAs]bool
	list    []Glance
	round   uint64
	due     time.Time // of the next walk
	late    time.Time // when there is one even if the guest seems not to have run
	ran     bool      // since the last walk
	looked  time.Time // when Used was last asked
	calm    int       // looks in a row at a guest that hardly works
	last    Pulse     // at the last look
	teller  teller
	owed    int64 // tasks that the kernel has counted and nobody has seen; less those seen before they were counted
	before  int64 // owed, a walk ago
	churn   bool  // threads have ended since something was told as missed

	missed   int64 // and not yet told
	reported time.Time
}

// name is what a process is known by, also after one of its threads has taken its leader's place in an exec.
type name struct {
	pid   int64
	start uint64
}

// member is a process that is known: how it looked last, and what it is.
type member struct {
	last   Glance
	who    Process
	round  uint64 // of the walk that saw it last
	exited bool   // and told of
	begun  bool   // it runs a program of which nobody was told yet: its arguments were not there
}

// NewSampler makes a sampler of whatever guest gives, which may change.
func NewSampler(guest func() (Guest, error), emit Emit) *Sampler {
	return &Sampler{guest: guest, emit: emit}
}

// Run samples until ctx ends.
func (s *Sampler) Run(ctx context.Context) {
	timer := time.NewTimer(0)
	defer timer.Stop()
	for {
		select {
		case <-timer.C:
		case <-ctx.Done():
			return
		}
		timer.Reset(s.turn())
	}
}

// turn looks once and returns when to look again. The thread's clock says what looking costs; to keep the thread in between too
// would take two more wakings a look.
func (s *Sampler) turn() time.Duration {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	begin := threadTime()
	walked, err := s.Look(time.Now())
	switch {
	case errors.Is(err, ErrTold):
		return toldPeriod
	case err != nil:
		return absentPeriod
	case walked:
		s.due = time.Now().Add((threadTime() - begin) * share)
	}
	if s.calm >= calmLooks {
		return calmPeriod
	}
	return SamplePeriod
}

// threadTime is what this thread has run. The runtime is not told of the call: it would wake a thread to see how long it takes.
func threadTime() time.Duration {
	var t unix.Timespec
	if _, _, errno := unix.RawSyscall(unix.SYS_CLOCK_GETTIME, unix.CLOCK_THREAD_CPUTIME_ID, uintptr(unsafe.Pointer(&t)), 0); errno != 0 {
		return 0
	}
	return time.Duration(t.Nano())
}

// Look looks once, and tells what is new. walked says that it took more than the counters.
func (s *Sampler) Look(now time.Time) (walked bool, err error) {
	guest, err := s.guest()
	if err != nil {
		s.known, s.calm = nil, 0 // what comes is not what was
		return false, err
	}
	busy := s.worked(now) // asked before anything is read
	pulse, err := guest.Pulse()
	if err != nil {
		return false, err
	}
	if s.told(pulse) {
		s.known, s.calm = nil, 0
		return false, ErrTold
	}
	fresh := s.known == nil || pulse.Life != s.pulse.Life
	if s.calm++; busy || pulse != s.last {
		s.calm = 0
	}
	s.last = pulse
	if !fresh && pulse.Module != s.pulse.Module {
		s.loaded(guest)
	}
	s.pulse.Module = pulse.Module
	s.report(now)
	// Credentials change without any counter: so there is a walk also where the counters stand still.
	if !fresh && (now.Before(s.due) || !s.ran && now.Before(s.late)) {
		return false, nil
	}
	if s.list, err = guest.Glances(s.list[:0]); err != nil {
		return true, err
	}
	s.ran, s.late = false, now.Add(stillPeriod)
	if fresh {
		s.begin(guest, pulse)
		return true, nil
	}
	forks := int64(pulse.Forks - s.pulse.Forks)
	s.pulse = pulse
	seen := s.differences(guest)
	if pulse.Counted {
		s.account(forks - seen)
	}
	return true, nil
}

// worked says whether the guest's virtual CPUs did more since the last look than a guest that rests.
func (s *Sampler) worked(now time.Time) bool {
	used, known := time.Duration(0), false
	if s.Used != nil {
		used, known = s.Used()
	}
	since := now.Sub(s.looked)
	s.looked, s.ran = now, s.ran || !known || used > 0
	return !known || used > since/calmShare
}

// begin takes what there is as given: it began before anybody looked.
func (s *Sampler) begin(guest Guest, pulse Pulse) {
	s.known, s.modules = map[name]*member{}, map[loadedAs]bool{}
	s.pulse, s.round, s.owed, s.before, s.churn = pulse, 0, 0, 0, false
	for _, g := range s.list {
		s.meet(guest, g)
	}
	if list, err := guest.Modules(); err == nil {
		for _, m := range list {
			s.modules[m.as()] = true
		}
	}
}

// meet puts a process among the known ones.
func (s *Sampler) meet(guest Guest, g Glance) *member {
	m := &member{last: g, round: s.round}
	if !g.Kernel {
		m.describe(guest)
	}
	if len(s.known) < maxKnown {
		s.known[name{g.PID, g.StartTime}] = m
	}
	return m
}

// describe asks what the process is. Of one that ended meanwhile is known what was known before.
func (m *member) describe(guest Guest) {
	if p, err := guest.Describe(m.last); err == nil {
		m.who = p
	}
	m.who.PID, m.who.UID, m.who.EUID = m.last.PID, int64(m.last.UID), int64(m.last.EUID)
}

// differences tells what changed since the last walk, and returns how many tasks were seen for the first time.
func (s *Sampler) differences(guest Guest) (seen int64) {
	s.round++
	for _, g := range s.list {
		m := s.known[name{g.PID, g.StartTime}]
		if m == nil {
			m = s.meet(guest, g)
			seen += max(1, g.Threads)
			s.began(m)
		} else {
			seen += max(0, g.Threads-m.last.Threads)
			s.churn = s.churn || g.Threads < m.last.Threads || g.Ended != m.last.Ended
			s.changed(guest, m, g)
		}
		m.round = s.round
		if g.Zombie && !m.exited {
			s.started(m)
			m.exited = true
			s.tell(m, event.ProcessExited, ended(m.who.fields(), g.Exit))
		}
	}
	for n, m := range s.known {
		if m.round != s.round {
			delete(s.known, n)
			if !m.exited {
				s.started(m)
				s.tell(m, event.ProcessExited, m.who.fields())
			}
		}
	}
	return seen
}

func (s *Sampler) began(m *member) {
	m.begun = !m.last.Forked || m.last.Zombie
	if !m.begun {
		s.tell(m, event.ProcessForked, m.who.fields())
	} else if m.who.Cmdline != "" || m.last.Zombie {
		s.started(m)
	}
}

// changed compares a process with what it was. One that ends has no address space left: that is no other program.
func (s *Sampler) changed(guest Guest, m *member, g Glance) {
	old := m.last
	m.last = g
	late := m.begun
	if !g.Zombie && !g.Forked && g.Image != 0 && (old.Image != g.Image || old.Forked) {
		s.started(m)
		m.begun = true
	}
	if m.begun && !g.Zombie {
		m.describe(guest)
	}
	if old.UID != g.UID || old.EUID != g.EUID {
		m.who.UID, m.who.EUID = int64(g.UID), int64(g.EUID)
		f := m.who.fields()
		f["old_uid"], f["old_euid"] = int64(old.UID), int64(old.EUID)
		s.tell(m, event.ProcessCredentials, f)
	}
	if late || m.who.Cmdline != "" {
		s.started(m)
	}
}

// started tells of a program that has begun. In the middle of an exec its arguments are not there yet: it is told of at
// the next look then, or at its end.
func (s *Sampler) started(m *member) {
	if m.begun {
		m.begun = false
		s.tell(m, event.ProcessStarted, m.who.fields())
	}
}

func (s *Sampler) tell(m *member, kind event.Kind, f event.Fields) {
	if !m.last.Kernel {
		s.emit(kind, f)
	}
}

// account tells of tasks that were counted and not seen. One that is just being made is counted before it can be seen,
// and one made during the walk is seen before it is counted: only what is owed after two walks was missed.
func (s *Sampler) account(more int64) {
	s.owed += more
	missed := min(s.owed, s.before)
	s.before = s.owed
	if missed <= 0 {
		return
	}
	s.owed -= missed
	s.before -= missed
	s.missed += missed
}

// report tells of what was missed, once a second at most.
func (s *Sampler) report(now time.Time) {
	if s.missed == 0 || now.Sub(s.reported) < time.Second {
		return
	}
	s.emit(event.ProcessMissed, event.Fields{"count": s.missed, "threads": s.churn, "reason": "lived shorter than the time between two looks"})
	s.missed, s.churn, s.reported = 0, false, now
}

// loadedAs names one loading of a module. Its size is no part of that: it shrinks once the module has begun.
type loadedAs struct {
	name    string
	address uint64
}

func (m Module) as() loadedAs { return loadedAs{m.Name, m.Address} }

// loaded tells of modules that were not there.
func (s *Sampler) loaded(guest Guest) {
	list, err := guest.Modules()
	if err != nil {
		return
	}
	have := make(map[loadedAs]bool, len(list))
	for _, m := range list {
		have[m.as()] = true
		if !s.modules[m.as()] {
			s.emit(event.ModuleLoaded, m.fields())
		}
	}
	s.modules = have
}
