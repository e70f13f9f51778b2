package image

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"vigia/internal/vm"
	"vigia/internal/volume"
)

// rootLabel is the label of the root file system of every built image. The root is mounted by label, since the order
// of devices is not fixed.
const rootLabel = "root"

// baseCmdline is what every kernel started here is told: the serial line is the console; the timer check fails under
// software emulation on a busy host; a panic ends the machine, after the panic device has told why.
const baseCmdline = "console=ttyS0 quiet no_timer_check panic=1"

// Build makes an image from a recipe and gives it a name; an empty name is the recipe's. It takes from half a minute to
// some minutes. When it fails or the context ends, nothing is left behind.
func (s *Store) Build(ctx context.Context, r Recipe, name string, progress Progress) (Image, error) {
	if name == "" {
		name = r.Name
	}
	if _, err := vm.ParseName(name); err != nil {
		return Image{}, fmt.Errorf("image: %w", err)
	}
	if w := r.check(); w != nil {
		return Image{}, fmt.Errorf("%w: %s: %w", ErrRecipe, r.Name, w)
	}
	progress = progress.throttled()
	img, err := s.make(ctx, name, func(t *temporary) (manifest, error) {
		return s.build(ctx, t, r, progress)
	}, progress)
	if err != nil {
		return Image{}, fmt.Errorf("image build %s: %w", name, err)
	}
	return img, nil
}

// build fills a temporary directory with the parts of an image.
func (s *Store) build(ctx context.Context, t *temporary, r Recipe, progress Progress) (manifest, error) {
	tools, err := findBuilders()
	if err != nil {
		return manifest{}, err
	}
	epoch := sourceDate()
	tarball := t.path("root.tar")
	b := bootstrap{recipe: r, tools: tools, temporary: t, cache: s.opts.Cache, epoch: epoch, progress: progress}
	if err := b.run(ctx, tarball); err != nil {
		return manifest{}, err
	}
	progress.step("reading the new root")
	root, err := openRootTar(tarball)
	if err != nil {
		return manifest{}, err
	}
	defer root.Close()
	version, err := root.kernelVersion()
	if err != nil {
		return manifest{}, fmt.Errorf("%w: is %q a kernel package?", err, r.Kernel)
	}
	progress.step("writing kernel and initrd")
	if err := copyKernel(root, version, t.path(PartKernel)); err != nil {
		return manifest{}, err
	}
	if err := create(t.path(PartInitrd), func(f *os.File) error { return writeInitrd(f, root, version) }); err != nil {
		return manifest{}, err
	}
	progress.step("making the file system")
	raw := t.path("disk.raw")
	if err := (mkfs{tools: tools, temporary: t, recipe: r, epoch: epoch}).run(ctx, tarball, raw); err != nil {
		return manifest{}, err
	}
	if err := os.Remove(tarball); err != nil {
		return manifest{}, err
	}
	progress.step("packing the kernel's modules")
	if err := s.addModules(ctx, t, raw, Place{Size: int64(r.diskSize())}, version); err != nil {
		return manifest{}, err
	}
	if err := s.addLayer(ctx, t, raw, int64(r.diskSize()), progress); err != nil {
		return manifest{}, err
	}
	m := manifest{Origin: "build", Recipe: r.Name, Digest: r.Digest(), Kernel: version, Root: "LABEL=" + rootLabel, Disk: r.diskSize()}
	m.Cmdline = joinWords("root="+m.Root, "rootfstype=ext4 rw", baseCmdline, r.Cmdline)
	return m, nil
}

// make runs a function that fills a temporary directory with parts, adds what all images have, and puts the whole
// into the store in one step.
func (s *Store) make(ctx context.Context, name string, fill func(*temporary) (manifest, error), progress Progress) (Image, error) {
	t, err := s.temporary()
	if err != nil {
		return Image{}, err
	}
	defer t.remove()
	m, err := fill(t)
	if err != nil {
		return Image{}, err
	}
	progress.step("reading the kernel")
	if err := s.addProfile(ctx, t); err != nil {
		return Image{}, err
	}
	if err := m.measureParts(ctx, t, progress); err != nil {
		return Image{}, err
	}
	return s.adopt(ctx, t, m, name)
}

