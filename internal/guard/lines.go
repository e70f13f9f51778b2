package guard

import (
	"hash/fnv"
	"sync"
	"time"

	"vigia/internal/event"
)

// What of a second's lines becomes events, at most linesPerSec: the first at once; then those that are like none of the
// last seconds', so that a flood of one thing hides no other; and the last, when the second is over. The rest is
// counted: an event says how many lines were skipped before it.
const (
	linesFirst  = 10
	linesNew    = 6
	linesLast   = 4
	linesPerSec = linesFirst + linesNew + linesLast

	shapesMost = 512              // that are remembered in a generation; two are kept
	shapesLast = 10 * time.Second // how long a generation is added to
)

// lines chooses from the lines of a serial line. A line that is held for the second's end may so come behind a later one.
type lines struct {
	emit  func(event.Kind, event.Fields)
	after func(time.Duration, func())

	mu          sync.Mutex
	window      time.Time // when this second began
	first, new  int       // told in it
	held        []string  // its last ones
	skipped     int64
	now, before map[uint64]bool // shapes of the lines seen
	began       time.Time       // of now
	armed       bool
	waiting     func(int64) // told how many lines are held or skipped and not told of
}

func newLines(emit func(event.Kind, event.Fields)) *lines {
	return &lines{emit: emit, after: func(d time.Duration, f func()) { time.AfterFunc(d, f) }, now: map[uint64]bool{}, waiting: func(int64) {}}
}

// take is given each line.
func (l *lines) take(line []byte, now time.Time) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if now.Sub(l.window) >= time.Second {
		l.flush()
		l.window, l.first, l.new = now, 0, 0
	}
	if len(line) == 0 && l.first < linesFirst { // of a quiet line, nobody's news
		return
	}
	fresh := l.fresh(shapeOf(line), now)
	switch {
	case l.first < linesFirst:
		l.first++
		l.tell(event.Text(line))
	case fresh && l.new < linesNew:
		l.new++
		l.tell(event.Text(line))
	default:
		l.hold(line)
		l.waiting(int64(len(l.held)) + l.skipped)
	}
}

// hold keeps a line for the second's end, in place of the oldest.
func (l *lines) hold(line []byte) {
	if len(l.held) == linesLast {
		l.held = append(l.held[:0], l.held[1:]...)
		l.skipped++
	}
	l.held = append(l.held, string(line))
	if !l.armed {
		l.armed = true
		l.after(time.Second, func() {
			l.mu.Lock()
			defer l.mu.Unlock()
			l.armed = false
			l.flush()
		})
	}
}

// flush tells what is held.
func (l *lines) flush() {
	for _, line := range l.held {
		l.tell(event.Text([]byte(line)))
	}
	l.held = l.held[:0]
	l.waiting(l.skipped)
}

// end tells what is held: there will be no more.
func (l *lines) end() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.flush()
}

func (l *lines) tell(line string) {
	fields := event.Fields{"line": line}
	if l.skipped > 0 {
		fields["skipped"] = l.skipped
		l.skipped = 0
	}
	l.emit(event.ConsoleLine, fields)
}

// fresh says whether a shape is news, and remembers it.
func (l *lines) fresh(shape uint64, now time.Time) bool {
	if len(l.now) >= shapesMost || now.Sub(l.began) >= shapesLast {
		l.before, l.now, l.began = l.now, map[uint64]bool{}, now
	}
	known := l.now[shape] || l.before[shape]
	l.now[shape] = true
	return !known
}

// shapeOf is what lines have in common that differ in their numbers only: a counter makes no line new.
func shapeOf(line []byte) uint64 {
	h := fnv.New64a()
	digits := false
	for i, b := range line {
		if digit := b >= '0' && b <= '9'; digit {
			if !digits {
				h.Write([]byte{'0'})
			}
			digits = true
			continue
		}
		digits = false
		h.Write(line[i : i+1])
	}
	return h.Sum64()
}
