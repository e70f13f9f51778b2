package volume

import (
	"errors"
	"io"
	"net"
	"os"
	"sync"

	"golang.org/x/sys/unix"
)

// socket is a unix socket on which a thread of its own waits in read(2). Requests of a guest come microseconds
// apart; the way through the runtime's poller and scheduler costs more than the rest of the answer. It can also send
// pages of the page cache as they are.
type socket struct {
	fd int

	mu     sync.Mutex
	closed bool
}

// takeOver makes a socket of c, which is closed. It gives nil, and leaves c as it is, where c is not a unix socket.
func takeOver(c net.Conn) *socket {
	u, ok := c.(*net.UnixConn)
	if !ok {
		return nil
	}
	raw, err := u.SyscallConn()
	if err != nil {
		return nil
	}
	fd := -1
	if cerr := raw.Control(func(p uintptr) { fd, err = unix.FcntlInt(p, unix.F_DUPFD_CLOEXEC, 3) }); cerr != nil || err != nil {
		return nil
	}
	u.Close() // takes it out of the poller
	unix.SetNonblock(fd, false)
	unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_SNDBUF, socketBuffer)
	return &socket{fd: fd}
}

func (s *socket) Read(p []byte) (int, error) {
	for {
		n, err := unix.Read(s.fd, p)
		switch {
		case err == unix.EINTR:
		case err != nil:
			return 0, os.NewSyscallError("read", err)
		case n == 0 && len(p) > 0:
			return 0, io.EOF
		default:
			return n, nil
		}
	}
}

func (s *socket) Write(p []byte) (int, error) {
	done := 0
	for done < len(p) {
		n, err := unix.Write(s.fd, p[done:])
		if err != nil && err != unix.EINTR {
			return done, os.NewSyscallError("write", err)
		}
		done += max(n, 0)
	}
	return done, nil
}

// send sends n bytes of f without copying them. With an error it says how many are left.
func (s *socket) send(f *osFile, at, n int64) (left int64, err error) {
	for n > 0 {
		k, err := unix.Sendfile(s.fd, f.fd, &at, int(n))
		switch {
		case err == unix.EINTR:
		case err != nil:
			return n, os.NewSyscallError("sendfile", err)
		case k == 0:
			return n, io.ErrUnexpectedEOF
		}
		n -= int64(max(k, 0))
	}
	return 0, nil
}

// hangUp ends reads and writes that wait, and those to come.
func (s *socket) hangUp() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if !s.closed {
		unix.Shutdown(s.fd, unix.SHUT_RDWR)
	}
}

// Close is for when nobody reads or writes any more.
func (s *socket) Close() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return net.ErrClosed
	}
	s.closed = true
	return unix.Close(s.fd)
}

// left says that a client has gone: with a word, without one, or by being killed while it was being answered.
func left(err error) bool {
	return errors.Is(err, errDone) || errors.Is(err, io.EOF) || errors.Is(err, net.ErrClosed)
}
