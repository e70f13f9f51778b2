package network

import (
	"bytes"
	"errors"
	"io"
	"net"
	"sync"
	"syscall"
	"time"

	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/transport/tcp"
	"gvisor.dev/gvisor/pkg/waiter"
)

// buffers are held only while bytes move: a thousand idle flows hold none.
var buffers = sync.Pool{New: func() any { b := make([]byte, 64<<10); return &b }}

// relay moves bytes between the guest and a host socket until both directions have ended, or the flow is cut.
func (n *Network) relay(f *flow, ep tcpip.Endpoint, wq *waiter.Queue, conn net.Conn) {
	r := &relay{f: f, ep: ep, wq: wq, conn: conn, gone: make(chan struct{})}
	f.keep.Load().opened()
	if !f.onCut(r.abort) {
		r.abort()
		r.close(n)
		return
	}
	toHost := make(chan error, 1)
	go func() {
		err := r.guestToHost()
		if err != nil {
			r.abort()
		}
		toHost <- err
	}()
	err := r.hostToGuest()
	if err != nil {
		r.abort()
	}
	if err2 := <-toHost; err == nil {
		err = err2
	}
	if err != nil {
		n.finish(r.count(), endReset)
	}
	r.close(n)
}

type relay struct {
	f    *flow
	ep   tcpip.Endpoint
	wq   *waiter.Queue
	conn net.Conn
	once sync.Once
	gone chan struct{} // closed by abort
}

// abort ends both ends with a reset, and wakes both directions.
func (r *relay) abort() {
	r.once.Do(func() {
		close(r.gone)
		abort(r.conn)
		r.ep.Abort()
		r.count()
	})
}

func (r *relay) close(n *Network) {
	n.finish(r.count(), endClosed)
	r.conn.Close()
	n.closeGuest(r.ep, r.wq)
}

// Endpoints that only wait for the guest's last acknowledgement are no flows any more. A guest that never gives it
// holds at most maxClosing of them, for closeTimeout.
const (
	maxClosing   = 512
	closeTimeout = 10 * time.Second
)

// closeGuest closes an endpoint and waits until it is gone, or makes it so.
func (n *Network) closeGuest(ep tcpip.Endpoint, wq *waiter.Queue) {
	entry, gone := waiter.NewChannelEntry(waiter.EventHUp)
	wq.EventRegister(&entry)
	defer wq.EventUnregister(&entry)
	ep.Close()
	select {
	case n.closing <- struct{}{}:
		defer func() { <-n.closing }()
	default:
		ep.Abort()
		return
	}
	late := time.NewTimer(closeTimeout)
	defer late.Stop()
	for {
		switch tcp.EndpointState(ep.State()) {
		case tcp.StateClose, tcp.StateError, tcp.StateTimeWait:
			return
		}
		select {
		case <-gone:
		case <-late.C:
			ep.Abort()
			return
		case <-n.ctx.Done():
			ep.Abort()
			return
		}
	}
}

// count takes over the stack's count of segments.
func (r *relay) count() *flow {
	if s, ok := r.ep.Stats().(*tcp.Stats); ok {
		r.f.packetsOut.Store(int64(s.SegmentsReceived.Value()))
		r.f.packetsIn.Store(int64(s.SegmentsSent.Value()))
	}
	return r.f
}

var errGone = errors.New("flow was cut")

// wait blocks until the endpoint has one of the events on whose channel it waits.
func (r *relay) wait(ready chan struct{}) error {
	select {
	case <-ready:
		return nil
	case <-r.gone:
		return errGone
	}
}

func (r *relay) guestToHost() error {
	entry, ready := waiter.NewChannelEntry(waiter.ReadableEvents | waiter.EventHUp | waiter.EventErr)
	r.wq.EventRegister(&entry)
	defer r.wq.EventUnregister(&entry)
	for {
		moved, err := r.readGuest()
		switch err.(type) {
		case nil:
			if moved != nil {
				return moved
			}
		case *tcpip.ErrWouldBlock:
			if err := r.wait(ready); err != nil {
				return err
			}
		case *tcpip.ErrClosedForReceive:
			return closeWrite(r.conn)
		default:
			return stackError("guest", err)
		}
	}
}

