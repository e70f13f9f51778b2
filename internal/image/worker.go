package image

import (
	"context"
	"errors"
	"fmt"
	"os"

	"vigia/internal/kernel"
)

// Worker reads bytes that a stranger wrote: a disk to import, the file systems on it, a kernel. The daemon gives one
// whose methods run in a confined process with nothing but the files they are given; InProcess is the same code in
// this process. A Worker keeps nothing between calls.
type Worker interface {
	// Sniff tells the format of a disk file.
	Sniff(ctx context.Context, disk *os.File) (Format, error)
	// Inspect finds the root file system of a raw disk, and the kernel in its /boot.
	Inspect(ctx context.Context, disk *os.File) (Found, error)
	// Extract copies one file of a file system that Inspect found.
	Extract(ctx context.Context, disk *os.File, at Place, path string, dst *os.File) error
	// Profile reads a kernel and writes its profile, and the reference of its code; the latter stays empty where the
	// kernel lacks what it takes.
	Profile(ctx context.Context, kernel, profile, reference *os.File) error
	// Modules packs the modules of a kernel's version, from a file system that Inspect found; without any, dst stays empty.
	Modules(ctx context.Context, disk *os.File, at Place, version string, dst *os.File) error
}

// InProcess is the Worker of this very process, for tests and for those who trust the disk.
type InProcess struct{}

func (InProcess) Sniff(_ context.Context, disk *os.File) (Format, error)  { return Sniff(disk) }
func (InProcess) Inspect(_ context.Context, disk *os.File) (Found, error) { return Inspect(disk) }
func (InProcess) Extract(_ context.Context, disk *os.File, at Place, path string, dst *os.File) error {
	return Extract(disk, at, path, dst)
}
func (InProcess) Modules(_ context.Context, disk *os.File, at Place, version string, dst *os.File) error {
	return Modules(disk, at, version, dst)
}
func (InProcess) Profile(_ context.Context, kernel, profile, reference *os.File) error {
	return Profile(kernel, profile, reference)
}

// Profile reads a kernel file and writes its profile and its reference into empty files.
func Profile(src, profile, reference *os.File) error {
	info, err := src.Stat()
	if err != nil {
		return err
	}
	p, ref, why, err := kernel.BuildAll(src, info.Size())
	if err != nil {
		return fmt.Errorf("reading the kernel: %w", err)
	}
	if why == nil {
		err = ref.Encode(reference)
	}
	return errors.Join(err, p.Encode(profile))
}
