// Package protect notices each page that a running QEMU is about to write, before it does.
//
// Linux's userfaultfd can write-protect memory of another process (Documentation/admin-guide/mm/userfaultfd.rst): a write to
// a protected page stops the writing thread and is told on a descriptor; whoever holds that reads the page as it still is,
// lifts the protection, and the thread goes on as if nothing had been. So memory is frozen at one instant by protecting it,
// in a millisecond or a few, while its content is copied afterwards; and which pages were written since is known exactly.
//
// The descriptor must be made by the process whose memory it is. QEMU makes none, so it is made in its name: /dev/userfaultfd
// is handed to it over QMP, and a small process, which runs as QEMU's own user and has no other right than to trace it, lets
// QEMU's main thread make one ioctl between two of its own system calls ([Plant]). QEMU keeps neither of the two descriptors.
//
// When the last holder of the descriptor ends, the kernel lifts all protection and wakes who waits: a guest never hangs on a
// dead keeper.
//
// The device is needed, and not the system call of an unprivileged user: that one sees no writes which the kernel makes for
// QEMU, as when it reads from its disk's socket straight into the guest's memory. They would fail.
package protect

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"runtime"
	"unsafe"

	"golang.org/x/sys/unix"
)

// From linux/userfaultfd.h.
const (
	ioctlNew          = 0xaa00     // on /dev/userfaultfd
	ioctlAPI          = 0xc018aa3f // struct uffdio_api
	ioctlRegister     = 0xc020aa00 // struct uffdio_register
	ioctlWriteProtect = 0xc018aa06 // struct uffdio_writeprotect

	api                = 0xaa
	featureFlagWP      = 1 << 0  // faults on write-protected memory
	featureShmemWP     = 1 << 12 // of shared memory too: Linux 5.19
	registerModeWP     = 1 << 1
	writeProtect       = 1 << 0
	messageSize        = 32
	messagePageFault   = 0x12
	messageAddressAt   = 16
	messagesAtOnce     = 16
	pageMask           = ^uint64(4095)
	maximumUserAddress = 1 << 47
)

// Ioctls are the requests that a holder of the descriptor makes, for its system call filter.
var Ioctls = []uint32{ioctlAPI, ioctlRegister, ioctlWriteProtect}

// Device is what is handed to QEMU.
const Device = "/dev/userfaultfd"

// ErrUnsupported is returned where this host's kernel can't protect shared memory.
var ErrUnsupported = errors.New("this kernel can't protect a machine's memory from outside")

// Memory is a range of another process's memory that can be protected.
type Memory struct {
	fd   int
	base uint64
	size uint64
}

// Take makes a descriptor that Plant returned watch over size bytes at base. It takes f over.
func Take(f *os.File, base, size uint64) (*Memory, error) {
	defer f.Close()
	if base&^pageMask != 0 || size&^pageMask != 0 || base+size < base || base+size > maximumUserAddress {
		return nil, fmt.Errorf("protect %#x bytes at %#x: no such memory", size, base)
	}
	fd, err := unix.FcntlInt(f.Fd(), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	m := &Memory{fd: fd, base: base, size: size}
	if err := m.begin(); err != nil {
		m.Close()
		return nil, err
	}
	return m, nil
}

func (m *Memory) begin() error {
	flags, err := unix.FcntlInt(uintptr(m.fd), unix.F_GETFL, 0)
	if err == nil { // a thread of its own waits in read: nothing is quicker to answer
		_, err = unix.FcntlInt(uintptr(m.fd), unix.F_SETFL, flags&^unix.O_NONBLOCK)
	}
	if err != nil {
		return err
	}
	hello := [3]uint64{api, featureFlagWP | featureShmemWP, 0}
	if err := m.ioctl(ioctlAPI, unsafe.Pointer(&hello)); err != nil {
		return fmt.Errorf("%w: %w", ErrUnsupported, err)
	}
	register := [4]uint64{m.base, m.size, registerModeWP, 0}
	if err := m.ioctl(ioctlRegister, unsafe.Pointer(&register)); err != nil {
		return fmt.Errorf("register memory: %w", err)
	}
	return nil
}

func (m *Memory) ioctl(request uintptr, p unsafe.Pointer) error {
	if _, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(m.fd), request, uintptr(p)); errno != 0 {
		return errno
	}
	return nil
}

// Protect protects n bytes at an offset: from now on Serve is told of the first write to each page.
func (m *Memory) Protect(off, n uint64) error { return m.change(off, n, writeProtect) }

// Lift lets the pages be written, and who waits for that go on.
func (m *Memory) Lift(off, n uint64) error { return m.change(off, n, 0) }

func (m *Memory) change(off, n, mode uint64) error {
	if off > m.size || n > m.size-off {
		return fmt.Errorf("protect %#x bytes at offset %#x of %#x", n, off, m.size)
	}
	p := [3]uint64{m.base + off, n, mode}
	for {
		err := m.ioctl(ioctlWriteProtect, unsafe.Pointer(&p))
		if err != unix.EAGAIN && err != unix.EINTR { // the process is changing its mappings at this moment
			return err
		}
	}
}

// Serve calls fault with the offset of each page that waits to be written, until the descriptor fails. It keeps its thread.
func (m *Memory) Serve(fault func(off uint64)) error {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	var buf [messagesAtOnce * messageSize]byte
	for {
		n, err := unix.Read(m.fd, buf[:])
		if err == unix.EINTR || err == unix.EAGAIN {
			continue
		}
		if err != nil {
			return err
		}
		for b := buf[:n]; len(b) >= messageSize; b = b[messageSize:] {
			address := binary.LittleEndian.Uint64(b[messageAddressAt:]) & pageMask
			if b[0] == messagePageFault && address-m.base < m.size {
				fault(address - m.base)
			}
		}
	}
}

// Close ends the watch, if it is the last descriptor: all protection is lifted.
func (m *Memory) Close() error { return unix.Close(m.fd) }
