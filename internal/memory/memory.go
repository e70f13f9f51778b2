// Package memory reads a guest's memory from outside: physical bytes first, then virtual ones.
//
// # Physical
//
// A guest-physical address is what the guest's page tables yield. [Physical] is the one thing this package's users
// need of it. It has two implementations:
//
//   - [RAM]: the shared file behind QEMU's memory backend (memory-backend-file or -memfd, share=on), mapped read-only;
//   - [Process]: the RAM of a QEMU whose backend is private (a clone), through a descriptor of its /proc/PID/mem.
//
// Offset in the RAM file and physical address part company where the machine type leaves a hole below 4 GiB for
// devices, so both take a layout: a list of [Region]. [Q35Layout] and [MicroVMLayout] are what `info mtree -f` of
// QEMU 7.2 shows.
//
// Reading never stops the guest: bytes may change between two reads and within a long one. An aligned load of 1, 2, 4
// or 8 bytes is whole. Whoever follows pointers must expect any of them to be wild.
//
// # Virtual
//
// A [Space] is one set of x86-64 page tables: the physical address of the root and how many levels it has (4, or 5
// under LA57). It translates as the processor does, and keeps the last translations until Flush. Everything it reads
// is hostile: each step is a bounded look-up of 8 bytes, so a table that points at itself costs at most five reads.
//
//	ram, err := memory.Map(f, memory.Q35Layout(256<<20))
//	space := memory.NewSpace(ram, cr3, 4)
//	next, err := space.U64(initTask + tasksOffset)
//
// Sources: Intel SDM volume 3, chapter 5 (paging); QEMU hw/i386/pc_q35.c and hw/i386/microvm.c (the split).
package memory

import "errors"

// Physical reads guest-physical memory. It fills b whole or returns an error; it is safe for concurrent use.
type Physical interface {
	ReadPhys(pa uint64, b []byte) error
}

// Peeker is a Physical that can also read without making an absent page of the RAM file present. A search through all
// of RAM uses it where it can: touching a hole of a shared mapping would allocate a host page for it.
type Peeker interface {
	PeekPhys(pa uint64, b []byte) error
}

// Sized is a Physical that knows where its RAM lies.
type Sized interface {
	Regions() []Region
}

// Errors of reading. Every one of them is an answer about the guest, none is fatal.
var (
	// ErrNoRAM: the physical address is not RAM, or the RAM file has been cut short.
	ErrNoRAM = errors.New("no guest memory there")
	// ErrAbsent: the page tables map nothing at the virtual address.
	ErrAbsent = errors.New("page not present")
	// ErrBadAddress: the virtual address is not canonical.
	ErrBadAddress = errors.New("address not canonical")
	// ErrTables: a range of addresses is mapped by more tables than any real one.
	ErrTables = errors.New("too many page tables")
	// ErrLayout: the regions do not fit the file.
	ErrLayout = errors.New("memory layout does not fit")
	// ErrTooLong: a string has no end within its cap.
	ErrTooLong = errors.New("text has no end")
)
