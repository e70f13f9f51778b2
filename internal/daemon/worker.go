package daemon

import (
	"context"
	"fmt"
	"os"
	"regexp"
	"sync"
	"sync/atomic"
	"time"

	"vigia/internal/event"
	"vigia/internal/jail"
	"vigia/internal/link"
)

// workerStart bounds how long a worker may take to start and answer.
const workerStart = 20 * time.Second

// worker is a guard or a gate, seen from the daemon.
type worker struct {
	name    string
	machine string // under ackMu
	proc    *jail.Process
	conn    *link.Conn
	hello   link.Hello
	tally   *os.File      // counts what it has not told; nil: it gave none
	greeted chan struct{} // closed once hello is there
	bury    func(*worker) // told of its end
	keeps   atomic.Bool   // what enters

	ackMu   sync.Mutex
	acked   uint64
	ackWake chan struct{}
}

// gone reports whether the worker's connection has ended; a worker without one is of no use, and none is gone too.
func (w *worker) gone() bool { return w == nil || w.conn.Err() != nil }

// done is closed when the worker's connection has ended; of no worker it never is.
func (w *worker) done() <-chan struct{} {
	if w == nil {
		return nil
	}
	return w.conn.Done()
}

// procRef names a process for ever; it is what the store keeps of one.
type procRef struct {
	PID    int    `json:"pid"`
	Start  uint64 `json:"start"`
	Source string `json:"source,omitempty"` // of a worker's events
}

func refOf(p *jail.Process) procRef {
	if p == nil {
		return procRef{}
	}
	return procRef{PID: p.PID, Start: p.StartTime}
}

// spawnWorker starts a guard or gate under its profile, with the socket in the run directory on which this daemon and
// later ones speak to it.
func (d *Daemon) spawnWorker(ctx context.Context, m *machine, name string, profile jail.Profile) (*worker, error) {
	dir, err := openSocketDir(d.files.run(m.id()))
	if err != nil {
		return nil, fmt.Errorf("%s: %w", name, err)
	}
	defer dir.close()
	l, err := dir.listen(name + ".sock")
	if err != nil {
		return nil, fmt.Errorf("%s: %w", name, err)
	}
	defer l.Close()
	control, err := l.File()
	if err != nil {
		return nil, fmt.Errorf("%s: %w", name, err)
	}
	defer control.Close()
	log, err := os.OpenFile(d.files.workerLog(m.id(), name), os.O_CREATE|os.O_WRONLY|os.O_TRUNC, 0o600)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", name, err)
	}
	defer log.Close()
	most, err := d.largest(m, name)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", name, err)
	}
	group, err := d.group(m, name, m.workerLimits(name))
	if err != nil {
		return nil, fmt.Errorf("%s: %w", name, err)
	}
	ctx, cancel := context.WithTimeout(ctx, workerStart)
	defer cancel()
	tally, err := link.NewTallyFile()
	if err != nil {
		return nil, fmt.Errorf("%s: %w", name, err)
	}
	defer tally.Close()
	proc, err := jail.Worker{Profile: profile, Tag: d.tag(m, name), Args: []string{profile.Name}, Files: []*os.File{control, tally}, Stderr: log, Stdout: log,
		User: m.user(name), Group: group, MaxFile: most}.Start(ctx)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", name, err)
	}
	w, err := d.joinWorker(ctx, m, name, proc)
	if err != nil {
		proc.Kill()
		<-proc.Done()
		proc.Close()
		return nil, err
	}
	return w, nil
}

// largest is the size that no file of a worker may exceed: a log's, and for the guard the overlay's, which has its full
// size from the beginning. A worker that was taken over fills no more of the host's disk than its machine's own.
func (d *Daemon) largest(m *machine, name string) (uint64, error) {
	if name != "guard" {
		return logMost, nil
	}
	info, err := os.Stat(d.files.overlay(m.id()))
	if err != nil {
		return 0, err
	}
	return uint64(info.Size()) + logMost, nil
}

