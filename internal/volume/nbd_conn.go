package volume

import (
	"io"
	"net"
	"os"
	"syscall"

	"golang.org/x/sys/unix"
)

// socket is a unix socket into which pages of the page cache can be sent as they are.
type socket struct {
	*net.UnixConn
	raw syscall.RawConn
}

// newSocket gives nil where c is not a unix socket.
func newSocket(c net.Conn) *socket {
	u, ok := c.(*net.UnixConn)
	if !ok {
		return nil
	}
	raw, err := u.SyscallConn()
	if err != nil {
		return nil
	}
	u.SetWriteBuffer(socketBuffer)
	return &socket{u, raw}
}

// send sends n bytes of f without copying them. With an error it says how many are left.
func (s *socket) send(f *osFile, at, n int64) (left int64, err error) {
	werr := s.raw.Write(func(fd uintptr) bool {
		for n > 0 {
			k, e := unix.Sendfile(int(fd), f.fd, &at, int(n))
			switch {
			case e == unix.EAGAIN:
				return false
			case e == unix.EINTR:
			case e != nil:
				err = os.NewSyscallError("sendfile", e)
				return true
			case k == 0:
				err = io.ErrUnexpectedEOF
				return true
			}
			n -= int64(max(k, 0))
		}
		return true
	})
	if err == nil {
		err = werr
	}
	return n, err
}
