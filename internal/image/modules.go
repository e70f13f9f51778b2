package image

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path"

	"vigia/internal/kernel"
	"vigia/internal/volume/ext4"
)

// Limits of what is looked through for modules: a distribution's kernel has some 4,000 in 500 directories.
const (
	maxModuleDirs    = 1 << 13
	maxModuleEntries = 1 << 13
	maxModuleBytes   = 64 << 20
)

// Modules packs the modules of a kernel version, of a file system on a raw disk, into the empty file dst. Without any, dst
// stays empty. It reads what a stranger may have written: run it confined.
func Modules(disk *os.File, at Place, version string, dst *os.File) error {
	fsys, err := ext4.Open(disk, at.Offset, at.Size)
	if err != nil {
		return err
	}
	var files []string
	for _, base := range []string{"/usr/lib/modules/", "/lib/modules/"} {
		if files, err = moduleFiles(fsys, base+version); len(files) > 0 || err != nil && !errors.Is(err, fs.ErrNotExist) {
			break
		}
	}
	if len(files) == 0 {
		if errors.Is(err, fs.ErrNotExist) {
			err = nil
		}
		return err
	}
	_, err = kernel.PackModules(dst, files, func(file string) ([]byte, error) { return fsys.ReadFile(file, maxModuleBytes) })
	return err
}

// moduleFiles lists the modules below a directory.
func moduleFiles(fsys *ext4.FS, base string) (files []string, err error) {
	dirs := []string{base}
	for i := 0; i < len(dirs); i++ {
		entries, err := fsys.ReadDir(dirs[i], maxModuleEntries)
		if err != nil {
			return nil, err
		}
		for _, e := range entries {
			name := path.Join(dirs[i], e.Name())
			switch {
			case e.Mode().IsDir() && e.Name() != "." && e.Name() != "..":
				if len(dirs) == maxModuleDirs {
					return nil, fmt.Errorf("%s: too many directories", base)
				}
				dirs = append(dirs, name)
			case e.Mode().IsRegular() && kernel.ModuleName(name) != "":
				files = append(files, name)
			}
		}
	}
	return files, nil
}

// addModules has a Worker pack the modules that the kernel of version finds on a raw disk.
func (s *Store) addModules(ctx context.Context, t *temporary, raw string, at Place, version string) error {
	disk, err := os.Open(raw)
	if err != nil {
		return err
	}
	defer disk.Close()
	if !versionPattern.MatchString(version) {
		return nil
	}
	err = create(t.path(PartModules), func(f *os.File) error { return s.opts.Worker.Modules(ctx, disk, at, version, f) })
	if err != nil {
		return fmt.Errorf("reading the kernel's modules: %w", err)
	}
	if st, err := os.Stat(t.path(PartModules)); err != nil || st.Size() > 0 {
		return err
	}
	return os.Remove(t.path(PartModules))
}
