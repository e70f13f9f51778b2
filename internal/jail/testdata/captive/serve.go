package main

import (
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

// service is what the daemon hands to an honest worker: a file to keep, guest memory to map, a listener, a connected
// socket; and an address of the host's that only the gate may reach.
type service struct {
	files    []*os.File
	upstream string
}

func newService() (*service, error) {
	var s service
	volume, err := os.CreateTemp("", "volume")
	if err != nil {
		return nil, err
	}
	os.Remove(volume.Name())
	ram, err := unix.MemfdCreate("ram", unix.MFD_CLOEXEC)
	if err != nil {
		return nil, err
	}
	unix.Ftruncate(ram, 1<<20)
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, err
	}
	listener, err := l.(*net.TCPListener).File()
	if err != nil {
		return nil, err
	}
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	control := os.NewFile(uintptr(pair[0]), "control")
	s.files = []*os.File{volume, os.NewFile(uintptr(ram), "ram"), listener, os.NewFile(uintptr(pair[1]), "control")}
	up, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, err
	}
	s.upstream = up.Addr().String()
	go answer(up)
	go converse(control, l.Addr().String())
	return &s, nil
}

// answer is a server of the outside.
func answer(l net.Listener) {
	for {
		c, err := l.Accept()
		if err != nil {
			return
		}
		go func() { io.Copy(c, c); c.Close() }()
	}
}

// converse is the daemon's end: it sends a message with a descriptor, then calls on the worker's listener.
func converse(control *os.File, addr string) {
	secret, _ := os.Open("/etc/hostname")
	conn, err := net.FileConn(control)
	if err != nil {
		return
	}
	conn.(*net.UnixConn).WriteMsgUnix([]byte("file"), unix.UnixRights(int(secret.Fd())), nil)
	c, err := net.Dial("tcp", addr)
	if err != nil {
		return
	}
	c.Write([]byte("hello"))
	io.Copy(io.Discard, c)
}

// serve does a worker's honest work with what it was handed, and says what failed.
func serve() string {
	for name, step := range map[string]func() error{"disk": disk, "memory": memory, "control": control, "outside": outside} {
		if err := step(); err != nil {
			return name + ": " + err.Error()
		}
	}
	return "served"
}

func disk() error {
	f := os.NewFile(3, "volume")
	b := []byte("block")
	if _, err := f.WriteAt(b, 1<<16); err != nil {
		return err
	}
	if _, err := f.ReadAt(b, 1<<16); err != nil {
		return err
	}
	if err := unix.Fallocate(3, unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, 0, 1<<16); err != nil {
		return err
	}
	if err := unix.FcntlFlock(3, unix.F_OFD_SETLK, &unix.Flock_t{Type: unix.F_WRLCK}); err != nil {
		return err
	}
	if _, err := unix.Preadv2(3, [][]byte{b}, 1<<16, unix.RWF_NOWAIT); err != nil && !errors.Is(err, unix.EAGAIN) && !errors.Is(err, unix.EOPNOTSUPP) {
		return err
	}
	if _, err := f.Stat(); err != nil {
		return err
	}
	if err := f.Truncate(1 << 20); err != nil {
		return err
	}
	return unix.Fdatasync(3)
}

func memory() error {
	b, err := unix.Mmap(4, 0, 1<<20, unix.PROT_READ, unix.MAP_SHARED)
	if err != nil {
		return err
	}
	_ = b[4096]
	if err := unix.Madvise(b, unix.MADV_RANDOM); err != nil {
		return err
	}
	return unix.Munmap(b)
}

// control receives a descriptor and reads it, then takes a connection; convert has no sockets to do it with.
func control() error {
	conn, err := net.FileConn(os.NewFile(6, "control"))
	if err != nil {
		if len(os.Args) > 2 && os.Args[2] == "convert" {
			return nil
		}
		return err
	}
	conn.SetDeadline(time.Now().Add(10 * time.Second))
	b, oob := make([]byte, 16), make([]byte, 64)
	n, m, _, _, err := conn.(*net.UnixConn).ReadMsgUnix(b, oob)
	if err != nil || string(b[:n]) != "file" {
		return fmt.Errorf("%q: %w", b[:n], err)
	}
	messages, err := unix.ParseSocketControlMessage(oob[:m])
	if err != nil {
		return err
	}
	fds, err := unix.ParseUnixRights(&messages[0])
	if err != nil {
		return err
	}
	if _, err := unix.Read(fds[0], b); err != nil {
		return err
	}
	l, err := net.FileListener(os.NewFile(5, "listener"))
	if err != nil {
		return err
	}
	c, err := l.Accept()
	if err != nil {
		return err
	}
	defer c.Close()
	_, err = io.ReadFull(c, b[:5])
	return err
}

// outside succeeds for the gate and fails for all others.
func outside() error {
	err := func() error {
		c, err := net.DialTimeout("tcp", os.Getenv("UPSTREAM"), 5*time.Second)
		if err != nil {
			return err
		}
		defer c.Close()
		c.Write([]byte("ping"))
		if _, err = io.ReadFull(c, make([]byte, 4)); err != nil {
			return err
		}
		u, err := net.Dial("udp", os.Getenv("UPSTREAM"))
		if err != nil {
			return err
		}
		defer u.Close()
		_, err = u.Write([]byte("ping"))
		return err
	}()
	if os.Args[2] == "gate" {
		return err
	}
	if err == nil {
		return errors.New("reached")
	}
	return nil
}
