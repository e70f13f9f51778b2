package link

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"sync/atomic"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Count is what one life of a process owes the ledger. Given is the number of its newest event, Kept that of the newest
// which it knows to be in the ledger; Untold counts what has no number yet: events held back to be joined with others, or
// dropped and not told of.
type Count struct{ Given, Kept, Untold uint64 }

// Tally is a page in which a process keeps its Count up to date, so that its sudden end hides nothing: the memory is
// shared with whoever is to read it afterwards, and kill -9 does not undo a store.
//
//	0  16  source of its events' ids
//	16  8  given
//	24  8  kept
//	32  8  untold    (all of the host's byte order: it never leaves the host)
//
// Whoever reads it believes nothing but that these are numbers.
type Tally struct{ page []byte }

// TallySize is the size of a Tally's file in bytes, which never changes.
const TallySize = 40

// ErrTally is returned where a Tally can't be read: what its process had not told can't be known.
var ErrTally = errors.New("no count of its events")

// NewTallyFile makes the memory of a Tally for a worker. Its size is sealed: it can't be made a store of anything else.
func NewTallyFile() (*os.File, error) {
	fd, err := unix.MemfdCreate("tally", unix.MFD_CLOEXEC|unix.MFD_ALLOW_SEALING)
	if err != nil {
		return nil, fmt.Errorf("tally: %w", err)
	}
	f := os.NewFile(uintptr(fd), "tally")
	err = f.Truncate(TallySize)
	if err == nil {
		_, err = unix.FcntlInt(f.Fd(), unix.F_ADD_SEALS, unix.F_SEAL_GROW|unix.F_SEAL_SHRINK|unix.F_SEAL_SEAL)
	}
	if err != nil {
		f.Close()
		return nil, fmt.Errorf("tally: %w", err)
	}
	return f, nil
}

// OpenTally begins to keep the count of one life in a file of TallySize bytes. The file may be closed afterwards.
func OpenTally(f *os.File, source string) (*Tally, error) {
	page, err := unix.Mmap(int(f.Fd()), 0, TallySize, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		return nil, fmt.Errorf("tally: %w", err)
	}
	t := &Tally{page: page}
	t.Set(Count{})
	copy(page[:16], source)
	return t, nil
}

// Set notes a count; a nil Tally notes nothing. It never blocks.
func (t *Tally) Set(c Count) {
	if t == nil {
		return
	}
	for i, n := range [...]uint64{c.Given, c.Kept, c.Untold} {
		atomic.StoreUint64((*uint64)(unsafe.Pointer(&t.page[16+8*i])), n)
	}
}

// ReadTally reads what a process left in its Tally's file.
func ReadTally(f *os.File) (source string, c Count, err error) {
	info, err := f.Stat()
	if err != nil {
		return "", c, fmt.Errorf("%w: %w", ErrTally, err)
	}
	if !info.Mode().IsRegular() || info.Size() != TallySize { // a pipe would hold the reader up
		return "", c, fmt.Errorf("%w: not a tally", ErrTally)
	}
	var page [TallySize]byte
	if _, err := f.ReadAt(page[:], 0); err != nil {
		return "", c, fmt.Errorf("%w: %w", ErrTally, err)
	}
	number := func(i int) uint64 { return binary.NativeEndian.Uint64(page[16+8*i:]) }
	return string(page[:16]), Count{number(0), number(1), number(2)}, nil
}

// Missing is how many events are in no ledger, given the highest number that was taken of them; at most what an event's
// field can hold.
func (c Count) Missing(taken uint64) int64 {
	n := c.Untold
	if known := max(taken, c.Kept); c.Given > known {
		n += c.Given - known
	}
	const most = 1 << 53 // a JSON number keeps it whole
	if n > most || n < c.Untold {
		return most
	}
	return int64(n)
}
