package image

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"vigia/internal/vm"
)

// ImportOptions say what an imported disk does not.
type ImportOptions struct {
	Kernel  string // path of a kernel file; empty: the newest in the disk's own /boot
	Initrd  string // path of an initrd; only with Kernel
	Cmdline string // added to the kernel's command line; with root= in it, in place of the root that was found
}

// Import makes an image of a disk file: raw, qcow2, vmdk or vdi. The disk may be a stranger's: nothing in it is looked
// at here, but by the Worker and, where it must be converted, by qemu-img under the Store's Runner. When Import fails
// or the context ends, nothing is left behind.
func (s *Store) Import(ctx context.Context, file, name string, o ImportOptions, progress Progress) (Image, error) {
	if _, err := vm.ParseName(name); err != nil {
		return Image{}, fmt.Errorf("image: %w", err)
	}
	if hasControl(o.Cmdline) || len(o.Cmdline) > 1024 {
		return Image{}, fmt.Errorf("image import %s: %w: the command line is longer than 1024 bytes or has a control character", file, vm.ErrInvalid)
	}
	if o.Initrd != "" && o.Kernel == "" {
		return Image{}, fmt.Errorf("image import %s: %w: an initrd belongs to a kernel: give --kernel too", file, vm.ErrInvalid)
	}
	progress = progress.throttled()
	img, err := s.make(ctx, name, func(t *temporary) (manifest, error) {
		return s.importDisk(ctx, t, file, o, progress)
	}, progress)
	if err != nil {
		return Image{}, fmt.Errorf("image import %s: %w", file, err)
	}
	return img, nil
}

func (s *Store) importDisk(ctx context.Context, t *temporary, file string, o ImportOptions, progress Progress) (manifest, error) {
	ctx, stop := s.guardRoom(ctx)
	defer stop()
	src, err := openRegular(file)
	if err != nil {
		return manifest{}, err
	}
	defer src.Close()
	progress.step("reading " + filepath.Base(file))
	format, err := s.opts.Worker.Sniff(ctx, src)
	if err != nil {
		return manifest{}, err
	}
	raw := t.path("disk.raw")
	if format.Name == "raw" {
		err = copyFile(ctx, src, raw)
	} else {
		err = s.convert(ctx, t, src, format, raw, progress)
	}
	if err != nil {
		return manifest{}, err
	}
	m := manifest{Origin: "import", Recipe: filepath.Base(file), Disk: uint64(format.Size+511) / 512 * 512}
	if err := s.importBoot(ctx, t, raw, o, &m, progress); err != nil {
		return manifest{}, err
	}
	return m, s.addLayer(ctx, t, raw, format.Size, progress)
}

// importBoot gets kernel, initrd and command line: from the disk, or as given.
func (s *Store) importBoot(ctx context.Context, t *temporary, raw string, o ImportOptions, m *manifest, progress Progress) error {
	disk, err := os.Open(raw)
	if err != nil {
		return err
	}
	defer disk.Close()
	progress.step("looking for the root and its kernel")
	found, err := s.opts.Worker.Inspect(ctx, disk)
	ownRoot := rootWord.FindStringSubmatch(o.Cmdline)
	if err != nil && (ownRoot == nil || o.Kernel == "") {
		if errors.Is(err, ErrNoRoot) {
			return fmt.Errorf("%w: to start it all the same, give --kernel and --cmdline with root=", err)
		}
		return err
	}
	switch {
	case ownRoot != nil:
		m.Root, m.Cmdline = ownRoot[1], joinWords(baseCmdline, o.Cmdline)
	case found.UUID != "":
		m.Root = "UUID=" + found.UUID
	default:
		m.Root = found.Device
	}
	if ownRoot == nil {
		m.Cmdline = joinWords("root="+m.Root, "rootfstype="+found.Kind, "ro", baseCmdline, o.Cmdline)
	}
	if m.Kernel = found.Version; o.Kernel != "" {
		m.Kernel = strings.TrimPrefix(filepath.Base(o.Kernel), "vmlinuz-")
	}
	if found.Root.Size > 0 {
		if err := s.addModules(ctx, t, raw, found.Root, m.Kernel); err != nil {
			return err
		}
	}
	if o.Kernel != "" {
		return s.takeKernel(ctx, t, o)
	}
	if found.Kernel == "" {
		return fmt.Errorf("%w: give --kernel, and --initrd if it needs one", ErrNoKernel)
	}
	if err := s.extract(ctx, disk, found.Boot, found.Kernel, t.path(PartKernel)); err != nil {
		return err
	}
	if found.Initrd == "" {
		return nil
	}
	return s.extract(ctx, disk, found.Boot, found.Initrd, t.path(PartInitrd))
}

var rootWord = regexp.MustCompile(`(?:^|\s)root=(\S+)`)

func (s *Store) takeKernel(ctx context.Context, t *temporary, o ImportOptions) error {
	for _, file := range []struct{ from, part string }{{o.Kernel, PartKernel}, {o.Initrd, PartInitrd}} {
		if file.from == "" {
			continue
		}
		src, err := openRegular(file.from)
		if err != nil {
			return err
		}
		err = copyFile(ctx, src, t.path(file.part))
		src.Close()
		if err != nil {
			return err
		}
	}
	return nil
}

