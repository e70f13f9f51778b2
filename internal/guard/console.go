package guard

import (
	"bytes"
	"errors"
	"io"
	"net"
	"os"
	"sync"
	"time"

	"vigia/internal/event"
)

// Bounds of the console: the log's first part and each of its two tails in bytes, and what attached persons may cost. Which
// lines become events: lines.go. A guest that writes for ever keeps the first 16 MiB and the last 8 to 16.
const (
	logHead     = 16 << 20
	logTail     = 8 << 20
	maxAttached = 8
	attachMost  = 1 << 20 // bytes that an attached person may be behind
)

// console is the machine's serial line: what the guest writes goes to the log, to events, and to whoever is attached.
type console struct {
	conn net.Conn
	log  consoleLog

	mu       sync.Mutex
	slow     bool         // the machine is recorded
	typed    func([]byte) // told of what persons type; nil: nobody
	attached map[*attachment]bool
	closed   bool

	line  []byte // of the guest's, as far as it has come
	lines *lines
}

// The serial port of a machine that is recorded takes what is typed at the next place in the recording, and does not say when
// its 16 bytes are full: what comes faster than the guest reads is lost. So it gets a few at a time.
const (
	slowChunk = 4
	slowPause = 50 * time.Millisecond
)

// keyboard tells of what is typed before the guest has it.
type keyboard struct{ c *console }

func (k keyboard) Write(b []byte) (int, error) {
	if k.c.typed != nil {
		k.c.typed(b)
	}
	return k.c.conn.Write(b)
}

type slowly struct{ io.Writer }

func (w slowly) Write(b []byte) (int, error) {
	n, err := w.Writer.Write(b)
	time.Sleep(slowPause)
	return n, err
}

// onlyReader keeps io.CopyBuffer to its buffer.
type onlyReader struct{ io.Reader }

// attachment is a person on the line. What the guest writes arrives in crumbs of a few bytes, so what waits for the
// person is bounded by its size, not by its pieces.
type attachment struct {
	conn    net.Conn
	waiting []byte        // guarded by the console's lock, like gone
	gone    bool          // no more will come
	wake    chan struct{} // there is something to do
}

func newConsole(conn net.Conn, log consoleLog, emit func(event.Kind, event.Fields)) *console {
	return &console{conn: conn, log: log, lines: newLines(emit), attached: map[*attachment]bool{}}
}

// run reads until QEMU closes the line.
func (c *console) run() {
	buf := make([]byte, 4<<10)
	for {
		n, err := c.conn.Read(buf)
		if n > 0 {
			c.log.write(buf[:n])
			c.fan(buf[:n])
			c.split(buf[:n])
		}
		if err != nil {
			c.close()
			return
		}
	}
}

// fan gives a chunk to the attached; one that is too far behind is let go, so that it can't hold the guest up.
func (c *console) fan(b []byte) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for a := range c.attached {
		if len(a.waiting)+len(b) > attachMost {
			c.letGo(a)
			continue
		}
		a.waiting = append(a.waiting, b...)
		a.poke()
	}
}

// letGo ends an attachment once it has what waits for it; the caller holds the lock.
func (c *console) letGo(a *attachment) {
	delete(c.attached, a)
	a.gone = true
	a.poke()
}

func (a *attachment) poke() {
	select {
	case a.wake <- struct{}{}:
	default:
	}
}

func (c *console) split(b []byte) {
	for len(b) > 0 {
		i := bytes.IndexByte(b, '\n')
		part := b
		if i >= 0 {
			part = b[:i]
		}
		if room := event.MaxText + 1 - len(c.line); len(part) > room {
			part = part[:max(room, 0)]
		}
		c.line = append(c.line, part...)
		if i < 0 {
			return
		}
		c.lines.take(bytes.TrimRight(c.line, "\r"), time.Now())
		c.line = c.line[:0]
		b = b[i+1:]
	}
}

// attach joins a person to the line. The connection is ended when the line is, or when they are too far behind.
func (c *console) attach(conn net.Conn) error {
	a := &attachment{conn: conn, wake: make(chan struct{}, 1)}
	c.mu.Lock()
	defer c.mu.Unlock()
	switch {
	case c.closed:
		return errors.New("the serial line is closed: the machine does not run")
	case len(c.attached) >= maxAttached:
		return errors.New("eight consoles are attached already: detach one")
	}
	c.attached[a] = true
	go c.give(a)
	go c.take(a)
	return nil
}

func (c *console) give(a *attachment) {
	defer a.conn.Close()
	for range a.wake {
		c.mu.Lock()
		b, gone := a.waiting, a.gone
		a.waiting = nil
		c.mu.Unlock()
		a.conn.SetWriteDeadline(time.Now().Add(10 * time.Second))
		if _, err := a.conn.Write(b); err != nil || gone {
			c.detach(a)
			return
		}
	}
}

func (c *console) take(a *attachment) {
	if c.slow {
		io.CopyBuffer(slowly{c.conn}, onlyReader{a.conn}, make([]byte, slowChunk))
	} else {
		io.Copy(keyboard{c}, onlyReader{a.conn})
	}
	c.detach(a)
}

func (c *console) detach(a *attachment) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.attached[a] {
		c.letGo(a)
	}
}

func (c *console) close() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.closed = true
	for a := range c.attached {
		c.letGo(a)
	}
	c.conn.Close()
}

// consoleLog keeps the beginning of what the guest wrote, and the end.
type consoleLog struct {
	head  *os.File
	tails [2]*os.File
	head0 int64 // bytes in head
	cur   int
	curN  int64
}

func openConsoleLog(head, tail0, tail1 *os.File) consoleLog {
	l := consoleLog{head: head, tails: [2]*os.File{tail0, tail1}}
	l.head0 = fileSize(head)
	a, b := modified(tail0), modified(tail1)
	if b.After(a) {
		l.cur = 1
	}
	l.curN = fileSize(l.tails[l.cur])
	return l
}

func fileSize(f *os.File) int64 {
	if info, err := f.Stat(); err == nil {
		return info.Size()
	}
	return 0
}

func modified(f *os.File) time.Time {
	if info, err := f.Stat(); err == nil && info.Size() > 0 {
		return info.ModTime()
	}
	return time.Time{}
}

// write keeps the bytes. A host without room loses log, never the guest's time: errors are not retried.
func (l *consoleLog) write(b []byte) {
	if room := logHead - l.head0; room > 0 {
		n := min(int64(len(b)), room)
		l.head.WriteAt(b[:n], l.head0)
		l.head0 += n
		b = b[n:]
	}
	if len(b) == 0 {
		return
	}
	if l.curN+int64(len(b)) > logTail {
		l.cur, l.curN = 1-l.cur, 0
		l.tails[l.cur].Truncate(0)
	}
	l.tails[l.cur].WriteAt(b, l.curN)
	l.curN += int64(len(b))
}
