// Package parts gives the benches the pieces of vigia's bench image, for a QEMU that vigia has nothing to do with.
package parts

import (
	"context"
	"os"
	"path/filepath"

	"vigia/internal/api/vigiav1"
	"vigia/internal/lab"
	"vigia/internal/volume"
)

// Image builds the bench image, or takes the one that is there.
func Image(ctx context.Context, l *lab.Lab) (*vigiav1.Image, error) {
	return l.Build(ctx, "recipes/bench.yaml", "bench", func(string) {})
}

// Parts are files: the disk is a raw copy of the image's, for the caller to write to and to remove.
type Parts struct {
	Kernel, Initrd, Disk string
}

// Take writes the raw copy into dir.
func Take(l *lab.Lab, img *vigiav1.Image, dir string) (Parts, error) {
	from := filepath.Join(l.State, "images", img.Id)
	p := Parts{Kernel: filepath.Join(from, "vmlinuz"), Initrd: filepath.Join(from, "initrd"), Disk: filepath.Join(dir, "disk.raw")}
	return p, export(filepath.Join(from, "disk.layer"), p.Disk)
}

func export(layer, raw string) error {
	src, err := os.Open(layer)
	if err != nil {
		return err
	}
	v, err := volume.Open([]*os.File{src}, nil, volume.Options{})
	if err != nil {
		return err
	}
	defer v.Close()
	dst, err := os.Create(raw)
	if err != nil {
		return err
	}
	defer dst.Close()
	return v.Export(dst, nil)
}