// addProfile makes the profile and the reference from the kernel.
func (s *Store) addProfile(ctx context.Context, t *temporary) error {
	kernel, err := os.Open(t.path(PartKernel))
	if err != nil {
		return err
	}
	defer kernel.Close()
	err = create(t.path(PartProfile), func(profile *os.File) error {
		return create(t.path(PartReference), func(reference *os.File) error {
			return s.opts.Worker.Profile(ctx, kernel, profile, reference)
		})
	})
	if err != nil {
		return err
	}
	if st, err := os.Stat(t.path(PartReference)); err != nil || st.Size() > 0 {
		return err
	}
	return os.Remove(t.path(PartReference))
}

// addLayer turns a raw disk into the layer and deletes the raw disk. It copies bytes and looks into none.
func (s *Store) addLayer(ctx context.Context, t *temporary, raw string, size int64, progress Progress) error {
	src, err := os.Open(raw)
	if err != nil {
		return err
	}
	defer src.Close()
	defer context.AfterFunc(ctx, func() { src.Close() })() // what reads it then ends
	err = create(t.path(PartDisk), func(f *os.File) error {
		_, err := volume.ImportRaw(f, src, size, func(done, total int64) {
			if progress != nil {
				progress("writing the disk layer", done, total)
			}
		})
		return err
	})
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	if err != nil {
		return err
	}
	return os.Remove(raw)
}

func (m *manifest) measureParts(ctx context.Context, t *temporary, progress Progress) error {
	m.Parts = map[string]part{}
	for _, name := range parts {
		f, err := os.Open(t.path(name))
		if errors.Is(err, os.ErrNotExist) {
			continue
		}
		if err != nil {
			return err
		}
		p, err := measure(ctx, f, func(done, total int64) {
			if progress != nil {
				progress("hashing "+name, done, total)
			}
		})
		if err == nil {
			err = f.Sync()
		}
		f.Close()
		if err != nil {
			return fmt.Errorf("%s: %w", name, err)
		}
		m.Parts[name] = p
	}
	m.Version, m.Created = formatVersion, time.Now().UTC().Truncate(time.Millisecond)
	m.ID = m.id()
	return nil
}

// adopt moves a finished image from its temporary directory into the store and names it. An image with the same
// content that is there already stays, and its twin is dropped.
func (s *Store) adopt(ctx context.Context, t *temporary, m manifest, name string) (Image, error) {
	final := t.path(m.ID)
	if err := os.Mkdir(final, 0o711); err != nil {
		return Image{}, err
	}
	for p := range m.Parts {
		if err := os.Rename(t.path(p), filepath.Join(final, p)); err != nil {
			return Image{}, err
		}
		if err := os.Chmod(filepath.Join(final, p), 0o444); err != nil {
			return Image{}, err
		}
	}
	if err := m.write(final); err != nil {
		return Image{}, err
	}
	if err := syncDir(final); err != nil {
		return Image{}, err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if ctx.Err() != nil {
		return Image{}, context.Cause(ctx)
	}
	if _, err := s.load(m.ID); err != nil {
		if err := s.discard(m.ID); err != nil { // damaged: the new one takes its place
			return Image{}, err
		}
		if err := os.Rename(final, filepath.Join(s.dir, m.ID)); err != nil {
			return Image{}, err
		}
		if err := syncDir(s.dir); err != nil {
			return Image{}, err
		}
	}
	if err := s.setName(name, m.ID); err != nil {
		return Image{}, err
	}
	return s.get(name)
}

func copyKernel(root *rootTar, version, name string) error {
	src, err := root.section("/boot/vmlinuz-" + version)
	if err != nil {
		return err
	}
	return create(name, func(f *os.File) error {
		_, err := io.Copy(f, src)
		return err
	})
}

// create makes a new file and has it filled.
func create(name string, fill func(*os.File) error) error {
	f, err := os.OpenFile(name, os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	defer f.Close()
	if err := fill(f); err != nil {
		return err
	}
	return f.Close()
}

// sourceDate is the time that files without a time of their own get: SOURCE_DATE_EPOCH where it is set, else the
// beginning of the day, so that two builds of one day differ in as little as possible.
func sourceDate() int64 {
	if n, err := strconv.ParseInt(os.Getenv("SOURCE_DATE_EPOCH"), 10, 64); err == nil && n > 0 {
		return n
	}
	return time.Now().UTC().Truncate(24 * time.Hour).Unix()
}

func joinWords(words ...string) string {
	return strings.Join(strings.Fields(strings.Join(words, " ")), " ")
}
