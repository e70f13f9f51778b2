package memory

import (
	"fmt"
	"os"
	"runtime/debug"
	"slices"

	"golang.org/x/sys/unix"
)

// RAM is a guest's memory in a shared file, mapped read-only.
type RAM struct {
	layout []Region
	data   []byte
	file   *os.File
	sealed bool // the file cannot shrink, so no read can fault
}

// Map maps the RAM file. It keeps f for PeekPhys, and closes it with itself. The file must hold the whole layout;
// should it be cut short later, reads fail with ErrNoRAM instead of killing the process.
func Map(f *os.File, layout []Region) (*RAM, error) {
	st, err := f.Stat()
	if err != nil {
		return nil, fmt.Errorf("map RAM: %w", err)
	}
	size := uint64(0)
	for _, r := range layout {
		size = max(size, r.Offset+r.Size)
	}
	if err := checkLayout(layout, uint64(st.Size())); err != nil {
		return nil, fmt.Errorf("map RAM: %w", err)
	}
	data, err := unix.Mmap(int(f.Fd()), 0, int(size), unix.PROT_READ, unix.MAP_SHARED|unix.MAP_NORESERVE)
	if err != nil {
		return nil, fmt.Errorf("map RAM: %w", err)
	}
	seals, err := unix.FcntlInt(f.Fd(), unix.F_GET_SEALS, 0)
	return &RAM{layout: slices.Clone(layout), data: data, file: f, sealed: err == nil && seals&unix.F_SEAL_SHRINK != 0}, nil
}

// Close ends the mapping. No read may be under way.
func (r *RAM) Close() error {
	if r.data == nil {
		return nil
	}
	err := unix.Munmap(r.data)
	r.data, r.layout = nil, nil
	if cerr := r.file.Close(); err == nil {
		err = cerr
	}
	return err
}

// Trim takes the pages that were looked at off this process's account. They are the guest's, and come back when they are looked
// at again.
func (r *RAM) Trim() {
	if len(r.data) > 0 {
		_ = unix.Madvise(r.data, unix.MADV_DONTNEED)
	}
}

// Regions returns the layout.
func (r *RAM) Regions() []Region { return slices.Clone(r.layout) }

// ReadPhys copies guest-physical memory at pa into b.
func (r *RAM) ReadPhys(pa uint64, b []byte) error {
	off, ok := locate(r.layout, pa, len(b))
	if !ok {
		return ErrNoRAM
	}
	if r.sealed {
		copy(b, r.data[off:])
		return nil
	}
	return r.copyGuarded(b, off)
}

// copyGuarded copies while a fault (SIGBUS: the file was truncated under the mapping) is a panic that can be caught.
func (r *RAM) copyGuarded(b []byte, off uint64) (err error) {
	old := debug.SetPanicOnFault(true)
	defer func() {
		debug.SetPanicOnFault(old)
		if x := recover(); x != nil {
			if _, fault := x.(interface{ Addr() uintptr }); !fault {
				panic(x)
			}
			err = ErrNoRAM
		}
	}()
	copy(b, r.data[off:])
	return nil
}

// PeekPhys reads through the descriptor: a page that was never touched reads as zeros and stays absent.
func (r *RAM) PeekPhys(pa uint64, b []byte) error {
	off, ok := locate(r.layout, pa, len(b))
	if !ok {
		return ErrNoRAM
	}
	if n, _ := r.file.ReadAt(b, int64(off)); n != len(b) {
		return ErrNoRAM
	}
	return nil
}
