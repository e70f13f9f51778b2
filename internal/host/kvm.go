package host

import (
	"encoding/binary"
	"fmt"
	"os"
	"runtime"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Requests and structures of Documentation/virt/kvm/api.rst, for x86-64.
const (
	kvmGetAPIVersion = 0xae00
	kvmCreateVM      = 0xae01
	kvmGetMmapSize   = 0xae04
	kvmSetMemory     = 0x4020ae46
	kvmCreateVCPU    = 0xae41
	kvmRun           = 0xae80
	kvmSetRegs       = 0x4090ae82
	kvmGetSregs      = 0x8138ae83
	kvmSetSregs      = 0x4138ae84

	exitIO  = 2
	exitHLT = 5

	guestBase = 0x1000
	tryPort   = 0x10
	tryByte   = 42
)

// guestCode runs in real mode: mov al,42; out 0x10,al; hlt.
var guestCode = []byte{0xb0, tryByte, 0xe6, tryPort, 0xf4}

type kvmMemory struct {
	slot, flags      uint32
	base, size, user uint64
}

// kvmRegs is struct kvm_regs: sixteen general registers, rip, rflags.
type kvmRegs [18]uint64

// kvmSregs is struct kvm_sregs, of which only the code segment, its first, is touched: base, limit, selector, ….
type kvmSregs [312]byte

// runGuestCode makes a virtual machine, runs three instructions in it and looks whether they did what they should.
func runGuestCode(device string) error {
	dev, err := os.OpenFile(device, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	defer dev.Close()
	if v, err := ioctl(int(dev.Fd()), kvmGetAPIVersion, 0); err != nil || v != 12 {
		return fmt.Errorf("its API version is %d, not 12: %v", v, err)
	}
	vm, err := ioctl(int(dev.Fd()), kvmCreateVM, 0)
	if err != nil {
		return fmt.Errorf("make a virtual machine: %w", err)
	}
	defer unix.Close(vm)
	mem, err := unix.Mmap(-1, 0, 4096, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED|unix.MAP_ANONYMOUS)
	if err != nil {
		return err
	}
	defer unix.Munmap(mem)
	copy(mem, guestCode)
	region := kvmMemory{base: guestBase, size: 4096, user: uint64(uintptr(unsafe.Pointer(&mem[0])))}
	if _, err := ioctl(vm, kvmSetMemory, uintptr(unsafe.Pointer(&region))); err != nil {
		return fmt.Errorf("give it memory: %w", err)
	}
	cpu, err := ioctl(vm, kvmCreateVCPU, 0)
	if err != nil {
		return fmt.Errorf("give it a processor: %w", err)
	}
	defer unix.Close(cpu)
	size, err := ioctl(int(dev.Fd()), kvmGetMmapSize, 0)
	if err != nil {
		return err
	}
	state, err := unix.Mmap(cpu, 0, size, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		return err
	}
	defer unix.Munmap(state)
	if err := setRegisters(cpu); err != nil {
		return err
	}
	return runBriefly(cpu, state)
}

func setRegisters(cpu int) error {
	var s kvmSregs
	if _, err := ioctl(cpu, kvmGetSregs, uintptr(unsafe.Pointer(&s))); err != nil {
		return err
	}
	binary.LittleEndian.PutUint64(s[0:], 0)  // cs.base
	binary.LittleEndian.PutUint16(s[12:], 0) // cs.selector, after the limit
	if _, err := ioctl(cpu, kvmSetSregs, uintptr(unsafe.Pointer(&s))); err != nil {
		return err
	}
	regs := kvmRegs{16: guestBase, 17: 2}
	_, err := ioctl(cpu, kvmSetRegs, uintptr(unsafe.Pointer(&regs)))
	return err
}

// runBriefly runs the code until it halts. A processor that never comes back is called back by a signal to its thread,
// which makes KVM_RUN return.
func runBriefly(cpu int, state []byte) error {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	tid := unix.Gettid()
	call := time.AfterFunc(2*time.Second, func() {
		state[1] = 1 // immediate_exit, should the signal come between two runs
		unix.Tgkill(os.Getpid(), tid, unix.SIGURG)
	})
	defer call.Stop()
	wrote := false
	for range 8 {
		if _, err := ioctl(cpu, kvmRun, 0); err != nil {
			if err == unix.EINTR && state[1] == 0 {
				continue // the Go scheduler's own signals
			}
			return fmt.Errorf("run a processor: %w", err)
		}
		switch reason := binary.LittleEndian.Uint32(state[8:]); reason {
		case exitIO:
			port, at := binary.LittleEndian.Uint16(state[34:]), binary.LittleEndian.Uint64(state[40:])
			wrote = port == tryPort && at < uint64(len(state)) && state[at] == tryByte
		case exitHLT:
			if !wrote {
				return fmt.Errorf("it ran, but not the instructions it was given")
			}
			return nil
		default:
			return fmt.Errorf("it ended with exit reason %d", reason)
		}
	}
	return fmt.Errorf("it does not come to an end")
}

// ioctl returns the call's result; an interrupted KVM_RUN is the caller's to repeat.
func ioctl(fd int, request, arg uintptr) (int, error) {
	r, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), request, arg)
	if errno != 0 {
		return 0, errno
	}
	return int(r), nil
}
