package link

import (
	"errors"
	"math"
	"os"
	"testing"

	"golang.org/x/sys/unix"

	"vigia/internal/event"
)

// TestTallyFollowsAnOutbox sees that at every instant the page says how many events would die with the process.
func TestTallyFollowsAnOutbox(t *testing.T) {
	f, err := NewTallyFile()
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	o := NewOutbox("web")
	page, err := OpenTally(f, o.Source())
	if err != nil {
		t.Fatal(err)
	}
	o.KeepTally(page)
	missing := func(want int64, when string) {
		t.Helper()
		source, c, err := ReadTally(f)
		if err != nil || source != o.Source() || c.Missing(0) != want {
			t.Errorf("%s: %d of %q are missing, want %d (%v)", when, c.Missing(0), source, want, err)
		}
	}
	missing(0, "at first")
	for range 10 {
		o.Emit(event.MachinePaused, nil)
	}
	missing(10, "after ten events")
	o.Ack(4)
	missing(6, "four of them are in the ledger")
	lines, flood := o.Holder(), o.Holder()
	lines(1)
	flood(2)
	missing(9, "three are held back before it")
	lines(0)
	flood(0)
	for range OutboxSize {
		o.Emit(event.MachinePaused, nil)
	}
	missing(6+OutboxSize, "it is full: what is dropped counts too")
	if _, c, _ := ReadTally(f); c.Missing(10) != OutboxSize {
		t.Errorf("ten were taken: %d are missing", c.Missing(10))
	}
}

// TestTallyIsNoStore tries to make the page hold more, or less, than it is for.
func TestTallyIsNoStore(t *testing.T) {
	f, err := NewTallyFile()
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if f.Truncate(1<<20) == nil || f.Truncate(0) == nil {
		t.Error("its size can be changed")
	}
	if n, err := f.WriteAt(make([]byte, 4096), TallySize); err == nil || n > 0 {
		t.Errorf("%d bytes were written behind its end", n)
	}
	if _, err := unix.FcntlInt(f.Fd(), unix.F_ADD_SEALS, unix.F_SEAL_WRITE); err == nil {
		t.Error("it can be sealed against its own process")
	}
}

// TestHostileTally is what a worker that was taken over may hand out for a tally.
func TestHostileTally(t *testing.T) {
	pr, pw, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer pw.Close()
	long, err := os.CreateTemp(t.TempDir(), "")
	if err != nil {
		t.Fatal(err)
	}
	long.Truncate(1 << 40)
	dir, err := os.Open(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	for name, f := range map[string]*os.File{"a pipe": pr, "a large file": long, "a directory": dir, "nothing": nil} {
		if _, _, err := ReadTally(f); !errors.Is(err, ErrTally) {
			t.Errorf("%s is read: %v", name, err)
		}
		f.Close()
	}
	const all = math.MaxUint64
	for _, c := range []Count{{all, 0, 0}, {0, all, 0}, {0, 0, all}, {all, 0, all}, {all, all, all}} {
		if n := c.Missing(7); n < 0 || n > 1<<53 {
			t.Errorf("%v: %d are missing", c, n)
		}
	}
}
