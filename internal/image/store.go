package image

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"

	"vigia/internal/vm"
)

// Options of a Store. The zero value works in this process: the daemon gives a Worker and a Runner that are confined.
type Options struct {
	Worker  Worker // reads what is inside imported disks and kernels
	Confine Runner // runs qemu-img on imported disks; nil: Limited
	Cache   string // directory for downloaded packages; empty: none are kept
}

// Store keeps images in a directory. One process owns the directory; the methods may be called at the same time.
type Store struct {
	dir  string
	opts Options
	mu   sync.Mutex // names and the coming and going of images
}

// Open opens or makes the store in dir, and sweeps what crashed builds left there.
func Open(dir string, opts Options) (*Store, error) {
	for _, d := range []string{dir, filepath.Join(dir, "names"), filepath.Join(dir, ".tmp")} {
		if err := os.MkdirAll(d, 0o711); err != nil {
			return nil, fmt.Errorf("image store: %w", err)
		}
	}
	if opts.Worker == nil {
		opts.Worker = InProcess{}
	}
	if opts.Confine == nil {
		opts.Confine = Limited
	}
	s := &Store{dir: dir, opts: opts}
	return s, s.sweep()
}

// Image is one image of a store.
type Image struct {
	Info
	Cmdline string // the kernel's command line
	Root    string // LABEL=… or UUID=… of the root file system
	dir     string
	m       manifest
}

// OpenPart opens a part for reading; a machine without an initrd gets fs.ErrNotExist for it.
func (i *Image) OpenPart(name string) (*os.File, error) {
	if _, ok := i.m.Parts[name]; !ok {
		return nil, fmt.Errorf("image %s has no %s: %w", i.label(), name, fs.ErrNotExist)
	}
	f, err := os.Open(filepath.Join(i.dir, name))
	if err != nil {
		return nil, fmt.Errorf("%w: %s: %w", ErrCorrupt, i.label(), err)
	}
	return f, nil
}

// Path is where a part lies, for those who bind it into another root; empty if the image has no such part.
func (i *Image) Path(name string) string {
	if _, ok := i.m.Parts[name]; !ok {
		return ""
	}
	return filepath.Join(i.dir, name)
}

// OpenDisk opens the disk's layers, lowest first.
func (i *Image) OpenDisk() ([]*os.File, error) {
	f, err := i.OpenPart(PartDisk)
	if err != nil {
		return nil, err
	}
	return []*os.File{f}, nil
}

// OpenKernel opens the kernel.
func (i *Image) OpenKernel() (*os.File, error) { return i.OpenPart(PartKernel) }

// OpenInitrd opens the initrd; fs.ErrNotExist where the kernel needs none.
func (i *Image) OpenInitrd() (*os.File, error) { return i.OpenPart(PartInitrd) }

// OpenProfile opens the kernel's profile as package kernel encodes it.
func (i *Image) OpenProfile() (*os.File, error) { return i.OpenPart(PartProfile) }

// OpenReference opens the reference of the kernel's code; fs.ErrNotExist where the image has none.
func (i *Image) OpenReference() (*os.File, error) { return i.OpenPart(PartReference) }

// OpenModules opens the pack of the kernel's modules; fs.ErrNotExist where the image has none.
func (i *Image) OpenModules() (*os.File, error) { return i.OpenPart(PartModules) }

func (i *Image) label() string {
	if i.Name != "" {
		return i.Name
	}
	return i.ID[:12]
}

// Get finds an image by its name, its id, or the first eight or more digits of its id if only one has them.
func (s *Store) Get(nameOrID string) (Image, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.get(nameOrID)
}

func (s *Store) get(nameOrID string) (Image, error) {
	id, name, err := s.resolve(nameOrID)
	if err != nil {
		return Image{}, err
	}
	img, err := s.load(id)
	if img.Name = name; err != nil {
		return Image{}, fmt.Errorf("%w: %s: %w: build or import it again", ErrCorrupt, nameOrID, err)
	}
	return img, nil
}

