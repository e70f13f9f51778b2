package store

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// Lock is a directory that this process has to itself. It ends with the process, however that ends.
type Lock struct{ f *os.File }

// lingering bounds how long a directory is waited for whose holder is dead: a child that he was about to start when he was
// killed has his descriptors until it executes its program, and so the lock.
const lingering = 5 * time.Second

// LockDir takes a directory. Where another process has it, the error is ErrLocked and names its pid.
func LockDir(dir string) (*Lock, error) {
	path := filepath.Join(dir, "lock")
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, fmt.Errorf("lock %s: %w", dir, err)
	}
	if err := take(f); err != nil {
		defer f.Close()
		if errors.Is(err, unix.EWOULDBLOCK) {
			named := ""
			if pid := holder(f); pid > 0 {
				named = fmt.Sprintf(" (process %d)", pid)
			}
			return nil, fmt.Errorf("%s is %w%s", dir, ErrLocked, named)
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

func take(f *os.File) error {
	for deadline := time.Now().Add(lingering); ; time.Sleep(20 * time.Millisecond) {
		err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		pid := holder(f)
		if !errors.Is(err, unix.EWOULDBLOCK) || pid == 0 || unix.Kill(pid, 0) != unix.ESRCH || time.Now().After(deadline) {
			return err
		}
	}
}

// holder reads who wrote the lock file; 0 is nobody.
func holder(f *os.File) int {
	b, _ := io.ReadAll(io.NewSectionReader(f, 0, 16))
	pid, err := strconv.Atoi(strings.TrimSpace(string(b)))
	if err != nil || pid < 1 {
		return 0
	}
	return pid
}

// Release lets go of the directory.
func (l *Lock) Release() error { return l.f.Close() }
