package memory

import "fmt"

// Region is a run of guest-physical addresses and where its bytes lie in the RAM file (or, in a process, after the
// address at which that file is mapped).
type Region struct {
	Phys   uint64 // first guest-physical address
	Size   uint64 // bytes
	Offset uint64 // of the first byte in the RAM file
}

const (
	gib = 1 << 30

	// q35 keeps PCIe's configuration window and devices from 0xb0000000 up. With more RAM than fits below it, the
	// split moves down to 2 GiB, so that what lies above is aligned to 1 GiB pages (pc_q35.c: pc_q35_init).
	q35Edge  = 0xb0000000
	q35Split = 0x80000000

	// microvm keeps the last GiB below 4 GiB for devices (microvm.c: microvm_memory_init).
	microVMSplit = 0xc0000000

	maxRegions = 16
)

// Q35Layout is where QEMU's q35 machine puts ramBytes of RAM.
func Q35Layout(ramBytes uint64) []Region {
	if ramBytes < q35Edge {
		return []Region{{Size: ramBytes}}
	}
	return split(ramBytes, q35Split)
}

// MicroVMLayout is where QEMU's microvm machine puts ramBytes of RAM.
func MicroVMLayout(ramBytes uint64) []Region {
	if ramBytes <= microVMSplit {
		return []Region{{Size: ramBytes}}
	}
	return split(ramBytes, microVMSplit)
}

func split(ramBytes, below uint64) []Region {
	return []Region{{Size: below}, {Phys: 4 * gib, Size: ramBytes - below, Offset: below}}
}

// checkLayout refuses regions that are empty, wrap, overlap or reach beyond size bytes of file.
func checkLayout(layout []Region, size uint64) error {
	if len(layout) == 0 || len(layout) > maxRegions {
		return fmt.Errorf("%w: %d regions", ErrLayout, len(layout))
	}
	for i, r := range layout {
		if r.Size == 0 || r.Phys+r.Size < r.Phys || r.Offset+r.Size < r.Offset || r.Offset+r.Size > size {
			return fmt.Errorf("%w: region %d: %#x bytes at %#x, offset %#x, in %#x bytes of RAM", ErrLayout, i, r.Size, r.Phys, r.Offset, size)
		}
		for _, q := range layout[:i] {
			if r.Phys < q.Phys+q.Size && q.Phys < r.Phys+r.Size {
				return fmt.Errorf("%w: region %d overlaps another at %#x", ErrLayout, i, r.Phys)
			}
		}
	}
	return nil
}

// locate returns the file offset of n bytes at pa, all within one region.
func locate(layout []Region, pa uint64, n int) (uint64, bool) {
	for i := range layout {
		r := &layout[i]
		if off := pa - r.Phys; off < r.Size && uint64(n) <= r.Size-off {
			return r.Offset + off, true
		}
	}
	return 0, false
}
