package daemon

import (
	"testing"
	"time"

	"vigia/internal/checkpoint"
)

// TestSparesAreNobodysForLong: how many there are, of what, and until when.
func TestSparesAreNobodysForLong(t *testing.T) {
	now := time.Unix(1000, 0)
	s := spares{most: 2, waits: func(*launch) bool { return true }}
	made := func() *launch { return &launch{} }
	if _, _, ok := s.next(now); ok {
		t.Error("one is made though nobody has cloned")
	}
	ask := func(id checkpoint.ID, given, over int) {
		t.Helper()
		l, rest := s.want(id, now)
		if (l != nil) != (given > 0) || len(rest) != over {
			t.Errorf("clone of %s: given %v, %d given up; %d and %d were expected", id, l != nil, len(rest), given, over)
		}
	}
	fill := func() (n int) {
		for {
			_, epoch, ok := s.next(now)
			if !ok {
				return n
			}
			if !s.put(made(), epoch) {
				t.Fatal("a spare is refused")
			}
			n++
		}
	}
	ask("a", 0, 0)
	if n := fill(); n != 0 {
		t.Errorf("%d made while clones are being asked for", n)
	}
	now = now.Add(spareRest)
	if n := fill(); n != 2 {
		t.Errorf("%d made, 2 are allowed", n)
	}
	ask("a", 1, 0)
	ask("b", 0, 1)
	now = now.Add(spareRest)
	of, epoch, ok := s.next(now)
	if !ok || of != "b" {
		t.Fatalf("next: %q, %v", of, ok)
	}
	if _, _, again := s.next(now); again {
		t.Error("two are made at once")
	}
	s.drop("")
	if s.put(made(), epoch) {
		t.Error("one that was begun before the rules changed is kept")
	}
	fill()
	if gone := s.drop("a"); len(gone) != 0 {
		t.Error("another checkpoint's removal takes spares away")
	}
	if gone := s.forgotten(now.Add(spareIdle - spareRest)); gone != nil {
		t.Error("given up too soon")
	}
	if gone := s.forgotten(now.Add(spareIdle + 2*spareRest)); len(gone) != 2 {
		t.Errorf("%d given up after long", len(gone))
	}
	if fill() != 0 {
		t.Error("made again though nobody has cloned since")
	}
	ask("b", 0, 0)
	now = now.Add(spareRest)
	_, epoch, _ = s.next(now)
	s.put(nil, epoch)
	if fill() != 0 {
		t.Error("one that could not be made is tried again and again")
	}
}
