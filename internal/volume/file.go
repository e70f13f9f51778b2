package volume

import (
	"errors"
	"io"
	"os"
	"sync/atomic"
	"unsafe"

	"golang.org/x/sys/unix"
)

// file is what a layer is stored in. The host's files are one; tests have a file that remembers every write and sync
// to replay a power cut, and one that fails by rule.
type file interface {
	io.ReaderAt
	io.WriterAt
	Truncate(size int64) error
	// Sync waits until all that was written is on stable storage.
	Sync() error
	// Punch makes a range read as zeros and gives its room back. It may do nothing where it returns errNoPunch.
	Punch(off, n int64) error
	Size() (int64, error)
}

var errNoPunch = errors.New("the file system cannot punch holes")

// osFile is a host file, used by descriptor only.
type osFile struct {
	*os.File
	fd    int
	blind atomic.Bool // the file system does not know RWF_NOWAIT
}

// hostFile takes the descriptor out of f once: os.File.Fd is not free, and ReadAt through it would be.
func hostFile(f *os.File) *osFile {
	o := &osFile{File: f, fd: -1}
	if rc, err := f.SyscallConn(); err == nil {
		rc.Control(func(fd uintptr) { o.fd = int(fd) })
	}
	return o
}

func (f *osFile) ReadAt(p []byte, off int64) (int, error) {
	done := 0
	for done < len(p) {
		n, err := unix.Pread(f.fd, p[done:], off+int64(done))
		switch {
		case err == unix.EINTR:
		case err != nil:
			return done, &os.PathError{Op: "read", Path: f.Name(), Err: err}
		case n == 0:
			return done, io.EOF
		}
		done += max(n, 0)
	}
	return done, nil
}

// ReadNowait reads what is in the page cache. Where the file system cannot tell, it reads as ReadAt does. The call never
// waits, so the Go scheduler is not told of it: that is half of what a small read would cost.
func (f *osFile) ReadNowait(p []byte, off int64) error {
	if f.blind.Load() {
		return readFull(f, p, off)
	}
	iov := unix.Iovec{Base: &p[0]}
	iov.SetLen(len(p))
	for {
		n, _, err := unix.RawSyscall6(unix.SYS_PREADV2, uintptr(f.fd), uintptr(unsafe.Pointer(&iov)), 1, uintptr(off), 0, unix.RWF_NOWAIT)
		switch {
		case err == unix.EINTR:
		case err == unix.EOPNOTSUPP:
			f.blind.Store(true)
			return readFull(f, p, off)
		case err != 0:
			return err
		case int(n) == len(p):
			return nil
		default:
			return errWait
		}
	}
}

func (f *osFile) WriteAt(p []byte, off int64) (int, error) {
	done := 0
	for done < len(p) {
		n, err := unix.Pwrite(f.fd, p[done:], off+int64(done))
		if err != nil && err != unix.EINTR {
			return done, &os.PathError{Op: "write", Path: f.Name(), Err: err}
		}
		done += max(n, 0)
	}
	return done, nil
}

func (f *osFile) Sync() error {
	for {
		err := unix.Fdatasync(f.fd)
		if err != unix.EINTR {
			if err != nil {
				return &os.PathError{Op: "fdatasync", Path: f.Name(), Err: err}
			}
			return nil
		}
	}
}

func (f *osFile) Punch(off, n int64) error {
	for {
		err := unix.Fallocate(f.fd, unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, off, n)
		switch err {
		case nil:
			return nil
		case unix.EINTR:
			continue
		case unix.EOPNOTSUPP, unix.ENOSYS:
			return errNoPunch
		}
		return &os.PathError{Op: "punch hole in", Path: f.Name(), Err: err}
	}
}

func (f *osFile) Size() (int64, error) {
	st, err := f.Stat()
	if err != nil {
		return 0, err
	}
	return st.Size(), nil
}

// lock takes the overlay for this open file, so that two guards never write one overlay.
func (f *osFile) lock() error {
	lk := unix.Flock_t{Type: unix.F_WRLCK, Whence: io.SeekStart}
	err := unix.FcntlFlock(uintptr(f.fd), unix.F_OFD_SETLK, &lk)
	if err == unix.EAGAIN || err == unix.EACCES {
		return ErrInUse
	}
	return err
}

func (f *osFile) unlock() {
	lk := unix.Flock_t{Type: unix.F_UNLCK, Whence: io.SeekStart}
	unix.FcntlFlock(uintptr(f.fd), unix.F_OFD_SETLK, &lk)
}
