// Package boot spares each QEMU a copy of its guest's kernel.
//
// QEMU reads what it is given by -kernel into memory of its own and keeps it for the next reset: 14 MiB of a Debian kernel, and some 25 ms of each
// start, also where a guest goes on from a checkpoint and never boots. What it is given by -initrd it maps. So the kernel is put in front of the
// initrd, and what QEMU takes for the kernel is a loader of 1,536 bytes, which in the guest puts both where they belong and goes on as
// the option ROM would have:
//
//	-kernel loader     1,536 bytes, with the sizes of what follows in it
//	-initrd joined     kernel, zeros up to the next page, initrd
//
// The kernel finds the same in memory, at the same places, as without. The loader is loader.S, assembled.
package boot

import (
	_ "embed"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
)

//go:embed loader.bin
var loader []byte

const (
	align = 4096
	// MaxKernel bounds a kernel, in bytes: what is put to 1 MiB must end below where kernels unpack themselves.
	MaxKernel = 128 << 20

	headerEnd      = 0x268
	atSize, atJoin = 0x3f8, 0x3fc // in the loader
)

// ErrKernel says that a kernel is of a kind that the loader does not know. QEMU may.
var ErrKernel = errors.New("not a kernel that the loader knows")

// Join writes the two files for a kernel of so many bytes and its initrd, which may be nil.
func Join(kernel io.ReaderAt, size int64, initrd io.Reader, toLoader, toJoined io.Writer) error {
	if err := check(kernel, size); err != nil {
		return err
	}
	padded := (size + align - 1) &^ (align - 1)
	own := append([]byte(nil), loader...)
	binary.LittleEndian.PutUint32(own[atSize:], uint32(size))
	binary.LittleEndian.PutUint32(own[atJoin:], uint32(padded))
	if _, err := toLoader.Write(own); err != nil {
		return err
	}
	if n, err := io.Copy(toJoined, io.NewSectionReader(kernel, 0, size)); err != nil || n != size {
		return errors.Join(err, fmt.Errorf("%d of the kernel's %d bytes", n, size))
	}
	if _, err := toJoined.Write(make([]byte, padded-size)); err != nil {
		return err
	}
	if initrd == nil {
		return nil
	}
	_, err := io.Copy(toJoined, initrd)
	return err
}

// check reads a kernel's header: Documentation/arch/x86/boot.rst, "The Real-Mode Kernel Header".
func check(kernel io.ReaderAt, size int64) error {
	var h [headerEnd]byte
	if size < int64(len(h)) || size > MaxKernel {
		return fmt.Errorf("%w: %d bytes", ErrKernel, size)
	}
	if _, err := kernel.ReadAt(h[:], 0); err != nil {
		return err
	}
	sectors := int64(h[0x1f1])
	if sectors == 0 {
		sectors = 4
	}
	switch version := binary.LittleEndian.Uint16(h[0x206:]); {
	case string(h[0x202:0x206]) != "HdrS":
		return fmt.Errorf("%w: it has no header", ErrKernel)
	case version < 0x206:
		return fmt.Errorf("%w: boot protocol %d.%02d", ErrKernel, version>>8, version&255)
	case h[0x211]&1 == 0:
		return fmt.Errorf("%w: it is loaded low", ErrKernel)
	case sectors > 64-1 || (sectors+1)*512 >= size:
		return fmt.Errorf("%w: %d sectors in real mode", ErrKernel, sectors)
	}
	return nil
}
