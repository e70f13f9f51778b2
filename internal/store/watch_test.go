package store

import (
	"context"
	"errors"
	"path/filepath"
	"sync"
	"testing"
)

func TestWatch(t *testing.T) {
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	s := open(t, filepath.Join(t.TempDir(), "store"))
	rev, err := Put(ctx, s, "machines/a", machine{"a", 1})
	if err != nil {
		t.Fatal(err)
	}
	Put(ctx, s, "machines/b", machine{"b", 2})
	Put(ctx, s, "images/x", machine{"x", 2})
	s.Delete(ctx, "machines/a")
	changes := Watch[machine](ctx, s, "machines/", rev)
	for i, want := range []Change[machine]{
		{Item: Item[machine]{Key: "machines/a", Value: machine{"a", 1}}},
		{Item: Item[machine]{Key: "machines/b", Value: machine{"b", 2}}},
		{Item: Item[machine]{Key: "machines/a"}, Deleted: true},
	} {
		got := <-changes
		if got.Err != nil || got.Key != want.Key || got.Value != want.Value || got.Deleted != want.Deleted || got.Revision < rev {
			t.Errorf("change %d: %+v, want %+v", i, got, want)
		}
	}
	cancel()
	for range changes {
	}
}

func TestWatchEndsWithTheStore(t *testing.T) {
	s := open(t, filepath.Join(t.TempDir(), "store"))
	changes := Watch[machine](context.Background(), s, "", 0)
	s.Close()
	for range changes {
	}
}

// What is no longer kept can't be watched from: the watcher is told, and lists again.
func TestWatchOfCompactedRevision(t *testing.T) {
	ctx := context.Background()
	s := open(t, filepath.Join(t.TempDir(), "store"))
	var rev int64
	for range 5 {
		rev, _ = Put(ctx, s, "a", 1)
	}
	if _, err := s.client.Compact(ctx, rev); err != nil {
		t.Fatal(err)
	}
	told := false
	for c := range Watch[int](ctx, s, "", 2) {
		told = told || c.Err != nil
	}
	if !told {
		t.Error("not told")
	}
}

// Many change one value at once: every change counts.
func TestModifyLosesNoUpdate(t *testing.T) {
	ctx := context.Background()
	s := open(t, filepath.Join(t.TempDir(), "store"))
	if _, err := Create(ctx, s, "n", 0); err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	for range 8 {
		wg.Go(func() {
			for range 10 {
				if _, err := Modify(ctx, s, "n", func(n *int) error { *n++; return nil }); err != nil {
					t.Error(err)
				}
			}
		})
	}
	wg.Wait()
	if it, err := Get[int](ctx, s, "n"); err != nil || it.Value != 80 {
		t.Errorf("%d, %v", it.Value, err)
	}
	stop := errors.New("stop")
	if _, err := Modify(ctx, s, "n", func(n *int) error { *n = 0; return stop }); !errors.Is(err, stop) {
		t.Error(err)
	}
	if it, _ := Get[int](ctx, s, "n"); it.Value != 80 {
		t.Error("a change that failed was written")
	}
	if err := s.DeleteAt(ctx, "n", 1); !errors.Is(err, ErrConflict) {
		t.Error(err)
	}
}

func FuzzDecode(f *testing.F) {
	text, _ := encode(machine{"web", 1})
	f.Add([]byte(text))
	f.Add([]byte("1 00000000 "))
	f.Fuzz(func(t *testing.T, raw []byte) {
		var m machine
		if err := decode(raw, &m); err != nil && !errors.Is(err, ErrCorrupt) {
			t.Fatal(err)
		}
	})
}

func BenchmarkPut(b *testing.B) {
	s := open(b, filepath.Join(b.TempDir(), "store"))
	for b.Loop() {
		if _, err := Put(context.Background(), s, "machines/web", machine{"web", 1}); err != nil {
			b.Fatal(err)
		}
	}
}
