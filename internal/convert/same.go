package convert

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"os"
	"slices"
)

// Difference is where two disks begin to differ, in bytes; -1 where they do not.
type Difference struct {
	At int64 `json:"at"`
}

// sameChunk is read of each disk at a time.
const sameChunk = 1 << 20

// sameDisks answers whether two disks, each a chain with an overlay on top, hold the same.
func sameDisks(text string, file func(n int) *os.File) (Difference, error) {
	var q comparison
	if err := json.Unmarshal([]byte(text), &q); err != nil {
		return Difference{}, err
	}
	if err := q.check(); err != nil {
		return Difference{}, err
	}
	a, err := openDisk(q.Then, true, file)
	if err != nil {
		return Difference{}, err
	}
	defer a.Close()
	b, err := openDisk(q.Now, true, func(n int) *os.File { return file(q.Then + n) })
	if err != nil {
		return Difference{}, err
	}
	defer b.Close()
	if a.Size() != b.Size() {
		return Difference{At: min(a.Size(), b.Size())}, nil
	}
	x, y := make([]byte, sameChunk), make([]byte, sameChunk)
	for off := int64(0); off < a.Size(); off += sameChunk {
		n := min(sameChunk, a.Size()-off)
		if _, err := a.ReadAt(x[:n], off); err != nil {
			return Difference{}, err
		}
		if _, err := b.ReadAt(y[:n], off); err != nil {
			return Difference{}, err
		}
		if !bytes.Equal(x[:n], y[:n]) {
			for i := range n {
				if x[i] != y[i] {
					return Difference{At: off + i}, nil
				}
			}
		}
	}
	return Difference{At: -1}, nil
}

// Same tells where two disks begin to differ. Each is a chain of frozen layers, the lowest first, and an overlay on it, open for
// reading and writing.
func (w Worker) Same(ctx context.Context, a []*os.File, overA *os.File, b []*os.File, overB *os.File) (d Difference, err error) {
	text, err := json.Marshal(comparison{Then: len(a) + 1, Now: len(b) + 1})
	if err != nil {
		return d, err
	}
	err = w.ask(ctx, &d, []string{"same", string(text)}, slices.Concat(a, []*os.File{overA}, b, []*os.File{overB})...)
	if err != nil {
		return d, fmt.Errorf("compare two disks: %w", err)
	}
	return d, nil
}
