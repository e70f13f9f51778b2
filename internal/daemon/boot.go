package daemon

import (
	"errors"
	"io"
	"os"
	"path/filepath"

	"vigia/internal/image"
	"vigia/internal/machine/boot"
)

// bootFiles are what QEMU is given as kernel and initrd of an image, in the place of its own: package boot says why. They are made at
// the first start and lie with the image. Where they can't be, the image's own serve, and each QEMU takes some more memory.
func (d *Daemon) bootFiles(img image.Image) (kernel, initrd string) {
	kernel, initrd = img.Path(image.PartKernel), img.Path(image.PartInitrd)
	dir := filepath.Join(filepath.Dir(kernel), "boot")
	d.booting.Lock()
	defer d.booting.Unlock()
	if _, err := os.Stat(dir); err != nil {
		if err := makeBoot(&img, dir); err != nil {
			if !errors.Is(err, boot.ErrKernel) {
				d.log.Warn("each QEMU takes a copy of its guest's kernel", "image", img.Name, "why", err)
			}
			return kernel, initrd
		}
	}
	return filepath.Join(dir, "loader"), filepath.Join(dir, "joined")
}

// makeBoot makes the directory of the two files, all at once.
func makeBoot(img *image.Image, dir string) error {
	kernel, err := img.OpenKernel()
	if err != nil {
		return err
	}
	defer kernel.Close()
	info, err := kernel.Stat()
	if err != nil {
		return err
	}
	var initrd io.Reader
	if f, err := img.OpenInitrd(); err == nil {
		defer f.Close()
		initrd = f
	}
	made := dir + ".new"
	os.RemoveAll(made) // a killed daemon's
	if err := os.Mkdir(made, 0o711); err != nil {
		return err
	}
	defer os.RemoveAll(made)
	loader, err1 := os.OpenFile(filepath.Join(made, "loader"), os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o444)
	joined, err2 := os.OpenFile(filepath.Join(made, "joined"), os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o444)
	defer closeFiles([]*os.File{loader, joined})
	if err := errors.Join(err1, err2); err != nil {
		return err
	}
	if err := boot.Join(kernel, info.Size(), initrd, loader, joined); err != nil {
		return err
	}
	// Each QEMU is another user, whatever this one's umask says.
	err = errors.Join(loader.Chmod(0o444), joined.Chmod(0o444), os.Chmod(made, 0o711))
	if err = errors.Join(err, loader.Sync(), joined.Sync(), syncDir(made)); err != nil {
		return err
	}
	if err := os.Rename(made, dir); err != nil {
		return err
	}
	return syncDir(filepath.Dir(dir))
}
