package network

import (
	"encoding/binary"
	"errors"
	"net"
	"os"
	"sync"
	"time"
)

// egress is the queue of frames to the guest. Whoever has frames appends them, already framed, to one buffer; a single
// writer swaps it for an empty one and writes it whole, so that a busy link costs one system call for many frames.
type egress struct {
	mu    sync.Mutex
	data  sync.Cond // there is something to write, or the writer must end
	space sync.Cond // there may be room, or the queue was muted or closed
	quiet sync.Cond // a write has ended

	pending, spare []byte
	frames         int      // in pending
	conn           net.Conn // nil: frames go nowhere
	writing        bool
	muted, closed  bool
	torn           []byte // the rest of a frame cut in the middle, its payload zeroed

	stats *counters
	taps  *taps
}

// egressLimit is how many bytes wait before a TCP sender must.
const egressLimit = 256 << 10

func newEgress(stats *counters, taps *taps) *egress {
	e := &egress{stats: stats, taps: taps}
	e.data.L, e.space.L, e.quiet.L = &e.mu, &e.mu, &e.mu
	return e
}

// offer queues a frame if there is room: for answers that the guest can ask for again.
func (e *egress) offer(frame []byte) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if len(e.pending) > egressLimit {
		e.stats.overflow.Add(1)
		return
	}
	e.append(len(frame), frame)
}

// append adds one frame, given in parts. The caller holds mu.
func (e *egress) append(size int, parts ...[]byte) {
	if e.conn == nil || e.muted || e.closed {
		if e.muted {
			e.stats.dropped[reasonQuarantine].Add(1)
		}
		return
	}
	e.pending = binary.BigEndian.AppendUint32(e.pending, uint32(size))
	for _, p := range parts {
		e.pending = append(e.pending, p...)
	}
	if e.taps.active() {
		e.taps.frame(e.pending[len(e.pending)-size:], toGuest)
	}
	e.frames++
	e.stats.framesOut.Add(1)
	e.stats.bytesOut.Add(int64(size))
	e.data.Signal()
}

// room waits until a frame can be queued, or would be dropped anyway. The caller holds mu.
func (e *egress) room() {
	for len(e.pending) > egressLimit && e.conn != nil && !e.muted && !e.closed {
		e.space.Wait()
	}
}

func (e *egress) attach(conn net.Conn) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.conn, e.torn = conn, nil
	e.clear()
}

func (e *egress) detach(conn net.Conn) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.conn == conn {
		e.conn = nil
		e.clear()
	}
	e.data.Broadcast()
}

func (e *egress) close() {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.closed = true
	e.clear()
	e.data.Broadcast()
}

// clear empties the queue. The caller holds mu.
func (e *egress) clear() int {
	n := e.frames
	e.pending, e.frames = e.pending[:0], 0
	e.space.Broadcast()
	return n
}

// mute drops what waits and all that comes, and stops a write in the middle: when it returns, nothing more reaches the guest. It says
// how many frames were dropped.
func (e *egress) mute() int {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.muted = true
	n := e.clear()
	if e.writing {
		conn := e.conn
		if conn != nil {
			conn.SetWriteDeadline(time.Unix(1, 0))
		}
		for e.writing {
			e.quiet.Wait()
		}
		if conn != nil {
			conn.SetWriteDeadline(time.Time{})
		}
	}
	e.stats.dropped[reasonQuarantine].Add(int64(n))
	return n
}

func (e *egress) unmute() {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.muted = false
	if len(e.torn) > 0 {
		e.data.Signal()
	}
}

// serve writes to conn until it is detached.
func (e *egress) serve(conn net.Conn) error {
	e.mu.Lock()
	defer e.mu.Unlock()
	for {
		for e.conn == conn && !e.closed && (e.muted || len(e.pending)+len(e.torn) == 0) {
			e.data.Wait()
		}
		if e.conn != conn || e.closed {
			return nil
		}
		if err := e.write(conn); err != nil {
			if e.conn == conn {
				e.conn = nil
				e.clear()
			}
			conn.Close()
			return err
		}
	}
}

// write sends one batch. The caller holds mu, which is released meanwhile.
func (e *egress) write(conn net.Conn) error {
	batch := e.pending
	owed := len(e.torn)
	if owed > 0 {
		batch = append(e.torn, batch...)
		e.torn = nil
	}
	e.pending, e.spare, e.frames = e.spare[:0], nil, 0
	e.writing = true
	e.mu.Unlock()
	n, err := conn.Write(batch)
	e.mu.Lock()
	e.writing = false
	e.quiet.Broadcast()
	if e.muted && errors.Is(err, os.ErrDeadlineExceeded) {
		e.torn = tear(batch, n, owed)
		err = nil
	}
	e.spare = batch[:0]
	e.space.Broadcast()
	return err
}

// tear returns what must still be sent so that a stream cut after n bytes of batch is in step again: the rest of the frame
// that n falls into, with nothing of its contents. The first owed bytes of batch are themselves such a rest.
func tear(batch []byte, n, owed int) []byte {
	if n < owed {
		return append([]byte(nil), batch[n:owed]...)
	}
	for at := owed; at < n; {
		end := at + 4 + int(binary.BigEndian.Uint32(batch[at:]))
		if n < end {
			rest := make([]byte, end-n)
			if n < at+4 {
				copy(rest, batch[n:at+4])
			}
			return rest
		}
		at = end
	}
	return nil
}