// readGuest moves what the guest has sent. The first error is of the host's end.
func (r *relay) readGuest() (error, tcpip.Error) {
	buf := buffers.Get().(*[]byte)
	defer buffers.Put(buf)
	to := tcpip.SliceWriter(*buf)
	res, err := r.ep.Read(&to, tcpip.ReadOptions{})
	if err != nil {
		return nil, err
	}
	r.f.touch()
	r.f.bytesOut.Add(int64(res.Count))
	if _, err := r.conn.Write((*buf)[:res.Count]); err != nil {
		return err, nil
	}
	if ep, ok := r.ep.(*tcp.Endpoint); ok {
		ep.ModerateRecvBuf(res.Count)
	}
	return nil, nil
}

func (r *relay) hostToGuest() error {
	entry, ready := waiter.NewChannelEntry(waiter.WritableEvents | waiter.EventHUp | waiter.EventErr)
	r.wq.EventRegister(&entry)
	defer r.wq.EventUnregister(&entry)
	for {
		buf, n, err := readPooled(r.conn)
		cut := err != nil && err != io.EOF && !r.over()
		if n > 0 {
			r.f.touch()
			r.f.keep.Load().data(r.f.bytesOut.Load(), (*buf)[:n])
			if werr := r.writeGuest((*buf)[:n], ready); werr != nil {
				err = werr
			}
		}
		if buf != nil {
			buffers.Put(buf)
		}
		if err == io.EOF {
			r.f.keep.Load().closed(r.f.bytesOut.Load(), false)
			r.ep.Shutdown(tcpip.ShutdownWrite)
			return nil
		}
		if cut {
			r.f.keep.Load().closed(r.f.bytesOut.Load(), true)
		}
		if err != nil {
			return err
		}
	}
}

// over reports whether the flow was ended from this side.
func (r *relay) over() bool {
	select {
	case <-r.gone:
		return true
	default:
		return false
	}
}

func (r *relay) writeGuest(b []byte, ready chan struct{}) error {
	for len(b) > 0 {
		n, err := r.ep.Write(bytes.NewReader(b), tcpip.WriteOptions{})
		b = b[n:]
		r.f.bytesIn.Add(n)
		switch err.(type) {
		case nil:
		case *tcpip.ErrWouldBlock:
			if err := r.wait(ready); err != nil {
				return err
			}
		default:
			return stackError("guest", err)
		}
	}
	return nil
}

// readPooled reads from conn into a pooled buffer that it takes only when there is something to read. The caller puts it back.
func readPooled(conn net.Conn) (*[]byte, int, error) {
	raw, stream, ok := rawConn(conn)
	if !ok {
		buf := buffers.Get().(*[]byte)
		n, err := conn.Read(*buf)
		return buf, n, err
	}
	var buf *[]byte
	var n int
	var err error
	cerr := raw.Read(func(fd uintptr) bool {
		buf = buffers.Get().(*[]byte)
		for {
			n, err = syscall.Read(int(fd), *buf)
			if err != syscall.EINTR {
				break
			}
		}
		if err == syscall.EAGAIN {
			buffers.Put(buf)
			buf = nil
			return false
		}
		return true
	})
	switch {
	case cerr != nil:
		return buf, 0, cerr
	case err != nil:
		return buf, 0, err
	case n == 0 && stream:
		return buf, 0, io.EOF
	}
	return buf, n, nil
}

func rawConn(conn net.Conn) (raw syscall.RawConn, stream, ok bool) {
	var err error
	switch c := conn.(type) {
	case *net.TCPConn:
		stream = true
		raw, err = c.SyscallConn()
	case *net.UDPConn:
		raw, err = c.SyscallConn()
	default:
		return nil, false, false
	}
	return raw, stream, err == nil
}

func closeWrite(conn net.Conn) error {
	if c, ok := conn.(interface{ CloseWrite() error }); ok {
		return c.CloseWrite()
	}
	return conn.Close()
}
