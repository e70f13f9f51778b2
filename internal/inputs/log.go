package inputs

import (
	"errors"
	"math/rand/v2"
	"os"
	"slices"
	"sync"
	"sync/atomic"
	"time"
)

// queueMost is how many bytes of records may wait for the disk: what a worker that dies has lost at most.
const queueMost = 1 << 20

// recordRoom is what a record weighs in the queue beside its payload, so that empty ones are bounded too.
const recordRoom = 96

// Bounds are a log's: bytes of all its segments together, and how old what is kept may get.
type Bounds struct {
	Bytes int64
	Age   time.Duration
}

// Log writes records into a ring of segments. Its methods may be called from any goroutine and never wait for the disk; a nil Log keeps nothing.
type Log struct {
	flow atomic.Uint64

	mu      sync.Mutex
	wake    sync.Cond
	queue   []Record
	bytes   int
	missing Record // of what found no room
	closed  bool

	ring ring
	done chan struct{}
}

// ring is the files; only the log's own goroutine has them.
type ring struct {
	files   []*os.File
	most    int64 // bytes of one
	age     time.Duration
	current int
	size    int64
	seq     uint64
	began   []time.Time // of each segment; zero: it is empty
	buf     []byte
	failed  error
}

// Open goes on with the log that the files hold, or begins one. It owns the files.
func Open(files []*os.File, b Bounds) (*Log, error) {
	if len(files) < 2 || len(files) > MaxSegments {
		return nil, errors.New("inputs: two to thirty-two files are wanted")
	}
	most := min(max(b.Bytes/int64(len(files)), MinSegment), MaxSegment)
	l := &Log{ring: ring{files: files, most: most, age: b.Age, began: make([]time.Time, len(files))}, done: make(chan struct{})}
	l.wake.L = &l.mu
	// Numbers of flows are never used again, whoever wrote before.
	l.flow.Store(uint64(time.Now().UnixNano()) + uint64(rand.Uint32()))
	l.ring.find()
	go l.run()
	return l, nil
}

// find looks for the newest segment. What follows in the log begins a new one: the old one's end may be torn.
func (r *ring) find() {
	head := make([]byte, headerSize)
	for i, f := range r.files {
		if _, err := f.ReadAt(head, 0); err != nil {
			continue
		}
		seq, at, err := parseHeader(head)
		if err != nil {
			continue
		}
		if r.began[i] = at; seq >= r.seq {
			r.seq, r.current = seq, i
		}
	}
	r.size = r.most
}

// NextFlow is a number for a flow or a call.
func (l *Log) NextFlow() uint64 {
	if l == nil {
		return 0
	}
	return l.flow.Add(1)
}

// Add keeps a record, under the time it is given or that of the call. Its data is copied.
func (l *Log) Add(r Record) {
	if l == nil {
		return
	}
	if r.Time.IsZero() {
		r.Time = time.Now()
	}
	for first := true; first || len(r.Data) > 0; first = false {
		part := r
		part.Data = slices.Clone(r.Data[:min(len(r.Data), MaxData)])
		r.Data = r.Data[len(part.Data):]
		l.push(part)
	}
}

func (l *Log) push(r Record) {
	l.mu.Lock()
	defer l.mu.Unlock()
	room := len(r.Data) + recordRoom
	switch {
	case l.closed:
		return
	case l.bytes+room > queueMost:
		if l.missing.Flow == 0 {
			l.missing = Record{Kind: Missing, Time: r.Time}
		}
		l.missing.Flow++
		l.missing.Sent += int64(len(r.Data))
		return
	case l.missing.Flow > 0:
		l.queue = append(l.queue, l.missing)
		l.missing = Record{}
	}
	l.queue = append(l.queue, r)
	l.bytes += room
	l.wake.Signal()
}

// Close writes what waits and closes the files.
func (l *Log) Close() error {
	if l == nil {
		return nil
	}
	l.mu.Lock()
	l.closed = true
	l.wake.Signal()
	l.mu.Unlock()
	<-l.done
	return l.ring.failed
}

// Flush returns once all that was added before is in the files.
func (l *Log) Flush() {
	if l == nil {
		return
	}
	for {
		l.mu.Lock()
		idle := l.bytes == 0
		l.mu.Unlock()
		select {
		case <-l.done:
			return
		default:
		}
		if idle {
			return
		}
		time.Sleep(time.Millisecond)
	}
}

func (l *Log) run() {
	defer close(l.done)
	for {
		batch, bytes, more := l.take()
		l.ring.write(batch)
		l.mu.Lock()
		l.bytes -= bytes
		l.mu.Unlock()
		if !more {
			l.ring.close()
			return
		}
	}
}

// take waits for records. What is taken counts as waiting until it is written.
func (l *Log) take() (batch []Record, bytes int, more bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for len(l.queue) == 0 && !l.closed {
		l.wake.Wait()
	}
	if l.closed && l.missing.Flow > 0 {
		l.queue = append(l.queue, l.missing)
		l.missing = Record{}
	}
	batch, l.queue = l.queue, nil
	return batch, l.bytes, !l.closed
}

// write appends records. A disk that does not take them loses them: the reader sees the torn end.
func (r *ring) write(batch []Record) {
	r.buf = r.buf[:0]
	for i := range batch {
		rec := &batch[i]
		size := int64(recordHead + len(rec.Data) + recordTail)
		if r.size+int64(len(r.buf))+size > r.most || (r.age > 0 && rec.Time.Sub(r.began[r.current]) > r.age/time.Duration(len(r.files))) {
			r.flush()
			r.next(rec.Time)
		}
		r.buf = appendRecord(r.buf, r.seq, rec)
	}
	r.flush()
	if cap(r.buf) > queueMost {
		r.buf = nil
	}
}

func (r *ring) flush() {
	if len(r.buf) == 0 {
		return
	}
	n, err := r.files[r.current].WriteAt(r.buf, r.size)
	r.size += int64(n)
	if err != nil {
		r.failed = err
		r.size = r.most // the next record begins another segment
	}
	r.buf = r.buf[:0]
}

// next begins a segment over the oldest one, and empties those that are too old.
func (r *ring) next(at time.Time) {
	r.current = (r.current + 1) % len(r.files)
	r.seq++
	for i, f := range r.files {
		if i == r.current || (r.age > 0 && !r.began[i].IsZero() && at.Sub(r.began[i]) > r.age) {
			f.Truncate(0)
			r.began[i] = time.Time{}
		}
	}
	r.began[r.current], r.size = at, 0
	r.buf = appendHeader(r.buf, r.seq, at)
}

func (r *ring) close() {
	for _, f := range r.files {
		if err := f.Close(); err != nil && r.failed == nil {
			r.failed = err
		}
	}
}
