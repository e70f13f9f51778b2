package image

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// temporary is a directory in the making, held by a lock on itself: whoever finds it unlocked knows that its process
// is gone and may delete it.
type temporary struct {
	dir  string
	lock *os.File
}

// scratchLink names, inside a temporary directory, another one outside of the store that goes with it.
const scratchLink = "scratch"

func (s *Store) temporary() (*temporary, error) {
	dir, err := os.MkdirTemp(filepath.Join(s.dir, ".tmp"), "")
	if err != nil {
		return nil, fmt.Errorf("image store: %w", err)
	}
	lock, err := os.Open(dir)
	if err == nil {
		err = unix.Flock(int(lock.Fd()), unix.LOCK_EX|unix.LOCK_NB)
	}
	if err != nil {
		os.Remove(dir)
		return nil, fmt.Errorf("image store: %w", err)
	}
	return &temporary{dir, lock}, nil
}

func (t *temporary) path(name string) string { return filepath.Join(t.dir, name) }

// scratch makes a directory outside of the store that other users may reach, and remembers it for the sweep.
func (t *temporary) scratch() (string, error) {
	dir, err := os.MkdirTemp("/var/tmp", "vigia-image-")
	if err != nil {
		return "", err
	}
	if err := os.Chmod(dir, 0o1777); err != nil {
		return "", err
	}
	return dir, os.Symlink(dir, t.path(scratchLink))
}

func (t *temporary) remove() error {
	err := removeTree(t.dir)
	t.lock.Close()
	return err
}

// removeTree deletes a temporary directory and its scratch directory. Processes that were killed a moment ago may
// still be writing: it tries some times.
func removeTree(dir string) error {
	var err error
	for try := range 5 {
		time.Sleep(time.Duration(try) * 100 * time.Millisecond)
		link := filepath.Join(dir, scratchLink)
		if scratch, lerr := os.Readlink(link); lerr == nil && isScratch(scratch) {
			if err = removeScratch(scratch); err != nil {
				continue
			}
		}
		if err = unmountBelow(dir); err != nil {
			continue
		}
		if err = os.RemoveAll(dir); err == nil {
			return nil
		}
	}
	return err
}

// unmountBelow detaches what is mounted below a directory that is about to be deleted. A build that was killed may have
// left the host's own /dev/shm there: to delete through it would empty that. What can't be detached keeps the directory.
func unmountBelow(dir string) error {
	dir, err := filepath.EvalSymlinks(dir)
	if err != nil {
		return err
	}
	table, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return err
	}
	var points []string
	for line := range strings.Lines(string(table)) {
		fields := strings.Fields(line)
		if len(fields) < 5 {
			continue
		}
		point := mountEscapes.Replace(fields[4])
		if point == dir || strings.HasPrefix(point, dir+"/") {
			points = append(points, point)
		}
	}
	for _, point := range slices.Backward(points) { // the latest first: it may lie on an earlier one
		if err := unix.Unmount(point, unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW); err != nil {
			return fmt.Errorf("%s is still mounted: %w", point, err)
		}
	}
	return nil
}

// mountEscapes are those of proc_pid_mountinfo(5).
var mountEscapes = strings.NewReplacer(`\040`, " ", `\011`, "\t", `\012`, "\n", `\134`, `\`)

// removeScratch deletes what mmdebstrap leaves when it is killed. It belongs to the subordinate users of this one:
// only their namespace can delete it.
func removeScratch(dir string) error {
	if err := unmountBelow(dir); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	if err := os.RemoveAll(dir); !errors.Is(err, fs.ErrPermission) {
		return err
	}
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	left, _ := filepath.Glob(filepath.Join(dir, "*"))
	exec.CommandContext(ctx, "mmdebstrap", append([]string{"--unshare-helper", "rm", "-rf", "--"}, left...)...).Run()
	return os.RemoveAll(dir)
}

func isScratch(dir string) bool {
	ok, _ := filepath.Match("/var/tmp/vigia-image-*", dir)
	return ok
}

// sweep deletes what processes that are gone left in the making.
func (s *Store) sweep() error {
	entries, err := os.ReadDir(filepath.Join(s.dir, ".tmp"))
	if err != nil {
		return fmt.Errorf("image store: %w", err)
	}
	for _, e := range entries {
		dir := filepath.Join(s.dir, ".tmp", e.Name())
		f, err := os.Open(dir)
		if err != nil {
			continue
		}
		if unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB) == nil {
			removeTree(dir)
		}
		f.Close()
	}
	return nil
}

// allocated is what a file takes of the disk: layers are sparse.
func allocated(info fs.FileInfo) uint64 {
	if st, ok := info.Sys().(*syscall.Stat_t); ok {
		return uint64(st.Blocks) * 512
	}
	return uint64(info.Size())
}
