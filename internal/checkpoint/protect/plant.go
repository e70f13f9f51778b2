package protect

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"runtime"
	"time"

	"golang.org/x/sys/unix"
)

// plantTries and plantPause bound how often a thread is interrupted until it is found inside a system call, where its program
// counter stands behind the instruction that makes one.
const (
	plantTries = 50
	plantPause = 5 * time.Millisecond
)

// Plant makes the process pid create a userfaultfd from the device that it holds as descriptor device, and takes the result
// out of it. The caller must be allowed to trace the process.
func Plant(pid, device int) (*os.File, error) {
	t, err := seize(pid)
	if err != nil {
		return nil, err
	}
	defer t.release()
	made, err := t.call(unix.SYS_IOCTL, uint64(device), ioctlNew, unix.O_CLOEXEC)
	if err != nil {
		return nil, fmt.Errorf("make a descriptor in process %d: %w", pid, err)
	}
	f, err := t.fetch(int(made))
	if _, cerr := t.call(unix.SYS_CLOSE, made, 0, 0); err == nil && cerr != nil {
		f.Close()
		err = fmt.Errorf("close the descriptor in process %d: %w", pid, cerr)
	}
	return f, err
}

// tracee is a thread that stands still inside a system call. Tracing is bound to the thread that began it.
type tracee struct {
	pid   int
	saved unix.PtraceRegs
	at    uint64 // of a syscall instruction
}

func seize(pid int) (*tracee, error) {
	runtime.LockOSThread()
	t := &tracee{pid: pid}
	if _, _, errno := unix.Syscall6(unix.SYS_PTRACE, unix.PTRACE_SEIZE, uintptr(pid), 0, 0, 0, 0); errno != 0 {
		runtime.UnlockOSThread()
		return nil, fmt.Errorf("trace process %d: %w", pid, errno)
	}
	for range plantTries {
		in, err := t.interrupt()
		if err != nil {
			t.detach()
			return nil, err
		}
		if in {
			return t, nil
		}
		if _, _, errno := unix.Syscall6(unix.SYS_PTRACE, unix.PTRACE_CONT, uintptr(pid), 0, 0, 0, 0); errno != 0 {
			t.detach()
			return nil, fmt.Errorf("trace process %d: %w", pid, errno)
		}
		time.Sleep(plantPause)
	}
	t.interrupt()
	t.detach()
	return nil, fmt.Errorf("process %d was never inside a system call", pid)
}

// interrupt stops the thread and says whether it is inside a system call.
func (t *tracee) interrupt() (bool, error) {
	if _, _, errno := unix.Syscall6(unix.SYS_PTRACE, unix.PTRACE_INTERRUPT, uintptr(t.pid), 0, 0, 0, 0); errno != 0 {
		return false, fmt.Errorf("interrupt process %d: %w", t.pid, errno)
	}
	if err := t.stopped(); err != nil {
		return false, err
	}
	if err := unix.PtraceGetRegs(t.pid, &t.saved); err != nil {
		return false, fmt.Errorf("registers of process %d: %w", t.pid, err)
	}
	if int64(t.saved.Orig_rax) < 0 {
		return false, nil
	}
	var code [8]byte
	t.at = t.saved.Rip - 2
	if n, err := unix.PtracePeekText(t.pid, uintptr(t.at), code[:]); err != nil || n < 2 {
		return false, nil
	}
	const syscallInstruction = 0x050f
	return binary.LittleEndian.Uint16(code[:]) == syscallInstruction, nil
}

func (t *tracee) stopped() error {
	for {
		var status unix.WaitStatus
		_, err := unix.Wait4(t.pid, &status, unix.WALL, nil)
		switch {
		case err == unix.EINTR:
			continue
		case err != nil:
			return fmt.Errorf("wait for process %d: %w", t.pid, err)
		case status.Exited() || status.Signaled():
			return fmt.Errorf("process %d has ended", t.pid)
		}
		return nil
	}
}

// call lets the thread make one system call. Its own, which was interrupted, is made again by the kernel afterwards: the
// registers say so as they are put back.
func (t *tracee) call(number, a, b, c uint64) (uint64, error) {
	regs := t.saved
	regs.Rip, regs.Rax, regs.Orig_rax = t.at, number, ^uint64(0)
	regs.Rdi, regs.Rsi, regs.Rdx = a, b, c
	if err := unix.PtraceSetRegs(t.pid, &regs); err != nil {
		return 0, err
	}
	err := unix.PtraceSingleStep(t.pid)
	if err == nil {
		err = t.stopped()
	}
	if err == nil {
		err = unix.PtraceGetRegs(t.pid, &regs)
	}
	if rerr := unix.PtraceSetRegs(t.pid, &t.saved); err == nil {
		err = rerr
	}
	if err != nil {
		return 0, err
	}
	if regs.Rip != t.at+2 {
		return 0, errors.New("it went elsewhere")
	}
	if n := int64(regs.Rax); n < 0 && n > -4096 {
		return 0, unix.Errno(-n)
	}
	return regs.Rax, nil
}

// fetch takes a descriptor out of the process.
func (t *tracee) fetch(fd int) (*os.File, error) {
	pidfd, err := unix.PidfdOpen(t.pid, 0)
	if err != nil {
		return nil, fmt.Errorf("process %d: %w", t.pid, err)
	}
	defer unix.Close(pidfd)
	got, err := unix.PidfdGetfd(pidfd, fd, 0)
	if err != nil {
		return nil, fmt.Errorf("take descriptor %d of process %d: %w", fd, t.pid, err)
	}
	return os.NewFile(uintptr(got), "userfaultfd"), nil
}

func (t *tracee) release() {
	t.detach()
	runtime.UnlockOSThread()
}

func (t *tracee) detach() { unix.PtraceDetach(t.pid) }
