package ledger

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"
)

// Paths inside the ledger's directory. The names under .state but the two locks are Tessera's.
const (
	checkpointFile = "checkpoint"
	stateDir       = ".state"
	treeStateFile  = ".state/treeState"
	versionFile    = ".state/version"
	writerLock     = ".state/writer.lock"
	batchLock      = ".state/batch.lock"
)

// lockFile opens path and locks it; ErrLocked where another holds it.
func lockFile(path string, exclusive bool) (*os.File, error) {
	how := unix.LOCK_SH
	if exclusive {
		how = unix.LOCK_EX
	}
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, fmt.Errorf("open the ledger: %w", err)
	}
	if err := unix.Flock(int(f.Fd()), how|unix.LOCK_NB); err != nil {
		f.Close()
		if errors.Is(err, unix.EWOULDBLOCK) {
			return nil, fmt.Errorf("%w: %s", ErrLocked, path)
		}
		return nil, fmt.Errorf("lock %s: %w", path, err)
	}
	return f, nil
}

// flock takes (or with LOCK_UN drops) a lock on an open file, waiting for it.
func flock(f *os.File, how int) error {
	for {
		err := unix.Flock(int(f.Fd()), how)
		if !errors.Is(err, unix.EINTR) {
			return err
		}
	}
}

// writeFile puts a file in place at once, durably: its content, then its name.
func writeFile(path string, data []byte, mode os.FileMode) error {
	tmp := path + ".new"
	f, err := os.OpenFile(tmp, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, mode)
	if err != nil {
		return err
	}
	_, err = f.Write(data)
	if err == nil {
		err = f.Sync()
	}
	if e := f.Close(); err == nil {
		err = e
	}
	if err == nil {
		err = os.Rename(tmp, path)
	}
	if err != nil {
		os.Remove(tmp)
		return err
	}
	return syncDir(filepath.Dir(path))
}

// isTemporary knows the names of files that were being written when a process died: ours end in .new, Tessera adds
// digits to the name of its state files.
func isTemporary(name string) bool {
	if strings.HasSuffix(name, ".new") {
		return true
	}
	for _, base := range []string{"treeState", "version", "checkpoint"} {
		if digits, ok := strings.CutPrefix(name, base); ok && digits != "" && strings.Trim(digits, "0123456789") == "" {
			return true
		}
	}
	return false
}

func syncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer d.Close()
	return d.Sync()
}

// readFull reads a file of at most limit bytes, with the ledger's name for a missing one.
func readFull(dir, name string, limit int64) ([]byte, error) {
	path := filepath.Join(dir, name)
	st, err := os.Lstat(path)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return nil, fmt.Errorf("%w: %s", ErrMissing, name)
	case err != nil:
		return nil, err
	case !st.Mode().IsRegular():
		return nil, fmt.Errorf("%w: %s is no regular file", ErrUnexpected, name)
	case st.Size() > limit:
		return nil, fmt.Errorf("%w: %s is too long", ErrCorrupt, name)
	}
	return os.ReadFile(path)
}
