package ledger

import (
	"bytes"
	"fmt"
	"io"
	"os"
	"path/filepath"

	"golang.org/x/mod/sumdb/note"
)

const headsName = "heads"

// headsLimit is the size of the list of heads at which it is thinned. Every head in it is valid for ever, so leaving
// some out takes nothing from the others.
const headsLimit = 4 << 20

// headsFile is the list of signed heads, oldest first, one after the other.
type headsFile struct {
	path string
	f    *os.File
	size int64
}

func openHeads(dir string) (*headsFile, error) {
	path := filepath.Join(dir, headsName)
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE|os.O_APPEND, 0o644)
	if err != nil {
		return nil, err
	}
	size, err := f.Seek(0, io.SeekEnd)
	if err != nil {
		f.Close()
		return nil, err
	}
	return &headsFile{path: path, f: f, size: size}, nil
}

func (h *headsFile) close() { h.f.Close() }

func (h *headsFile) append(head Head) error {
	if h.size+int64(len(head.Note)) > headsLimit {
		if err := h.thin(); err != nil {
			return fmt.Errorf("thin the list of heads: %w", err)
		}
	}
	n, err := h.f.WriteString(head.Note)
	if err == nil {
		err = h.f.Sync()
	}
	if err != nil {
		h.f.Truncate(h.size)
		return fmt.Errorf("note the new head: %w", err)
	}
	h.size += int64(n)
	return nil
}

// truncate cuts the list to its first size bytes.
func (h *headsFile) truncate(size int64) error {
	if err := h.f.Truncate(size); err != nil {
		return err
	}
	h.size = size
	return h.f.Sync()
}

// thin drops every second head of the older three quarters.
func (h *headsFile) thin() error {
	b, err := os.ReadFile(h.path)
	if err != nil {
		return err
	}
	texts, _ := splitHeads(b)
	var kept []byte
	for i, text := range texts {
		if i < len(texts)*3/4 && i%2 == 1 {
			continue
		}
		kept = append(kept, text...)
	}
	if err := writeFile(h.path, kept, 0o644); err != nil {
		return err
	}
	f, err := os.OpenFile(h.path, os.O_RDWR|os.O_APPEND, 0)
	if err != nil {
		return err
	}
	h.f.Close()
	h.f, h.size = f, int64(len(kept))
	return nil
}

// splitHeads cuts a list of heads into single ones; rest is what follows the last complete one.
func splitHeads(b []byte) (texts [][]byte, rest []byte) {
	for {
		end := 0
		for range headLines {
			i := bytes.IndexByte(b[end:], '\n')
			if i < 0 {
				return texts, b
			}
			end += i + 1
		}
		texts = append(texts, b[:end])
		b = b[end:]
	}
}

// parseHeads checks every head of the list and that they grow.
func parseHeads(b []byte, verifier note.Verifier) (heads []Head, rest []byte, err error) {
	texts, rest := splitHeads(b)
	for i, text := range texts {
		h, err := parseHead(text, verifier)
		if err != nil {
			return nil, nil, fmt.Errorf("head %d of the list: %w", i, err)
		}
		if i > 0 && h.Size <= heads[i-1].Size {
			return nil, nil, fmt.Errorf("%w: head %d of the list is not larger than the one before it", ErrForked, i)
		}
		heads = append(heads, h)
	}
	return heads, rest, nil
}
