package link

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"vigia/internal/event"
)

// orphanTime is how long a worker that no daemon has configured waits for one: a daemon that died half-way through a
// start leaves no process behind.
const orphanTime = 30 * time.Second

// Worker is the worker's side: it serves one daemon at a time on a listening socket, the newest one.
type Worker struct {
	Outbox *Outbox
	Hello  func() Hello
	Handle Handler
	Tally  *os.File // handed to each daemon with the hello
	Left   func()   // told when a daemon's connection has ended and no other has come; may be nil

	mu   sync.Mutex
	conn *Conn
}

// Serve answers daemons until ctx ends or, before the worker is configured, until none has come for half a minute.
func (w *Worker) Serve(ctx context.Context, l *net.UnixListener) error {
	stop := context.AfterFunc(ctx, func() { l.Close() })
	defer stop()
	for {
		if !w.Hello().Configured {
			l.SetDeadline(time.Now().Add(orphanTime))
		} else {
			l.SetDeadline(time.Time{})
		}
		sock, err := l.AcceptUnix()
		switch {
		case ctx.Err() != nil:
			return nil
		case errors.Is(err, os.ErrDeadlineExceeded):
			if w.Hello().Configured || w.connected() {
				continue
			}
			return errors.New("no daemon came: a start was given up")
		case err != nil:
			return err
		}
		w.adopt(ctx, sock)
	}
}

func (w *Worker) connected() bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.conn != nil && w.conn.Err() == nil
}

func (w *Worker) adopt(ctx context.Context, sock *net.UnixConn) {
	conn := New(sock, w.handle)
	w.mu.Lock()
	old := w.conn
	w.conn = conn
	w.mu.Unlock()
	if old != nil {
		old.Close()
	}
	go func() {
		w.Outbox.Send(conn.ctx, func(ctx context.Context, batch []event.Event) (int, error) {
			events := encode(batch)
			_, err := conn.Call(ctx, CallEvents, events, nil)
			return len(events.Events), err
		})
		conn.Close()
		w.mu.Lock()
		alone := w.conn == conn
		w.mu.Unlock()
		if alone && w.Left != nil {
			w.Left()
		}
	}()
}

func (w *Worker) handle(ctx context.Context, r Request) (Response, error) {
	switch r.Method {
	case CallHello:
		files, err := duplicates(w.Tally)
		return Response{Body: w.Hello(), Files: files}, err
	case CallAck:
		var a Ack
		if err := r.Decode(&a); err != nil {
			return Response{}, err
		}
		w.Outbox.Ack(a.Seq)
		return Response{}, nil
	case CallDrain:
		return Response{}, w.Outbox.Drained(ctx)
	}
	return w.Handle(ctx, r)
}

// duplicates are descriptors to give away.
func duplicates(files ...*os.File) (out []*os.File, err error) {
	for _, f := range files {
		if f == nil {
			continue
		}
		fd, err := unix.FcntlInt(f.Fd(), unix.F_DUPFD_CLOEXEC, 0)
		if err != nil {
			closeAll(out)
			return nil, err
		}
		out = append(out, os.NewFile(uintptr(fd), f.Name()))
	}
	return out, nil
}

// encode takes as many of a batch as fit one frame. What does not keep to its kind's table is told of in its place: a mistake of
// ours must not block the events behind it.
func encode(batch []event.Event) Events {
	var out Events
	room := MaxFrame - 64<<10
	for i := range batch {
		b, err := batch[i].Marshal()
		if err != nil {
			lost := event.Event{ID: batch[i].ID, Machine: batch[i].Machine, Time: batch[i].Time, Kind: event.EventsLost,
				Fields: event.Fields{"count": int64(1), "reason": err.Error()}}
			b, _ = lost.Marshal()
		}
		if room -= len(b) + 1; room < 0 {
			break
		}
		out.Events = append(out.Events, json.RawMessage(b))
	}
	return out
}

// Where the daemon puts the listening socket on which daemons come to a worker, and its tally.
const (
	controlFD = 3
	tallyFD   = 4
)

// Count makes the worker's outbox keep the tally that the daemon has given it.
func (w *Worker) Count() error {
	f := os.NewFile(tallyFD, "tally")
	t, err := OpenTally(f, w.Outbox.Source())
	if err != nil {
		return err
	}
	w.Tally = f
	w.Outbox.KeepTally(t)
	return nil
}

// Control takes over the worker's control socket. Its name stays: the next daemon finds the worker by it.
func Control() (*net.UnixListener, error) {
	f := os.NewFile(controlFD, "control")
	defer f.Close()
	l, err := net.FileListener(f)
	if err != nil {
		return nil, fmt.Errorf("control socket: %w", err)
	}
	u, ok := l.(*net.UnixListener)
	if !ok {
		return nil, errors.New("control socket is not a unix socket")
	}
	u.SetUnlinkOnClose(false)
	return u, nil
}

// Files pairs the names of a body with the descriptors that came with it. It closes all of them on a mismatch.
func Files(names []string, files []*os.File) (map[string]*os.File, error) {
	out := map[string]*os.File{}
	if len(names) != len(files) {
		closeAll(files)
		return nil, errors.New("configure: names and descriptors do not match")
	}
	for i, name := range names {
		if out[name] != nil {
			closeAll(files)
			return nil, errors.New("configure: descriptor named twice: " + name)
		}
		out[name] = files[i]
	}
	return out, nil
}
