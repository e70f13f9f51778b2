package keeper

import (
	"errors"
	"io"
	"os"

	"golang.org/x/sys/unix"

	"vigia/internal/checkpoint/page"
)

// memory is a machine's RAM as a checkpoint reads it.
type memory struct {
	r     io.ReaderAt
	base  int64    // of page 0 in r
	file  *os.File // a file of exactly the RAM, whose holes are zeros; nil for a process's memory
	pages uint64
}

// read fills b with the pages from first on.
func (m *memory) read(first uint64, b []byte) error {
	n, err := m.r.ReadAt(b, m.base+int64(first)*page.Size)
	if n == len(b) {
		return nil
	}
	return err
}

// data returns the next pages at or after first that are not a hole; n is 0 where there are none.
func (m *memory) data(first uint64) (from, n uint64) {
	if first >= m.pages {
		return first, 0
	}
	if m.file == nil {
		return first, m.pages - first
	}
	at, err := m.file.Seek(int64(first)*page.Size, unix.SEEK_DATA)
	if errors.Is(err, unix.ENXIO) {
		return m.pages, 0
	}
	if err != nil { // a file system that does not know
		return first, m.pages - first
	}
	end, err := m.file.Seek(at, unix.SEEK_HOLE)
	if err != nil {
		return first, m.pages - first
	}
	from = uint64(at) / page.Size
	return from, min((uint64(end)+page.Size-1)/page.Size, m.pages) - from
}