// resolve turns what a person typed into an id and, where it was a name or the image has one, a name.
func (s *Store) resolve(nameOrID string) (id, name string, err error) {
	names, err := s.names()
	if err != nil {
		return "", "", err
	}
	if id, ok := names[nameOrID]; ok {
		return id, nameOrID, nil
	}
	ids, err := s.ids()
	if err != nil {
		return "", "", err
	}
	var found []string
	for _, id := range ids {
		if id == nameOrID || len(nameOrID) >= 8 && strings.HasPrefix(id, nameOrID) {
			found = append(found, id)
		}
	}
	switch len(found) {
	case 0:
		return "", "", s.unknown(nameOrID, names)
	case 1:
		return found[0], nameOf(names, found[0]), nil
	}
	return "", "", fmt.Errorf("%w: %q begins the ids of %d images: give more digits", ErrUnknown, nameOrID, len(found))
}

func (s *Store) unknown(nameOrID string, names map[string]string) error {
	if len(names) == 0 {
		return fmt.Errorf("%w: %q: there are none yet: make one with 'vigia image build debian'", ErrUnknown, nameOrID)
	}
	list := sortedKeys(names)
	if len(list) > 8 {
		list = append(list[:8], "…")
	}
	return fmt.Errorf("%w: %q: there are %s", ErrUnknown, nameOrID, strings.Join(list, ", "))
}

// load reads an image and checks what costs nothing: that all its parts are there in their full length.
func (s *Store) load(id string) (Image, error) {
	dir := filepath.Join(s.dir, id)
	m, err := readManifest(dir)
	if err != nil {
		return Image{}, err
	}
	img := Image{dir: dir, m: m, Cmdline: m.Cmdline, Root: m.Root, Info: Info{ID: id, Created: m.Created, Recipe: m.Recipe,
		Digest: m.Digest, Kernel: m.Kernel, Disk: m.Disk}}
	for name, p := range m.Parts {
		info, err := os.Lstat(filepath.Join(dir, name))
		if err != nil {
			return Image{}, fmt.Errorf("%s is missing", name)
		}
		if !info.Mode().IsRegular() || info.Size() != p.Bytes {
			return Image{}, fmt.Errorf("%s has %d bytes, should have %d", name, info.Size(), p.Bytes)
		}
		img.Bytes += allocated(info)
	}
	return img, nil
}

// List lists all images by name; one with several names is there once for each, one that lost its name last. A damaged
// one is listed with its name and id only.
func (s *Store) List() ([]Info, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	names, err := s.names()
	if err != nil {
		return nil, err
	}
	ids, err := s.ids()
	if err != nil {
		return nil, err
	}
	list := []Info{}
	add := func(name, id string) {
		img, err := s.load(id)
		if err != nil {
			img.Info = Info{ID: id}
		}
		img.Name = name
		list = append(list, img.Info)
	}
	for _, name := range sortedKeys(names) {
		add(name, names[name])
	}
	for _, id := range ids {
		if nameOf(names, id) == "" {
			add("", id)
		}
	}
	return list, nil
}

// FindRecipe finds the newest image built from a recipe with this digest, so that one that is there need not be
// built again.
func (s *Store) FindRecipe(digest string) (Image, bool) {
	list, err := s.List()
	if err != nil || digest == "" {
		return Image{}, false
	}
	var best Info
	for _, i := range list {
		if i.Digest == digest && i.Created.After(best.Created) {
			best = i
		}
	}
	if best.ID == "" {
		return Image{}, false
	}
	img, err := s.Get(best.ID)
	return img, err == nil
}

// Tag gives an image a name, taking it from the image that had it.
func (s *Store) Tag(nameOrID, name string) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	id, _, err := s.resolve(nameOrID)
	if err != nil {
		return err
	}
	return s.setName(name, id)
}

