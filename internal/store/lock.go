package store

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// Lock is a directory that this process has to itself. It ends with the process, however that ends.
type Lock struct{ f *os.File }

// LockDir takes a directory. Where another process has it, the error is ErrLocked and names its pid.
func LockDir(dir string) (*Lock, error) {
	path := filepath.Join(dir, "lock")
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, fmt.Errorf("lock %s: %w", dir, err)
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		defer f.Close()
		if errors.Is(err, unix.EWOULDBLOCK) {
			return nil, fmt.Errorf("%s is %w%s", dir, ErrLocked, holder(f))
		}
		return nil, fmt.Errorf("lock %s: %w", dir, err)
	}
	pid := strconv.Itoa(os.Getpid()) + "\n"
	err = f.Truncate(0)
	if err == nil {
		_, err = f.WriteAt([]byte(pid), 0)
	}
	if err != nil {
		f.Close()
		return nil, fmt.Errorf("lock %s: %w", dir, err)
	}
	return &Lock{f: f}, nil
}

// holder reads who wrote the lock file.
func holder(f *os.File) string {
	b, _ := io.ReadAll(io.LimitReader(f, 16))
	if pid, err := strconv.Atoi(strings.TrimSpace(string(b))); err == nil {
		return fmt.Sprintf(" (process %d)", pid)
	}
	return ""
}

// Release lets go of the directory.
func (l *Lock) Release() error { return l.f.Close() }
