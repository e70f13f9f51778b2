package memory

import (
	"fmt"
	"io"
	"slices"
	"sync"
)

// Process is a guest's memory inside its QEMU, read through a descriptor of /proc/PID/mem: for clones, whose RAM is a
// private mapping that nobody else can map. A read costs about a microsecond, so that views read it through a window.
type Process struct {
	layout []Region
	mem    io.ReaderAt
	base   uint64

	mu   sync.Mutex
	kept *keptPages // for the next window
}

// NewProcess reads RAM through mem, the opened /proc/PID/mem, where base is the host virtual address at which QEMU has
// mapped the RAM. Whoever holds mem closes it.
func NewProcess(mem io.ReaderAt, base uint64, layout []Region) (*Process, error) {
	const hostTop = 1 << 47 // user addresses end there; also keeps base+offset within int64
	if base >= hostTop {
		return nil, fmt.Errorf("%w: RAM at host address %#x", ErrLayout, base)
	}
	if err := checkLayout(layout, hostTop-base); err != nil {
		return nil, err
	}
	return &Process{layout: slices.Clone(layout), mem: mem, base: base}, nil
}

// Regions returns the layout.
func (p *Process) Regions() []Region { return slices.Clone(p.layout) }

// ReadPhys copies guest-physical memory at pa into b.
func (p *Process) ReadPhys(pa uint64, b []byte) error {
	off, ok := locate(p.layout, pa, len(b))
	if !ok {
		return ErrNoRAM
	}
	if n, _ := p.mem.ReadAt(b, int64(p.base+off)); n != len(b) {
		return ErrNoRAM
	}
	return nil
}
