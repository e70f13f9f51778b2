// Package link joins the daemon and its workers: calls in both directions over one unix socket, with descriptors.
//
// A frame is a 4-byte big-endian length (at most MaxFrame) and that many bytes of JSON:
//
//	{"id":7,"method":"pause","body":{…}}          a call
//	{"id":7,"reply":true,"body":{…},"error":"…"}  its answer
//	{"id":7,"cancel":true}                        the caller does not wait any more; the answer comes all the same
//
// Descriptors travel as SCM_RIGHTS beside the first byte of their frame; "files" in the frame says how many, and a
// frame whose count does not match ends the connection. A worker is assumed to be taken over by its guest: the
// daemon caps every size before it allocates, bounds the calls in flight, and gives up the connection, never itself.
package link

import (
	"bufio"
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"sync"
	"syscall"
	"time"
)

// Limits of a connection. MaxFrame is in bytes.
const (
	MaxFrame    = 2 << 20
	MaxFiles    = 250
	MaxInFlight = 64
)

// Limits of the daemon's end. A worker has one call, and waits for its answer; and it always reads. One that does not for
// DaemonPatience while its socket is full is given up: whoever waits to send to it waits no longer than that.
const (
	daemonInFlight = 4
	DaemonPatience = 3 * time.Second
)

// ErrClosed is returned by calls on, and pending at the end of, a connection; ErrProtocol is wrapped by what ended it
// where the other side broke the protocol.
var (
	ErrClosed   = errors.New("worker connection closed")
	ErrProtocol = errors.New("worker broke the protocol")
)

// RemoteError is an error that the other side returned: its text, and nothing else of it.
type RemoteError string

func (e RemoteError) Error() string { return string(e) }

// Request is one call received. Files belong to the handler, which closes them.
type Request struct {
	Method string
	Body   json.RawMessage
	Files  []*os.File
}

// Decode unpacks the body.
func (r *Request) Decode(v any) error {
	if err := json.Unmarshal(r.Body, v); err != nil {
		return fmt.Errorf("%w: %s: %v", ErrProtocol, r.Method, err)
	}
	return nil
}

// Response is what a handler gives back. Files are sent and then closed.
type Response struct {
	Body  any
	Files []*os.File
}

// Handler answers calls; it runs on a goroutine of its own for each.
type Handler func(ctx context.Context, r Request) (Response, error)

type frame struct {
	ID     uint64          `json:"id"`
	Method string          `json:"method,omitempty"`
	Reply  bool            `json:"reply,omitempty"`
	Cancel bool            `json:"cancel,omitempty"`
	Error  string          `json:"error,omitempty"`
	Files  int             `json:"files,omitempty"`
	Body   json.RawMessage `json:"body,omitempty"`
}

type answer struct {
	frame frame
	files []*os.File
	err   error
}

// Conn is one connection. Its methods may be called from any goroutine.
type Conn struct {
	sock    *net.UnixConn
	handler Handler
	ctx     context.Context
	cancel  context.CancelFunc
	slots   chan struct{}
	most    time.Duration // for one sending; 0: a worker waits for its daemon, which may stand still

	sendMu sync.Mutex
	mu     sync.Mutex
	next   uint64
	calls  map[uint64]chan answer
	served map[uint64]context.CancelFunc // calls of the other side that run here
	err    error
	done   chan struct{}

	received chan struct{}  // closed when nothing more is read
	serving  sync.WaitGroup // handlers that run
}

// New begins to serve the connection. handler may be nil for a side that answers nothing.
func New(sock *net.UnixConn, handler Handler) *Conn { return serve(sock, handler, MaxInFlight, 0) }

// NewDaemon is New for the daemon's end, where the other side may be hostile.
func NewDaemon(sock *net.UnixConn, handler Handler) *Conn {
	return serve(sock, handler, daemonInFlight, DaemonPatience)
}

func serve(sock *net.UnixConn, handler Handler, inFlight int, most time.Duration) *Conn {
	ctx, cancel := context.WithCancel(context.Background())
	c := &Conn{sock: sock, handler: handler, ctx: ctx, cancel: cancel, most: most,
		slots: make(chan struct{}, inFlight), calls: map[uint64]chan answer{}, served: map[uint64]context.CancelFunc{},
		done: make(chan struct{}), received: make(chan struct{})}
	go c.receive()
	return c
}

// Done is closed when the connection has ended.
func (c *Conn) Done() <-chan struct{} { return c.done }

// Settle waits until nothing of the other side is worked on here any more: the connection has ended, all that came before
// is read, and its handlers have returned.
func (c *Conn) Settle() {
	<-c.received
	c.serving.Wait()
}

