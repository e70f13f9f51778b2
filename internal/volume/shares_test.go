package volume

import (
	"bytes"
	"os"
	"testing"
)

// TestSharedIsTheSame: what is said to be shared is the same, and what was written to is not said to be.
func TestSharedIsTheSame(t *testing.T) {
	v := freshVolume(t, 4<<20)
	base := v.top.f.(*osFile).File
	if _, err := v.WriteAt(bytes.Repeat([]byte{1}, 1<<20), 0); err != nil {
		t.Fatal(err)
	}
	n := next(t, v)
	_, done, err := v.Swap(n)
	if err != nil {
		t.Fatal(err)
	}
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	if _, err := v.WriteAt([]byte{2}, 5*BlockSize+7); err != nil {
		t.Fatal(err)
	}
	old, err := Open(reopened(t, []*os.File{base}), nil, Options{})
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		off, n int64
		want   bool
	}{{0, 5 * BlockSize, true}, {6 * BlockSize, 1 << 20, true}, {5 * BlockSize, 1, false}, {0, 4 << 20, false}, {2 << 20, 2 << 20, true}, {-1, 5, false}, {4 << 20, 1, false}, {100, 0, true}} {
		if got := v.Shares(old, c.off, c.n); got != c.want || old.Shares(v, c.off, c.n) != c.want {
			t.Errorf("%d bytes at %d: %v", c.n, c.off, got)
		}
	}
}
