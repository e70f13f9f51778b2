// Package kernel learns what a guest's kernel is from the kernel file alone: where its symbols are, how its types are
// laid out, what its banner says.
//
// A Linux kernel built as distributions build it carries two tables for its own use: kallsyms (every symbol, compressed)
// and BTF (every type). Both lie in the vmlinux inside the bzImage, so the file that boots the guest is a complete
// introspection profile: no debug symbols, no agent, nothing taken from guest memory, where an intruder could lie.
//
//	profile, err := kernel.Build(file, size)      // once per kernel file: some 150 ms of CPU
//	err = profile.Encode(w)                       // a flat file
//	profile, err = kernel.Open(cached)            // maps it: well under a millisecond
//	addr, err := profile.Symbol("init_task")
//	field, err := profile.Field("task_struct", "se.sum_exec_runtime")
//
// # How it is found
//
// A bzImage's setup header gives offset and length of the compressed payload (boot protocol 2.08). The payload is an ELF
// file with its section table, hence ".BTF"; without one the symbols __start_BTF and __stop_BTF delimit it. The table
// of kallsyms has no section of its own. It is found by its token table, which holds the ten digits in a row as
// "0\0" "1\0" … "9\0", and read outwards from there; see kallsyms.go.
//
// # The profile
//
// A Profile is one block of bytes in the format of doc/profile-format.md: sorted tables that are searched in place, so
// that a mapped profile costs only the pages that are looked at. Build makes exactly these bytes; there is no other
// form in memory.
//
// The kernel file may come from a guest's own disk, and a cached profile may be damaged: both are hostile. Sizes are
// capped first, every index is checked, and errors are the ones below.
//
// Sources: Documentation/arch/x86/boot.rst, scripts/kallsyms.c, kernel/kallsyms.c, Documentation/bpf/btf.rst.
package kernel

import (
	"errors"
	"fmt"
)

// Limits of what is read. A distribution kernel is some 15 MB packed, 70 MB unpacked, with 200,000 symbols.
const (
	maxImage    = 512 << 20 // the kernel file
	maxPayload  = 128 << 20 // its compressed payload
	maxVmlinux  = 256 << 20 // unpacked
	maxSymbols  = 1 << 20
	maxTypes    = 1 << 20
	maxFields   = 2 << 20
	maxWork     = 8 << 20 // members of structs, anonymous ones as often as they are nested
	maxBTF      = 64 << 20
	maxNesting  = 16 // anonymous structs within structs, and links in a chain of typedefs
	maxNames    = 64 << 20
	maxProfile  = 256 << 20
	maxBanner   = 512
	kernelSpace = 0xffffffff80000000 // where x86-64 kernels are linked
)

// Errors of this package.
var (
	// ErrNotKernel: the file is neither a bzImage nor an ELF vmlinux for x86-64, or is cut short.
	ErrNotKernel = errors.New("not an x86-64 linux kernel")
	// ErrTooLarge: a size in the file exceeds what any kernel has.
	ErrTooLarge = errors.New("kernel image too large")
	// ErrCompression: the payload does not unpack, or is packed in a way vigia does not know.
	ErrCompression = errors.New("kernel payload does not unpack")
	// ErrUnsupported: the kernel lacks something; the error says which symbol, type or table.
	ErrUnsupported = errors.New("kernel not supported")
	// ErrProfile: the bytes are not a profile of this version, or are damaged.
	ErrProfile = errors.New("bad kernel profile")
	// ErrReference: the bytes are not a reference of this version, or are damaged.
	ErrReference = errors.New("bad kernel reference")
)

// MissingError names what a kernel lacks. It is an ErrUnsupported.
type MissingError struct {
	What string // "symbol", "type", "field", "enumerator", "table"
	Name string
}

func (e *MissingError) Error() string {
	return fmt.Sprintf("%v: no %s %s", ErrUnsupported, e.What, e.Name)
}

// Is makes errors.Is(err, ErrUnsupported) true.
func (e *MissingError) Is(target error) bool { return target == ErrUnsupported }

func missing(what, name string) error { return &MissingError{what, name} }
