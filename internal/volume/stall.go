package volume

import (
	"errors"
	"sync"
	"syscall"
	"time"
)

// staller holds requests while the host cannot do them: no room, over quota, an I/O error. A guest that is told of
// such an error remounts its file systems read-only or loses data, and never forgets; one that waits does not notice.
type staller struct {
	onStall  func(error)
	onResume func()
	every    time.Duration

	mu      sync.Mutex
	held    int           // requests waiting
	again   chan struct{} // closed to make them try again
	failing bool          // give errors to the guest instead
	cut     int           // counts interruptions
}

func (s *staller) init(o Options) {
	s.onStall, s.onResume, s.every = o.OnStall, o.OnResume, o.RetryEvery
	if s.every <= 0 {
		s.every = 2 * time.Second
	}
	s.again = make(chan struct{})
}

// passing says that an error of the host may go away by itself or by what a person does.
func passing(err error) bool {
	return errors.Is(err, syscall.ENOSPC) || errors.Is(err, syscall.EDQUOT) || errors.Is(err, syscall.EIO)
}

// try does op until it succeeds, or fails in a way that waiting does not cure.
func (s *staller) try(op func() error) error {
	err := op()
	if err == nil || s.onStall == nil || !passing(err) {
		return err
	}
	return s.hold(op, err)
}

func (s *staller) hold(op func() error, err error) error {
	t, first := s.enter()
	if first {
		s.onStall(err)
	}
	for passing(err) && s.wait(t) {
		t = s.ticket()
		err = op()
	}
	if s.leave() && err == nil && s.onResume != nil {
		s.onResume()
	}
	return err
}

// ticket is what a held request takes before it tries, so that a Retry that comes while it tries is not lost.
type ticket struct {
	again chan struct{}
	cut   int
}

func (s *staller) ticket() ticket {
	s.mu.Lock()
	defer s.mu.Unlock()
	return ticket{s.again, s.cut}
}

// enter and leave count a held request and say if it is the first, and was the last.
func (s *staller) enter() (t ticket, first bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.held++
	return ticket{s.again, s.cut}, s.held == 1 && !s.failing
}

func (s *staller) leave() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.held--
	return s.held == 0
}

// wait returns when it is time to try again, with false when errors are to be given out.
func (s *staller) wait(t ticket) bool {
	s.mu.Lock()
	failing := s.failing
	s.mu.Unlock()
	if failing {
		return false
	}
	timer := time.NewTimer(s.every)
	defer timer.Stop()
	select {
	case <-t.again:
	case <-timer.C:
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	return !s.failing && s.cut == t.cut
}

func (s *staller) wake(failing bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.failing = failing
	close(s.again)
	s.again = make(chan struct{})
}

func (s *staller) close() { s.wake(true) }

// interrupt fails what is held now, and only that: its client is gone.
func (s *staller) interrupt() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.cut++
	close(s.again)
	s.again = make(chan struct{})
}

// Retry makes held requests try again at once: there is room now.
func (v *Volume) Retry() { v.stall.wake(false) }

// GiveUp lets held requests, and those to come, fail with the host's error. Retry takes it back.
func (v *Volume) GiveUp() { v.stall.wake(true) }

// Stalled says how many requests wait for the host.
func (v *Volume) Stalled() int {
	v.stall.mu.Lock()
	defer v.stall.mu.Unlock()
	return v.stall.held
}
