package ledger

import (
	"context"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"testing"
	"time"
)

// clock is a clock for heads that steps a second a look.
func clock() func() time.Time {
	at := time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)
	return func() time.Time { at = at.Add(time.Second); return at }
}

func open(t testing.TB, dir string) *Log {
	t.Helper()
	l, err := Open(context.Background(), dir, Options{Origin: "vigia/test", Now: clock()})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close(context.Background()) })
	return l
}

func entries(from, n int) [][]byte {
	var all [][]byte
	for i := from; i < from+n; i++ {
		all = append(all, fmt.Appendf(nil, `{"id":"test-%016x","kind":"cpu.usage","fields":{"percent":%d}}`, i, i%100))
	}
	return all
}

func appendAll(t testing.TB, l *Log, all [][]byte) {
	t.Helper()
	if _, err := l.AppendAll(context.Background(), all); err != nil {
		t.Fatal(err)
	}
}

func shut(t testing.TB, l *Log) {
	t.Helper()
	if err := l.Close(context.Background()); err != nil {
		t.Fatal(err)
	}
}

// made makes a closed ledger of n entries written in batches of the given sizes.
func made(t testing.TB, batches ...int) (dir, vkey string) {
	t.Helper()
	dir = filepath.Join(t.TempDir(), "ledger")
	l := open(t, dir)
	at := 0
	for _, n := range batches {
		appendAll(t, l, entries(at, n))
		at += n
	}
	shut(t, l)
	return dir, l.Key()
}

func copyDir(t testing.TB, from string) string {
	t.Helper()
	to := filepath.Join(t.TempDir(), "copy")
	if err := os.CopyFS(to, os.DirFS(from)); err != nil {
		t.Fatal(err)
	}
	os.Chmod(filepath.Join(to, keyFile), 0o600)
	return to
}

func verify(dir, vkey string) error {
	_, err := Verify(context.Background(), dir, vkey, VerifyOptions{})
	return err
}

func filesIn(t testing.TB, dir string) (names []string) {
	t.Helper()
	filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err == nil && !d.IsDir() {
			rel, _ := filepath.Rel(dir, path)
			names = append(names, rel)
		}
		return err
	})
	return names
}

func TestAppendReadVerify(t *testing.T) {
	ctx := context.Background()
	dir := filepath.Join(t.TempDir(), "ledger")
	l := open(t, dir)
	if h := l.Head(); h.Size != 0 || h.Time.IsZero() {
		t.Fatalf("head of a new ledger: %+v", h)
	}
	for i, e := range entries(0, 3) {
		if at, err := l.Append(ctx, e); err != nil || at != uint64(i) {
			t.Fatalf("append %d: %d, %v", i, at, err)
		}
	}
	appendAll(t, l, entries(3, 700))
	appendAll(t, l, entries(703, 2500)) // more than one batch
	shut(t, l)

	l = open(t, dir)
	if n := l.Head().Size; n != 3203 {
		t.Fatalf("size after reopening: %d", n)
	}
	at := uint64(0)
	want := entries(0, 3203)
	for e, err := range l.Read(ctx, 0, 1<<40) {
		if err != nil || e.Index != at || string(e.Data) != string(want[at]) {
			t.Fatalf("entry %d: %d %q %v", at, e.Index, e.Data, err)
		}
		at++
	}
	if at != 3203 {
		t.Fatalf("read %d entries", at)
	}
	tail, err := l.Tail(ctx, 300)
	if err != nil || len(tail) != 300 || tail[0].Index != 2903 {
		t.Fatalf("tail: %d, %v", len(tail), err)
	}
	r, err := Verify(ctx, dir, l.Key(), VerifyOptions{}) // while it is open
	if err != nil || r.Size != 3203 {
		t.Fatalf("verify: %+v, %v", r, err)
	}
}
