package guard

import (
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"vigia/internal/event"
)

// told runs lines on a clock of their own.
type told struct {
	*lines
	now    time.Time
	heard  []string
	counts int64
	due    func()
}

func tellTo(t *testing.T) *told {
	o := &told{now: time.Unix(1000, 0)}
	o.lines = newLines(func(_ event.Kind, f event.Fields) {
		o.heard = append(o.heard, f["line"].(string))
		n, _ := f["skipped"].(int64)
		o.counts += n
	})
	o.after = func(_ time.Duration, f func()) { o.due = f }
	return o
}

func (o *told) say(line string) { o.take([]byte(line), o.now) }

// pass lets a second pass.
func (o *told) pass() {
	o.now = o.now.Add(time.Second)
	if f := o.due; f != nil {
		o.due = nil
		f()
	}
}

// TestAFloodHidesNoLine has a guest write the same, with a counter in it, by the thousand: a line unlike it in its midst is
// told, the flood's beginning and end are, and the rest is a number.
func TestAFloodHidesNoLine(t *testing.T) {
	o := tellTo(t)
	const seconds, each = 30, 5000
	for second := range seconds {
		for i := range each {
			o.say(fmt.Sprintf("%d: audit: backlog limit exceeded %d", second, i))
			if i == each/2 {
				o.say(fmt.Sprintf("evil-%c begins", 'a'+second%26))
			}
		}
		o.pass()
	}
	if n := len(o.heard); n > seconds*linesPerSec {
		t.Errorf("%d lines were told in %d seconds", n, seconds)
	}
	for second := range 26 {
		if want := fmt.Sprintf("evil-%c begins", 'a'+second); !slices.Contains(o.heard, want) {
			t.Errorf("%q is not told", want)
		}
		if want := fmt.Sprintf("%d: audit: backlog limit exceeded %d", second, each-1); !slices.Contains(o.heard, want) {
			t.Errorf("the last line of second %d is not told", second)
		}
	}
	if total := int64(len(o.heard)) + o.counts; total != seconds*(each+1) {
		t.Errorf("%d lines told and %d counted, of %d", len(o.heard), o.counts, seconds*(each+1))
	}
}

// TestNewLinesWithoutEnd has a guest make every line new: the bound holds, and memory does.
func TestNewLinesWithoutEnd(t *testing.T) {
	o := tellTo(t)
	for i := range 100_000 {
		var word strings.Builder
		for n := i; n > 0; n /= 16 {
			word.WriteByte(byte('a' + n%16))
		}
		o.say(word.String())
		if i%10_000 == 9_999 {
			o.pass()
		}
	}
	if n := len(o.heard); n > 10*linesPerSec {
		t.Errorf("%d lines were told in 10 seconds", n)
	}
	if len(o.lines.now)+len(o.lines.before) > 2*shapesMost {
		t.Errorf("%d shapes are remembered", len(o.lines.now)+len(o.lines.before))
	}
}

// TestQuietLines are told as they come, in order; empty ones are nobody's news.
func TestQuietLines(t *testing.T) {
	o := tellTo(t)
	var want []string
	for i := range 50 {
		line := fmt.Sprintf("tick %d", i)
		o.say(line)
		o.say("")
		want = append(want, line)
		o.now = o.now.Add(200 * time.Millisecond)
	}
	if !slices.Equal(o.heard, want) || o.counts != 0 {
		t.Errorf("%d skipped, told: %v", o.counts, o.heard)
	}
	o.say("\x1b[2Jafter")
	if last := o.heard[len(o.heard)-1]; last != `\x1b[2Jafter` {
		t.Errorf("%q", last)
	}
}
