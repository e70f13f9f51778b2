package network

import (
	"io"
	"net"
	"os"
	"sync"
	"syscall"
	"time"
)

// stageConn is the far end of a flow on a stage: a connection from which is read what came in then.
type stageConn struct {
	s     *Stage
	f     *StageFlow
	began time.Time

	mu       sync.Mutex
	parts    []StagePart // not yet given
	rest     []byte      // of the part that is being given
	sent     int64
	wrote    time.Time // when the guest last sent something
	deadline time.Time
	ended    bool // all is given, or it was closed
	wake     chan struct{}
	closed   chan struct{}
}

// newStageConn begins a flow now.
func newStageConn(s *Stage, f *StageFlow) *stageConn {
	c := &stageConn{s: s, f: f, began: time.Now(), parts: f.Parts, wake: make(chan struct{}, 1), closed: make(chan struct{})}
	s.count(1)
	if len(c.parts) == 0 {
		c.end()
	}
	return c
}

// end notes once that nothing more is to be given. The caller has the lock, or the connection is his alone.
func (c *stageConn) end() {
	if !c.ended {
		c.ended = true
		c.s.count(-1)
	}
}

func (s *Stage) count(n int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.giving += n
}

func (c *stageConn) poke() {
	select {
	case c.wake <- struct{}{}:
	default:
	}
}

// Read waits until the next part is due.
func (c *stageConn) Read(b []byte) (int, error) {
	for {
		n, wait, err := c.next(b)
		if n > 0 || err != nil {
			return n, err
		}
		t := time.NewTimer(wait)
		select {
		case <-t.C:
		case <-c.wake:
		case <-c.closed:
		}
		t.Stop()
	}
}

// forever is longer than anything is waited for.
const forever = 24 * time.Hour

// next gives what is due, or says how long nothing will be.
func (c *stageConn) next(b []byte) (n int, wait time.Duration, err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	now := time.Now()
	select {
	case <-c.closed:
		return 0, 0, net.ErrClosed
	default:
	}
	wait = forever
	if !c.deadline.IsZero() {
		if wait = c.deadline.Sub(now); wait <= 0 {
			return 0, 0, os.ErrDeadlineExceeded
		}
	}
	if len(c.rest) == 0 {
		if len(c.parts) == 0 {
			c.end()
			return 0, wait, nil
		}
		if due := c.due(&c.parts[0], now); due > 0 {
			return 0, min(wait, due), nil
		}
		if err := c.take(); err != nil {
			return 0, 0, err
		}
	}
	n = copy(b, c.rest)
	if c.rest = c.rest[n:]; c.f.Protocol != protoTCP {
		c.rest = nil
	}
	if len(c.rest)+len(c.parts) == 0 {
		c.end()
	}
	return n, time.Millisecond, nil // of an empty datagram there is nothing to give
}

// due is how long the next part has to wait.
func (c *stageConn) due(p *StagePart, now time.Time) time.Duration {
	late := now.Sub(c.began) - (c.s.pace(p.Time) - c.s.pace(c.f.Began))
	switch {
	case late < 0:
		return -late
	case c.sent >= p.Sent:
		return 0
	}
	most := stagePatience - late
	if !c.wrote.IsZero() {
		most = min(most, c.wrote.Add(stageQuiet).Sub(now))
	}
	if most > 0 {
		return most // a write wakes it
	}
	c.s.mu.Lock()
	defer c.s.mu.Unlock()
	c.s.report.Late++
	return 0
}

// take begins the next part.
func (c *stageConn) take() error {
	p := c.parts[0]
	c.parts = c.parts[1:]
	switch {
	case p.Reset:
		c.end()
		return syscall.ECONNRESET
	case p.Closed:
		c.end()
		return io.EOF
	}
	c.rest = p.Data
	c.s.mu.Lock()
	defer c.s.mu.Unlock()
	c.s.report.Bytes += int64(len(p.Data))
	return nil
}

// Write takes what the guest sends. It goes nowhere.
func (c *stageConn) Write(b []byte) (int, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.f.Protocol == protoTCP {
		c.sent += int64(len(b))
	} else {
		c.sent++
	}
	c.wrote = time.Now()
	c.poke()
	return len(b), nil
}

// Close is called when the flow is over for the guest.
func (c *stageConn) Close() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	select {
	case <-c.closed:
	default:
		close(c.closed)
		c.end()
	}
	return nil
}

func (c *stageConn) CloseWrite() error                { return nil }
func (c *stageConn) LocalAddr() net.Addr              { return stageAddr("") }
func (c *stageConn) SetDeadline(t time.Time) error    { return c.SetReadDeadline(t) }
func (c *stageConn) SetWriteDeadline(time.Time) error { return nil }

func (c *stageConn) RemoteAddr() net.Addr {
	far := c.f.Far
	if c.f.Client.IsValid() {
		far = c.f.Client
	}
	return stageAddr(far.String())
}

func (c *stageConn) SetReadDeadline(t time.Time) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.deadline = t
	c.poke()
	return nil
}

// stageAddr is an address as text; the stage's own end has none.
type stageAddr string

func (stageAddr) Network() string  { return "stage" }
func (a stageAddr) String() string { return string(a) }