// Err says why the connection ended; nil while it lives.
func (c *Conn) Err() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.err
}

// Close ends the connection; pending calls return ErrClosed.
func (c *Conn) Close() error {
	c.fail(ErrClosed)
	return nil
}

// Call asks the other side and waits for its answer, which is unpacked into out (nil: dropped). The files are sent along
// and stay open on this side. What comes back belongs to the caller.
func (c *Conn) Call(ctx context.Context, method string, in, out any, files ...*os.File) ([]*os.File, error) {
	body, err := json.Marshal(in)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", method, err)
	}
	ch := make(chan answer, 1)
	c.mu.Lock()
	if c.err != nil {
		c.mu.Unlock()
		return nil, c.err
	}
	c.next++
	id := c.next
	c.calls[id] = ch
	c.mu.Unlock()
	if err := c.send(frame{ID: id, Method: method, Body: body, Files: len(files)}, files); err != nil {
		c.forget(id)
		return nil, fmt.Errorf("%s: %w", method, err)
	}
	select {
	case a := <-ch:
		return c.unpack(method, a, out)
	case <-ctx.Done():
		if !c.forget(id) { // the answer came meanwhile
			closeAll((<-ch).files)
		} else {
			go c.send(frame{ID: id, Cancel: true}, nil)
		}
		return nil, fmt.Errorf("%s: %w", method, ctx.Err())
	}
}

func (c *Conn) unpack(method string, a answer, out any) ([]*os.File, error) {
	switch {
	case a.err != nil:
		return nil, fmt.Errorf("%s: %w", method, a.err)
	case a.frame.Error != "":
		closeAll(a.files)
		return nil, RemoteError(a.frame.Error)
	case out == nil || len(a.frame.Body) == 0:
		return a.files, nil
	}
	if err := json.Unmarshal(a.frame.Body, out); err != nil {
		closeAll(a.files)
		return nil, fmt.Errorf("%s: %w: %v", method, ErrProtocol, err)
	}
	return a.files, nil
}

func (c *Conn) forget(id uint64) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	_, ok := c.calls[id]
	delete(c.calls, id)
	return ok
}

func (c *Conn) send(f frame, files []*os.File) error {
	payload, err := json.Marshal(f)
	if err != nil {
		return err
	}
	if len(payload) > MaxFrame {
		return fmt.Errorf("%w: frame of %d bytes", ErrProtocol, len(payload))
	}
	var rights []byte
	if len(files) > 0 {
		if len(files) > MaxFiles {
			return fmt.Errorf("%w: %d descriptors in one frame", ErrProtocol, len(files))
		}
		fds := make([]int, len(files))
		for i, file := range files {
			fds[i] = int(file.Fd())
		}
		rights = syscall.UnixRights(fds...)
	}
	buf := binary.BigEndian.AppendUint32(make([]byte, 0, 4+len(payload)), uint32(len(payload)))
	buf = append(buf, payload...)
	c.sendMu.Lock()
	defer c.sendMu.Unlock()
	if c.most > 0 {
		c.sock.SetWriteDeadline(time.Now().Add(c.most))
	}
	n, _, err := c.sock.WriteMsgUnix(buf, rights, nil)
	for err == nil && n < len(buf) {
		var m int
		m, err = c.sock.Write(buf[n:])
		n += m
	}
	if err != nil {
		c.fail(fmt.Errorf("%w: %v", ErrClosed, err))
	}
	return err
}

// fdReader reads the stream and gathers the descriptors that come along.
type fdReader struct {
	sock  *net.UnixConn
	files []*os.File
}

func (r *fdReader) Read(p []byte) (int, error) {
	oob := make([]byte, syscall.CmsgSpace(4*MaxFiles))
	n, oobn, _, _, err := r.sock.ReadMsgUnix(p, oob)
	if oobn > 0 {
		if e := r.take(oob[:oobn]); e != nil {
			return n, e
		}
	}
	if n == 0 && err == nil {
		err = io.EOF
	}
	return max(n, 0), err
}

func (r *fdReader) take(oob []byte) error {
	messages, err := syscall.ParseSocketControlMessage(oob)
	if err != nil {
		return fmt.Errorf("%w: control message: %v", ErrProtocol, err)
	}
	for i := range messages {
		fds, err := syscall.ParseUnixRights(&messages[i])
		if err != nil {
			continue
		}
		for _, fd := range fds {
			syscall.CloseOnExec(fd)
			r.files = append(r.files, os.NewFile(uintptr(fd), fmt.Sprintf("received-%d", fd)))
		}
	}
	if len(r.files) > 4*MaxFiles {
		return fmt.Errorf("%w: %d descriptors waiting", ErrProtocol, len(r.files))
	}
	return nil
}

