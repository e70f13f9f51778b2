package jail

import (
	"bytes"
	"fmt"
	"os"
	"strconv"
	"sync"
	"syscall"

	"golang.org/x/sys/unix"
)

// Process is a confined process: one that this daemon started, or one it has found again.
type Process struct {
	PID       int
	StartTime uint64    // clock ticks since boot: with PID it names the process for ever
	Measures  []Measure // what came in force at its start; empty for an adopted one, see Observe

	pidfd *os.File
	child *os.Process // nil for an adopted one
	done  chan struct{}
	exit  Exit
	once  sync.Once
}

// Exit is how a process ended. Of an adopted one only the fact is known.
type Exit struct {
	Known  bool
	Code   int
	Signal syscall.Signal // 0 if it ended by itself
}

func (e Exit) String() string {
	switch {
	case !e.Known:
		return "ended"
	case e.Signal != 0:
		return "killed by " + e.Signal.String()
	}
	return "exit status " + strconv.Itoa(e.Code)
}

// watch makes a Process of a pidfd, which it takes over.
func watch(pid, pidfd int, child *os.Process) (*Process, error) {
	start, err := startTime(pid)
	if err != nil {
		unix.Close(pidfd)
		return nil, err
	}
	unix.CloseOnExec(pidfd)
	if err := unix.SetNonblock(pidfd, true); err != nil { // so that Go's poller takes it: no thread waits
		unix.Close(pidfd)
		return nil, err
	}
	p := &Process{PID: pid, StartTime: start, pidfd: os.NewFile(uintptr(pidfd), "pidfd"), child: child, done: make(chan struct{})}
	go p.wait()
	return p, nil
}

// Adopt finds a process that an earlier daemon started. It returns ErrGone if it has ended.
func Adopt(pid int, start uint64) (*Process, error) {
	if pid <= 0 {
		return nil, fmt.Errorf("process %d: %w", pid, ErrGone)
	}
	fd, err := unix.PidfdOpen(pid, 0)
	if err != nil {
		return nil, fmt.Errorf("process %d: %w", pid, ErrGone)
	}
	p, err := watch(pid, fd, nil) // reads the start time after the pidfd holds the process
	if err != nil {
		return nil, fmt.Errorf("process %d: %w", pid, ErrGone)
	}
	if p.StartTime != start || p.ended() {
		p.Close()
		return nil, fmt.Errorf("process %d: %w", pid, ErrGone)
	}
	return p, nil
}

// wait closes done when the process has ended, and reaps it if it is ours.
func (p *Process) wait() {
	defer close(p.done)
	conn, err := p.pidfd.SyscallConn()
	if err == nil {
		err = conn.Read(func(uintptr) bool { return p.ended() })
	}
	if p.child == nil {
		return
	}
	state, err := p.child.Wait()
	if err != nil {
		return
	}
	status, _ := state.Sys().(syscall.WaitStatus)
	p.exit = Exit{Known: true, Code: state.ExitCode()}
	if status.Signaled() {
		p.exit.Signal = status.Signal()
	}
}

// ended asks without waiting.
func (p *Process) ended() bool {
	conn, err := p.pidfd.SyscallConn()
	if err != nil {
		return true
	}
	ended := true
	if err := conn.Control(func(fd uintptr) {
		n, _ := unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, 0)
		ended = n > 0
	}); err != nil {
		return true
	}
	return ended
}

// Done is closed when the process has ended.
func (p *Process) Done() <-chan struct{} { return p.done }

// Exit waits for the end and tells how it was.
func (p *Process) Exit() Exit {
	<-p.done
	return p.exit
}

// Signal sends a signal; it never hits another process. A process that has ended is no error.
func (p *Process) Signal(sig syscall.Signal) error {
	conn, err := p.pidfd.SyscallConn()
	if err != nil {
		return err
	}
	var serr error
	if err := conn.Control(func(fd uintptr) { serr = unix.PidfdSendSignal(int(fd), sig, nil, 0) }); err != nil {
		return err
	}
	if serr == unix.ESRCH {
		return nil
	}
	return serr
}

// Kill ends the process and everything in its pid namespace.
func (p *Process) Kill() error { return p.Signal(syscall.SIGKILL) }

// Close forgets the process without ending it.
func (p *Process) Close() error {
	p.once.Do(func() { p.pidfd.Close() })
	return nil
}

// startTime is field 22 of /proc/PID/stat; the second field, the name, may hold anything, so it counts from its end.
func startTime(pid int) (uint64, error) {
	raw, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/stat")
	if err != nil {
		return 0, err
	}
	fields := bytes.Fields(raw[bytes.LastIndexByte(raw, ')')+1:])
	if len(fields) < 20 {
		return 0, fmt.Errorf("/proc/%d/stat is short", pid)
	}
	return strconv.ParseUint(string(fields[19]), 10, 64)
}
