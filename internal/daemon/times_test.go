package daemon

import (
	"bytes"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"testing"
	"time"
)

func TestTimes(t *testing.T) {
	path := filepath.Join(t.TempDir(), "times")
	if _, err := readTimes(path); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("no file: %v", err)
	}
	begin := time.Unix(1_800_000_000, 0)
	var b bytes.Buffer
	for i, n := range []int64{0, 1000, 1000, 4000} {
		b.Write(mark{begin.Add(time.Duration(i) * 2 * time.Second), n}.row())
	}
	b.Write(mark{begin, 5000}.row())                      // the clock was set back
	b.Write(mark{begin.Add(8 * time.Second), 3000}.row()) // a count that goes back
	b.Write(mark{begin.Add(10 * time.Second), 5000}.row())
	b.WriteString("torn")
	if err := os.WriteFile(path, b.Bytes(), 0o600); err != nil {
		t.Fatal(err)
	}
	times, err := readTimes(path)
	if err != nil || len(times) != 5 {
		t.Fatalf("%v, %v", times, err)
	}
	for seconds, want := range map[float64]int64{0: 0, 1: 500, 2: 1000, 3: 1000, 5: 2500, 6: 4000, 8: 4500, 10: 5000} {
		if n, ok := times.instruction(begin.Add(time.Duration(seconds * float64(time.Second)))); !ok || n != want {
			t.Errorf("after %v s: %d, %v; want %d", seconds, n, ok, want)
		}
	}
	for _, seconds := range []int{-1, 11} {
		if n, ok := times.instruction(begin.Add(time.Duration(seconds) * time.Second)); ok {
			t.Errorf("after %d s: %d", seconds, n)
		}
	}
	for n, want := range map[int64]time.Duration{0: 0, 500: time.Second, 2500: 5 * time.Second, 5000: 10 * time.Second} {
		if at := times.when(n); !at.Equal(begin.Add(want)) {
			t.Errorf("instruction %d: %v after the begin, want %v", n, at.Sub(begin), want)
		}
	}
	if at := times.when(6000); !at.IsZero() {
		t.Errorf("instruction 6000, which was not noted: %v", at)
	}
	if err := os.Truncate(path, timesRow); err != nil {
		t.Fatal(err)
	}
	if _, err := readTimes(path); !errors.Is(err, errShort) {
		t.Errorf("one row: %v", err)
	}
}