func (c *Conn) receive() {
	defer close(c.received)
	in := &fdReader{sock: c.sock}
	buffered := bufio.NewReaderSize(in, 64<<10)
	for {
		f, err := readFrame(buffered)
		if err != nil {
			closeAll(in.files)
			c.fail(fmt.Errorf("%w: %w", ErrClosed, err))
			return
		}
		if f.Files < 0 || f.Files > len(in.files) {
			closeAll(in.files)
			c.fail(fmt.Errorf("%w: frame names %d descriptors, %d came", ErrProtocol, f.Files, len(in.files)))
			return
		}
		files := in.files[:f.Files:f.Files]
		in.files = in.files[f.Files:]
		switch {
		case f.Reply:
			c.deliver(f, files)
		case f.Cancel:
			closeAll(files)
			c.mu.Lock()
			if cancel := c.served[f.ID]; cancel != nil {
				cancel()
			}
			c.mu.Unlock()
		default:
			c.serve(f, files)
		}
	}
}

func readFrame(r io.Reader) (frame, error) {
	var f frame
	var head [4]byte
	if _, err := io.ReadFull(r, head[:]); err != nil {
		return f, err
	}
	n := binary.BigEndian.Uint32(head[:])
	if n > MaxFrame {
		return f, fmt.Errorf("%w: frame of %d bytes", ErrProtocol, n)
	}
	payload := make([]byte, n)
	if _, err := io.ReadFull(r, payload); err != nil {
		return f, err
	}
	if err := json.Unmarshal(payload, &f); err != nil {
		return f, fmt.Errorf("%w: %v", ErrProtocol, err)
	}
	return f, nil
}

func (c *Conn) deliver(f frame, files []*os.File) {
	c.mu.Lock()
	ch, ok := c.calls[f.ID]
	delete(c.calls, f.ID)
	c.mu.Unlock()
	if !ok {
		closeAll(files)
		return
	}
	ch <- answer{frame: f, files: files}
}

func (c *Conn) serve(f frame, files []*os.File) {
	if c.handler == nil {
		closeAll(files)
		go c.send(frame{ID: f.ID, Reply: true, Error: "no such call: " + f.Method}, nil)
		return
	}
	select {
	case c.slots <- struct{}{}:
	default: // to wait here would hold back the callers who leave
		closeAll(files)
		c.send(frame{ID: f.ID, Reply: true, Error: fmt.Sprintf("busy: %d calls are being answered already", cap(c.slots))}, nil)
		return
	}
	ctx, cancel := context.WithCancel(c.ctx)
	c.mu.Lock()
	_, twice := c.served[f.ID]
	if !twice {
		c.served[f.ID] = cancel
	}
	c.mu.Unlock()
	if twice {
		cancel()
		closeAll(files)
		<-c.slots
		c.fail(fmt.Errorf("%w: call %d comes twice", ErrProtocol, f.ID))
		return
	}
	c.serving.Add(1)
	go func() {
		defer func() {
			defer c.serving.Done()
			cancel()
			c.mu.Lock()
			delete(c.served, f.ID)
			c.mu.Unlock()
			<-c.slots
		}()
		resp, err := c.handler(ctx, Request{Method: f.Method, Body: f.Body, Files: files})
		out := frame{ID: f.ID, Reply: true, Files: len(resp.Files)}
		if err != nil {
			out.Error, out.Files = err.Error(), 0
			closeAll(resp.Files)
			resp.Files = nil
		} else if resp.Body != nil {
			if out.Body, err = json.Marshal(resp.Body); err != nil {
				out.Error = err.Error()
			}
		}
		if err := c.send(out, resp.Files); errors.Is(err, ErrProtocol) {
			c.send(frame{ID: f.ID, Reply: true, Error: err.Error()}, nil)
		}
		closeAll(resp.Files)
	}()
}

func (c *Conn) fail(err error) {
	c.mu.Lock()
	if c.err != nil {
		c.mu.Unlock()
		return
	}
	c.err = err
	pending := c.calls
	c.calls = map[uint64]chan answer{}
	c.mu.Unlock()
	for _, ch := range pending {
		ch <- answer{err: err}
	}
	c.cancel()
	c.sock.Close()
	close(c.done)
}

func closeAll(files []*os.File) {
	for _, f := range files {
		if f != nil {
			f.Close()
		}
	}
}
