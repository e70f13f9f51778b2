// Package qmp speaks QEMU's machine protocol (docs/interop/qmp-spec in QEMU's source) over one connection.
//
// QEMU may have been taken over by its guest: a message is at most MaxMessage bytes, replies are matched by id, events
// beyond the buffer are dropped and counted, and anything else ends the connection with ErrProtocol.
package qmp

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"sync"
	"syscall"
)

// Limits: one message in bytes, and the events that wait for their reader.
const (
	MaxMessage = 1 << 20
	eventQueue = 256
)

// ErrProtocol is wrapped by what ended a connection where QEMU did not keep to QMP; ErrClosed by calls after its end.
var (
	ErrProtocol = errors.New("QEMU broke the QMP protocol")
	ErrClosed   = errors.New("QMP connection closed")
)

// Error is QEMU's refusal of a command.
type Error struct {
	Command string
	Class   string `json:"class"`
	Desc    string `json:"desc"`
}

func (e *Error) Error() string { return fmt.Sprintf("QEMU refused %s: %s", e.Command, e.Desc) }

// Event is something QEMU says unasked.
type Event struct {
	Name string          `json:"event"`
	Data json.RawMessage `json:"data"`
}

type message struct {
	Return json.RawMessage `json:"return"`
	Error  *Error          `json:"error"`
	ID     *uint64         `json:"id"`
	QMP    json.RawMessage `json:"QMP"`
	Event
}

// Client is one QMP connection.
type Client struct {
	conn   net.Conn
	events chan Event

	sendMu  sync.Mutex
	mu      sync.Mutex
	next    uint64
	waiting map[uint64]chan message
	dropped int
	err     error
	done    chan struct{}
}

// New reads QEMU's greeting, leaves the negotiation mode and begins to serve the connection. It waits for the greeting
// as long as ctx lives: QEMU sends it once it has accepted the connection.
func New(ctx context.Context, conn net.Conn) (*Client, error) {
	stop := context.AfterFunc(ctx, func() { conn.Close() })
	in := bufio.NewReaderSize(conn, 16<<10)
	greeting, err := readMessage(in)
	if !stop() && err != nil {
		err = ctx.Err()
	}
	if err != nil {
		return nil, fmt.Errorf("QMP greeting: %w", err)
	}
	if greeting.QMP == nil {
		return nil, fmt.Errorf("%w: no greeting", ErrProtocol)
	}
	c := &Client{conn: conn, events: make(chan Event, eventQueue), waiting: map[uint64]chan message{}, done: make(chan struct{})}
	go c.receive(in)
	if err := c.Run(ctx, "qmp_capabilities", nil, nil); err != nil {
		c.Close()
		return nil, err
	}
	return c, nil
}

// Events gives QEMU's events; it is closed when the connection ends.
func (c *Client) Events() <-chan Event { return c.events }

// Done is closed when the connection has ended.
func (c *Client) Done() <-chan struct{} { return c.done }

// Close ends the connection.
func (c *Client) Close() error {
	c.fail(ErrClosed)
	return nil
}

// Run executes a command with its arguments (nil: none) and unpacks what it returns into out (nil: dropped).
// A file is passed along for commands such as getfd.
func (c *Client) Run(ctx context.Context, command string, args, out any, file ...*os.File) error {
	c.mu.Lock()
	if c.err != nil {
		c.mu.Unlock()
		return fmt.Errorf("%s: %w", command, c.err)
	}
	c.next++
	id := c.next
	ch := make(chan message, 1)
	c.waiting[id] = ch
	c.mu.Unlock()
	defer func() {
		c.mu.Lock()
		delete(c.waiting, id)
		c.mu.Unlock()
	}()
	request, err := json.Marshal(struct {
		Execute   string `json:"execute"`
		Arguments any    `json:"arguments,omitempty"`
		ID        uint64 `json:"id"`
	}{command, args, id})
	if err != nil {
		return fmt.Errorf("%s: %w", command, err)
	}
	if err := c.write(append(request, '\n'), file); err != nil {
		c.fail(fmt.Errorf("%w: %v", ErrClosed, err))
		return fmt.Errorf("%s: %w", command, err)
	}
	select {
	case m := <-ch:
		if m.Error != nil {
			m.Error.Command = command
			return m.Error
		}
		if out == nil {
			return nil
		}
		if err := json.Unmarshal(m.Return, out); err != nil {
			return fmt.Errorf("%w: %s: %v", ErrProtocol, command, err)
		}
		return nil
	case <-c.done:
		return fmt.Errorf("%s: %w", command, c.reason())
	case <-ctx.Done():
		return fmt.Errorf("%s: %w", command, ctx.Err())
	}
}

func (c *Client) write(b []byte, files []*os.File) error {
	c.sendMu.Lock()
	defer c.sendMu.Unlock()
	if len(files) == 0 {
		_, err := c.conn.Write(b)
		return err
	}
	sock, ok := c.conn.(*net.UnixConn)
	if !ok {
		return errors.New("descriptors need a unix socket")
	}
	_, _, err := sock.WriteMsgUnix(b, syscall.UnixRights(int(files[0].Fd())), nil)
	return err
}

func (c *Client) receive(in *bufio.Reader) {
	defer close(c.events)
	for {
		m, err := readMessage(in)
		if err != nil {
			c.fail(fmt.Errorf("%w: %w", ErrClosed, err))
			return
		}
		switch {
		case m.Name != "":
			select {
			case c.events <- m.Event:
			default:
				c.mu.Lock()
				c.dropped++
				c.mu.Unlock()
			}
		case m.ID != nil:
			c.mu.Lock()
			ch := c.waiting[*m.ID]
			delete(c.waiting, *m.ID)
			c.mu.Unlock()
			if ch != nil {
				ch <- m
			}
		default:
			c.fail(fmt.Errorf("%w: neither an event nor an answer", ErrProtocol))
			return
		}
	}
}

// readMessage reads one line of at most MaxMessage bytes.
func readMessage(in *bufio.Reader) (message, error) {
	var m message
	line, err := readLine(in, MaxMessage)
	if err != nil {
		return m, err
	}
	if err := json.Unmarshal(line, &m); err != nil {
		return m, fmt.Errorf("%w: %v", ErrProtocol, err)
	}
	return m, nil
}

func readLine(in *bufio.Reader, limit int) ([]byte, error) {
	var line []byte
	for {
		part, err := in.ReadSlice('\n')
		line = append(line, part...)
		switch {
		case len(line) > limit:
			return nil, fmt.Errorf("%w: message over %d bytes", ErrProtocol, limit)
		case err == nil:
			return bytes.TrimSpace(line), nil
		case err == io.EOF && len(line) > 0:
			return nil, io.ErrUnexpectedEOF
		case !errors.Is(err, bufio.ErrBufferFull):
			return nil, err
		}
	}
}

// Err says why the connection ended; nil while it lives.
func (c *Client) Err() error { return c.reason() }

func (c *Client) reason() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.err
}

func (c *Client) fail(err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.err != nil {
		return
	}
	c.err = err
	c.conn.Close()
	close(c.done)
}
