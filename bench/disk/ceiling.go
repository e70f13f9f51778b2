package main

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"runtime"

	"golang.org/x/sys/unix"
)

// ceiling is the least that an NBD server can do: one thread that waits in read(2), gives every READ the same
// bytes and throws every WRITE away. What it loses against the raw file is the price of QEMU's NBD client and of the
// socket, which no server behind it can win back.
type ceiling struct {
	fd   int
	data *os.File // what is sent for long reads, from the page cache
	mem  []byte   // and for short ones
	in   []byte
	a, b int // what is unread of in
	out  []byte
}

const ceilingLong = 32 << 10

// serveCeiling is the child: one client after the other.
func serveCeiling(socket, file string) error {
	f, err := os.Open(file)
	if err != nil {
		return err
	}
	st, err := f.Stat()
	if err != nil {
		return err
	}
	l, err := net.Listen("unix", socket)
	if err != nil {
		return err
	}
	runtime.LockOSThread()
	for {
		c, err := l.Accept()
		if err != nil {
			return err
		}
		own, err := c.(*net.UnixConn).File() // a blocking one
		c.Close()
		if err != nil {
			return err
		}
		s := &ceiling{fd: int(own.Fd()), data: f, mem: make([]byte, ceilingLong), in: make([]byte, 1<<20), out: make([]byte, 0, 256<<10)}
		unix.SetsockoptInt(s.fd, unix.SOL_SOCKET, unix.SO_SNDBUF, 4<<20)
		if err := s.negotiate(st.Size()); err == nil {
			err = s.run()
		}
		own.Close()
	}
}

var errGone = errors.New("client is gone")

// need makes n unread bytes at hand.
func (s *ceiling) need(n int) error {
	for s.b-s.a < n {
		if s.a == s.b || s.a+n > len(s.in) {
			s.b = copy(s.in, s.in[s.a:s.b])
			s.a = 0
		}
		k, err := unix.Read(s.fd, s.in[s.b:])
		if err == unix.EINTR {
			continue
		}
		if k <= 0 {
			return errGone
		}
		s.b += k
	}
	return nil
}

func (s *ceiling) take(n int) ([]byte, error) {
	err := s.need(n)
	if err != nil {
		return nil, err
	}
	s.a += n
	return s.in[s.a-n : s.a], nil
}

func (s *ceiling) send() error {
	for p := s.out; len(p) > 0; {
		k, err := unix.Write(s.fd, p)
		if err != nil && err != unix.EINTR {
			return err
		}
		p = p[max(k, 0):]
	}
	s.out = s.out[:0]
	return nil
}

// negotiate agrees to an export of that size with simple replies.
func (s *ceiling) negotiate(size int64) error {
	be := binary.BigEndian
	s.out = be.AppendUint64(be.AppendUint64(s.out, 0x4e42444d41474943), 0x49484156454f5054)
	s.out = be.AppendUint16(s.out, 3) // fixed newstyle, no zeroes
	if err := s.send(); err != nil {
		return err
	}
	if _, err := s.take(4); err != nil {
		return err
	}
	reply := func(opt, kind uint32, data []byte) {
		s.out = be.AppendUint64(s.out, 0x3e889045565a9)
		s.out = be.AppendUint32(be.AppendUint32(s.out, opt), kind)
		s.out = append(be.AppendUint32(s.out, uint32(len(data))), data...)
	}
	for {
		h, err := s.take(16)
		if err != nil {
			return err
		}
		opt, n := be.Uint32(h[8:]), be.Uint32(h[12:])
		if n > 8<<10 {
			return fmt.Errorf("option of %d bytes", n)
		}
		if _, err := s.take(int(n)); err != nil {
			return err
		}
		if opt != 6 && opt != 7 { // INFO and GO
			reply(opt, 1<<31|1, nil)
		} else {
			info := be.AppendUint64(be.AppendUint16(nil, 0), uint64(size))
			reply(opt, 3, be.AppendUint16(info, 1|1<<2|1<<3)) // flags, flush, FUA
			reply(opt, 1, nil)
		}
		if err := s.send(); err != nil || opt == 7 {
			return err
		}
	}
}

func (s *ceiling) run() error {
	be := binary.BigEndian
	for {
		if s.b-s.a < 28 {
			if err := s.send(); err != nil {
				return err
			}
		}
		h, err := s.take(28)
		if err != nil {
			return err
		}
		command, n := be.Uint16(h[6:]), int(be.Uint32(h[24:]))
		s.out = be.AppendUint64(append(s.out, 0x67, 0x44, 0x66, 0x98, 0, 0, 0, 0), be.Uint64(h[8:]))
		switch command {
		case 0:
			err = s.read(n)
		case 1:
			err = s.discard(n)
		case 2:
			return errGone
		}
		if err != nil {
			return err
		}
	}
}

func (s *ceiling) read(n int) error {
	if n < ceilingLong {
		if s.out = append(s.out, s.mem[:n]...); len(s.out) < 128<<10 {
			return nil
		}
		return s.send()
	}
	if err := s.send(); err != nil {
		return err
	}
	for at := int64(0); n > 0; {
		k, err := unix.Sendfile(s.fd, int(s.data.Fd()), &at, n)
		if err != nil && err != unix.EINTR {
			return err
		}
		if k == 0 {
			return io.ErrUnexpectedEOF
		}
		n -= max(k, 0)
	}
	return nil
}

func (s *ceiling) discard(n int) error {
	for n > 0 {
		if err := s.need(1); err != nil {
			return err
		}
		k := min(n, s.b-s.a)
		s.a, n = s.a+k, n-k
	}
	return nil
}