// Remove removes a name, and with its last name the image; given an id, the image and all its names. Whether a machine
// still needs it the caller knows.
func (s *Store) Remove(nameOrID string) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	id, _, err := s.resolve(nameOrID)
	if err != nil {
		return err
	}
	names, err := s.names()
	if err != nil {
		return err
	}
	_, byName := names[nameOrID]
	left := 0
	for n, of := range names {
		if of != id {
			continue
		}
		if byName && n != nameOrID {
			left++
			continue
		}
		if err := os.Remove(filepath.Join(s.dir, "names", n)); err != nil {
			return fmt.Errorf("image %s: %w", nameOrID, err)
		}
	}
	if left > 0 {
		return nil
	}
	return s.discard(id)
}

// discard takes an image out of the store in one step, then deletes it at leisure.
func (s *Store) discard(id string) error {
	trash, err := s.temporary()
	if err != nil {
		return err
	}
	defer trash.remove()
	err = os.Rename(filepath.Join(s.dir, id), filepath.Join(trash.dir, id))
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	return err
}

// Verify reads every part of an image and compares it with its hash.
func (s *Store) Verify(ctx context.Context, nameOrID string) (Image, error) {
	img, err := s.Get(nameOrID)
	if err != nil {
		return Image{}, err
	}
	for _, name := range parts {
		want, ok := img.m.Parts[name]
		if !ok {
			continue
		}
		f, err := img.OpenPart(name)
		if err != nil {
			return Image{}, err
		}
		got, err := measure(ctx, f, nil)
		f.Close()
		if err != nil {
			return Image{}, fmt.Errorf("image %s: %s: %w", nameOrID, name, err)
		}
		if got != want {
			return Image{}, fmt.Errorf("%w: %s: the content of %s has changed: build or import it again", ErrCorrupt, nameOrID, name)
		}
	}
	return img, nil
}

// names reads all names. A name whose file does not hold an id counts as absent, like one whose image is gone.
func (s *Store) names() (map[string]string, error) {
	entries, err := os.ReadDir(filepath.Join(s.dir, "names"))
	if err != nil {
		return nil, fmt.Errorf("image store: %w", err)
	}
	names := map[string]string{}
	for _, e := range entries {
		text, err := os.ReadFile(filepath.Join(s.dir, "names", e.Name()))
		id := strings.TrimSpace(string(text))
		if err != nil || !idPattern.MatchString(id) {
			continue
		}
		if _, err := os.Stat(filepath.Join(s.dir, id)); err == nil {
			names[e.Name()] = id
		}
	}
	return names, nil
}

func (s *Store) ids() ([]string, error) {
	entries, err := os.ReadDir(s.dir)
	if err != nil {
		return nil, fmt.Errorf("image store: %w", err)
	}
	var ids []string
	for _, e := range entries {
		if idPattern.MatchString(e.Name()) {
			ids = append(ids, e.Name())
		}
	}
	return ids, nil
}

// setName writes a name's file whole and puts it in place.
func (s *Store) setName(name, id string) error {
	if _, err := vm.ParseName(name); err != nil {
		return err
	}
	trash, err := s.temporary()
	if err != nil {
		return err
	}
	defer trash.remove()
	next := filepath.Join(trash.dir, "name")
	if err := writeSynced(next, []byte(id+"\n"), 0o644); err != nil {
		return err
	}
	if err := os.Rename(next, filepath.Join(s.dir, "names", name)); err != nil {
		return err
	}
	return syncDir(filepath.Join(s.dir, "names"))
}

func nameOf(names map[string]string, id string) string {
	for _, n := range sortedKeys(names) {
		if names[n] == id {
			return n
		}
	}
	return ""
}

func sortedKeys(m map[string]string) []string {
	keys := make([]string, 0, len(m))
	for k := range m {
		keys = append(keys, k)
	}
	slices.Sort(keys)
	return keys
}