// convert has qemu-img write the disk as a raw file. It works on a copy that any user may read, since the Runner may
// run it as another one, and on descriptors alone: the names in its arguments are those of its own descriptors, the
// format is the one that was recognised here, and a backing file is excluded whatever the header may say.
func (s *Store) convert(ctx context.Context, t *temporary, src *os.File, format Format, raw string, progress Progress) error {
	qemuImg, err := findTool("qemu-img", "qemu-utils")
	if err != nil {
		return err
	}
	copied := t.path("foreign")
	if err := copyFile(ctx, src, copied); err != nil {
		return err
	}
	defer os.Remove(copied)
	in, err := openShared(copied, os.O_RDONLY, 0o644)
	if err != nil {
		return err
	}
	defer in.Close()
	out, err := openShared(raw, os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o666)
	if err != nil {
		return err
	}
	defer out.Close()
	if err := out.Truncate(format.Size); err != nil {
		return err
	}
	source := imageFile(format.Name, 3)
	if format.Name == "qcow2" {
		progress.step("checking the file")
		said := &tail{}
		err := s.opts.Confine(ctx, Command{Path: qemuImg, Args: []string{"check", "-q", source}, Files: []*os.File{in}, Stdout: said, Stderr: said})
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		if err != nil {
			return fmt.Errorf("%w: the file is damaged or cut off: %w", ErrFormat, said.explain("qemu-img check", err))
		}
	}
	progress.step("converting from " + format.Name)
	said := &tail{}
	err = s.opts.Confine(ctx, Command{Path: qemuImg, Files: []*os.File{in, out}, Stdout: &percent{progress: progress}, Stderr: said,
		Args: []string{"convert", "-p", "-n", "--target-is-zero", "-O", "raw", source, FilePath(4)}})
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	if err != nil {
		return fmt.Errorf("%w: %w", ErrFormat, said.explain("qemu-img convert", err))
	}
	return out.Sync()
}

// imageFile names a descriptor as an image of one format without a backing file.
func imageFile(format string, fd int) string {
	tree := map[string]any{"driver": format, "file": map[string]any{"driver": "file", "filename": FilePath(fd), "locking": "off"}}
	if format != "vdi" { // which knows no backing files
		tree["backing"] = nil
	}
	text, _ := json.Marshal(tree)
	return "json:" + string(text)
}

// percent turns qemu-img's "(12.50/100%)" into progress.
type percent struct{ progress Progress }

func (p *percent) Write(b []byte) (int, error) {
	text := string(b)
	if i := strings.LastIndexByte(text, '('); i >= 0 && p.progress != nil {
		var done float64
		if _, err := fmt.Sscanf(text[i:], "(%f/100%%)", &done); err == nil {
			p.progress("converting", int64(done*100), 10000)
		}
	}
	return len(b), nil
}

// reserve is the room that an import leaves on the host's disk. A small file may grow without end: clusters that are
// used many times over, or compressed.
const reserve = 512 << 20

// errNoRoom ends an import that would fill the host's disk.
var errNoRoom = errors.New("the host's disk has less than 512 MiB left: make room, or import a smaller disk")

// guardRoom ends a context when the store's file system gets full.
func (s *Store) guardRoom(ctx context.Context) (context.Context, func()) {
	ctx, cancel := context.WithCancelCause(ctx)
	full := func() bool {
		var st unix.Statfs_t
		return unix.Statfs(s.dir, &st) == nil && st.Bavail*uint64(st.Bsize) < reserve
	}
	if full() {
		cancel(errNoRoom)
	}
	go func() {
		tick := time.NewTicker(100 * time.Millisecond)
		defer tick.Stop()
		for {
			select {
			case <-ctx.Done():
				return
			case <-tick.C:
				if full() {
					cancel(errNoRoom)
				}
			}
		}
	}()
	return ctx, func() { cancel(context.Canceled) }
}

// openRegular opens a regular file and nothing else: no device, no pipe that would block.
func openRegular(name string) (*os.File, error) {
	f, err := os.OpenFile(name, os.O_RDONLY|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	info, err := f.Stat()
	if err == nil && !info.Mode().IsRegular() {
		err = fmt.Errorf("%s: not a regular file", name)
	}
	if err == nil && info.Size() == 0 {
		err = fmt.Errorf("%s: the file is empty", name)
	}
	if err != nil {
		f.Close()
		return nil, err
	}
	return f, nil
}

// openShared opens a file in the store's own temporary directory so that other users who are handed it may reopen it.
func openShared(name string, flags int, perm os.FileMode) (*os.File, error) {
	f, err := os.OpenFile(name, flags, 0o600)
	if err != nil {
		return nil, err
	}
	if err := f.Chmod(perm); err != nil {
		f.Close()
		return nil, err
	}
	return f, nil
}

// copyFile copies the data of a file and keeps its holes.
func copyFile(ctx context.Context, src *os.File, to string) error {
	info, err := src.Stat()
	if err != nil {
		return err
	}
	size := info.Size()
	return create(to, func(dst *os.File) error {
		if err := dst.Truncate(size); err != nil {
			return err
		}
		if unix.IoctlFileClone(int(dst.Fd()), int(src.Fd())) == nil {
			return nil
		}
		for at := nextData(src, 0, size); at < size; {
			if ctx.Err() != nil {
				return context.Cause(ctx)
			}
			n := min(4<<20, size-at)
			if _, err := io.Copy(io.NewOffsetWriter(dst, at), io.NewSectionReader(src, at, n)); err != nil {
				return err
			}
			at = nextData(src, at+n, size)
		}
		return nil
	})
}
