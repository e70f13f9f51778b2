package image

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"regexp"
	"slices"
	"strings"

	"vigia/internal/volume/ext4"
)

// Found is what Inspect found on a disk. Its texts are checked: they hold what they are said to hold and no more,
// whatever the disk says.
type Found struct {
	Root    Place  `json:"root"`    // the root file system
	Kind    string `json:"kind"`    // its kind: ext2, ext3 or ext4
	UUID    string `json:"uuid"`    // of the root file system; empty if it has none
	Device  string `json:"device"`  // what Linux calls it on a virtio disk, as /dev/vda1
	Boot    Place  `json:"boot"`    // where Kernel and Initrd are: the root, or a partition for /boot
	Kernel  string `json:"kernel"`  // path in Boot; empty if there is none
	Initrd  string `json:"initrd"`  // path in Boot; empty if there is none
	Version string `json:"version"` // from the kernel's file name
}

// Place is where a file system lies on a disk.
type Place struct {
	Offset int64 `json:"offset"`
	Size   int64 `json:"size"`
}

// Limits of what is read of a foreign disk: entries of a directory, and the two files taken from it.
const (
	maxBootEntries = 4096
	maxKernel      = 256 << 20
	maxInitrd      = 1 << 30
)

var (
	versionPattern = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9._+~-]{0,63}$`)
	uuidPattern    = regexp.MustCompile(`^[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$`)
)

// Inspect finds the root file system of a raw disk and the newest kernel in its /boot, or in a partition of its own for
// /boot. It reads what a stranger wrote: run it confined. No kernel is no error; no root is ErrNoRoot.
func Inspect(disk *os.File) (Found, error) {
	info, err := disk.Stat()
	if err != nil {
		return Found{}, err
	}
	return inspect(disk, info.Size())
}

func inspect(disk io.ReaderAt, size int64) (Found, error) {
	list, err := ext4.Find(disk, size)
	if err != nil && !errors.Is(err, ext4.ErrPartitions) {
		return Found{}, err
	}
	var found Found
	var boots []opened
	var broken error
	kinds := []string{}
	for _, at := range list {
		kinds = append(kinds, at.Kind)
		if !at.Named() {
			continue
		}
		fsys, err := ext4.Open(disk, at.Offset, at.Size)
		if err != nil {
			broken = fmt.Errorf("%s: %w", device(at.Partition), err)
			continue
		}
		here := opened{fsys, Place{at.Offset, at.Size}}
		if found.Kind == "" && looksLikeRoot(fsys) {
			found.Root, found.Kind, found.Device = here.place, at.Kind, device(at.Partition)
			if u := fsys.UUID(); uuidPattern.MatchString(u) && strings.Trim(u, "0-") != "" {
				found.UUID = u
			}
			boots = slices.Insert(boots, 0, here)
		} else {
			boots = append(boots, here)
		}
	}
	if found.Kind == "" {
		return Found{}, noRoot(kinds, err, broken)
	}
	for _, b := range boots {
		for _, dir := range []string{"/boot", "/"} {
			if found.Kernel == "" {
				b.findKernel(dir, &found)
			}
		}
	}
	return found, nil
}

type opened struct {
	fs    *ext4.FS
	place Place
}

func noRoot(kinds []string, table, broken error) error {
	what := "nothing that is known"
	if len(kinds) > 0 {
		what = strings.Join(slices.Compact(kinds), ", ")
	}
	if err := errors.Join(table, broken); err != nil {
		return fmt.Errorf("%w: it holds %s: %w", ErrNoRoot, what, err)
	}
	return fmt.Errorf("%w: it holds %s", ErrNoRoot, what)
}

func device(partition int) string {
	if partition == 0 {
		return "/dev/vda"
	}
	return fmt.Sprintf("/dev/vda%d", partition)
}

// looksLikeRoot tells a root from a /boot or /home: it has /etc and somewhere to put programs.
func looksLikeRoot(fsys *ext4.FS) bool {
	etc, err := fsys.Stat("/etc")
	if err != nil || !etc.IsDir() {
		return false
	}
	for _, dir := range []string{"/usr", "/sbin", "/bin"} {
		if d, err := fsys.Stat(dir); err == nil && d.IsDir() {
			return true
		}
	}
	return false
}

// findKernel looks for the newest kernel in a directory, and its initrd.
func (o opened) findKernel(dir string, found *Found) {
	entries, err := o.fs.ReadDir(dir, maxBootEntries)
	if err != nil {
		return
	}
	best := ""
	for _, e := range entries {
		v, ok := strings.CutPrefix(e.Name(), "vmlinuz-")
		if !ok || !versionPattern.MatchString(v) || strings.Contains(v, "rescue") || !o.isFile(path.Join(dir, e.Name()), maxKernel) {
			continue
		}
		if best == "" || compareVersions(v, best) > 0 {
			best = v
		}
	}
	if best == "" {
		return
	}
	found.Boot, found.Version, found.Kernel = o.place, best, path.Join(dir, "vmlinuz-"+best)
	for _, name := range []string{"initrd.img-" + best, "initramfs-" + best + ".img", "initrd-" + best} {
		if o.isFile(path.Join(dir, name), maxInitrd) {
			found.Initrd = path.Join(dir, name)
			return
		}
	}
}

func (o opened) isFile(name string, limit int64) bool {
	info, err := o.fs.Stat(name)
	return err == nil && info.Mode().IsRegular() && info.Size() > 0 && info.Size() <= limit
}

// Extract copies one regular file of a file system on a raw disk. It reads what a stranger wrote: run it confined.
func Extract(disk *os.File, at Place, name string, dst *os.File) error {
	fsys, err := ext4.Open(disk, at.Offset, at.Size)
	if err != nil {
		return err
	}
	src, err := fsys.Open(name)
	if err != nil {
		return err
	}
	if src.Size() > maxInitrd {
		return fmt.Errorf("%s: %d bytes, want at most %d", name, src.Size(), maxInitrd)
	}
	n, err := io.Copy(dst, io.LimitReader(src, maxInitrd))
	if err == nil && n != src.Size() {
		err = fmt.Errorf("%s: %w after %d bytes", name, io.ErrUnexpectedEOF, n)
	}
	return err
}

// extract has a Worker take one file out of a disk, into a new file of the host.
func (s *Store) extract(ctx context.Context, disk *os.File, at Place, name, to string) error {
	err := create(to, func(f *os.File) error { return s.opts.Worker.Extract(ctx, disk, at, name, f) })
	if errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("%w: %w", ErrNoKernel, err)
	}
	return err
}