// joinWorker connects to a worker that runs: one just started, or one that an earlier daemon left.
func (d *Daemon) joinWorker(ctx context.Context, m *machine, name string, proc *jail.Process) (*worker, error) {
	dir, err := openSocketDir(d.files.run(m.id()))
	if err != nil {
		return nil, fmt.Errorf("%s: %w", name, err)
	}
	defer dir.close()
	sock, err := dir.dial(name + ".sock")
	if err != nil {
		return nil, fmt.Errorf("%s: %w", name, err)
	}
	w := &worker{name: name, machine: m.rec.Spec.Name, proc: proc, greeted: make(chan struct{}), ackWake: make(chan struct{}, 1), bury: d.bus.bury}
	joined := make(chan struct{})
	w.conn = link.NewDaemon(sock, func(_ context.Context, r link.Request) (link.Response, error) {
		<-joined // a worker that has lived for a while speaks at once
		return d.fromWorker(w, r)
	})
	close(joined)
	files, err := w.conn.Call(ctx, link.CallHello, nil, &w.hello)
	if err == nil && !sourceForm.MatchString(w.hello.Source) {
		err = fmt.Errorf("%w: events of source %q", link.ErrProtocol, event.Text([]byte(w.hello.Source)))
	}
	if err != nil {
		closeFiles(files)
		w.conn.Close()
		return nil, fmt.Errorf("%s: %w", name, err)
	}
	if len(files) > 0 {
		w.tally = files[0]
		closeFiles(files[1:])
	}
	close(w.greeted)
	go w.acknowledge()
	return w, nil
}

// sourceForm is what a worker's ids may begin with.
var sourceForm = regexp.MustCompile(`^[0-9a-f]{16}$`)

// fromWorker answers a worker's calls: there is only one.
func (d *Daemon) fromWorker(w *worker, r link.Request) (link.Response, error) {
	for _, f := range r.Files {
		f.Close()
	}
	if r.Method != link.CallEvents {
		return link.Response{}, fmt.Errorf("%w: call %q", link.ErrProtocol, r.Method)
	}
	var e link.Events
	if err := r.Decode(&e); err != nil {
		return link.Response{}, err
	}
	select {
	case <-w.greeted: // the first events may overtake the answer to hello
	case <-w.conn.Done():
		select {
		case <-w.greeted: // its last words count
		default:
			return link.Response{}, w.conn.Err()
		}
	}
	if err := d.bus.deliver(w.of(), w.name, w.hello.Source, e.Events, w.ack); err != nil {
		d.log.Error("worker sends what it must not, its connection is closed", "worker", w.name, "machine", w.of(), "error", err)
		w.conn.Close()
		return link.Response{}, err
	}
	return link.Response{}, nil
}

// of names the worker's machine.
func (w *worker) of() string {
	w.ackMu.Lock()
	defer w.ackMu.Unlock()
	return w.machine
}

// rename tells a worker of a machine that was made ahead what it is called now.
func (w *worker) rename(ctx context.Context, name string) error {
	w.ackMu.Lock()
	w.machine = name
	w.ackMu.Unlock()
	_, err := w.conn.Call(ctx, link.CallName, link.Name{Name: name}, nil)
	return err
}

// ack notes that events up to seq are in the ledger; the worker is told soon.
func (w *worker) ack(seq uint64) {
	w.ackMu.Lock()
	w.acked = max(w.acked, seq)
	w.ackMu.Unlock()
	w.wake()
}

// acknowledge tells the worker what is in the ledger, until it is told: an event that is never acknowledged would come
// again to a later daemon.
func (w *worker) acknowledge() {
	for {
		select {
		case <-w.ackWake:
		case <-w.conn.Done():
			return
		}
		w.ackMu.Lock()
		seq := w.acked
		w.ackMu.Unlock()
		ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
		_, err := w.conn.Call(ctx, link.CallAck, link.Ack{Seq: seq}, nil)
		cancel()
		if err != nil {
			w.wake()
			waitFor(context.Background(), w.conn.Done(), time.Second)
		}
	}
}

func (w *worker) wake() {
	select {
	case w.ackWake <- struct{}{}:
	default:
	}
}

// end stops the worker, for its machine is gone or it can't be used, and tells what it had not told.
func (w *worker) end() {
	if w == nil {
		return
	}
	w.conn.Close()
	w.proc.Kill()
	<-w.proc.Done()
	w.proc.Close()
	w.conn.Settle() // what came of it is taken
	w.bury(w)
	if w.tally != nil {
		w.tally.Close()
	}
}

// socketFile takes a socket's descriptor out of Go's hands, to give it away.
func socketFile(c interface{ File() (*os.File, error) }) (*os.File, error) {
	defer c.(interface{ Close() error }).Close()
	return c.File()
}
