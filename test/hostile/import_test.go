package hostile

import (
	"bytes"
	"context"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"connectrpc.com/connect"

	"vigia/internal/api/vigiav1"
	"vigia/internal/image"
	"vigia/internal/volume"
)

// importers are the daemon's users under which imports are tried.
func importers() map[string]int {
	users := map[string]int{"caller": os.Getuid()}
	if os.Getuid() == 0 {
		users["nobody"] = 65534
	}
	return users
}

// foreignDisk makes a qcow2 of a small disk, and a kernel for it, where a daemon of any user may read them.
func foreignDisk(t *testing.T) (qcow2, raw, kernel string) {
	t.Helper()
	dir, err := os.MkdirTemp("", "vigia-hostile-disk-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	os.Chmod(dir, 0o755)
	raw, qcow2, kernel = makeDisk(t), filepath.Join(dir, "disk.qcow2"), filepath.Join(dir, "vmlinuz-6.1.0-10")
	mustRun(t, "qemu-img", "convert", "-O", "qcow2", "-c", raw, qcow2)
	kernels, _ := filepath.Glob(filepath.Join(tinyImages(t), "*", image.PartKernel))
	if len(kernels) == 0 {
		t.Skip("no kernel")
	}
	if err := copyFile(kernels[0], kernel); err != nil {
		t.Fatal(err)
	}
	os.Chmod(qcow2, 0o644)
	os.Chmod(kernel, 0o644)
	return qcow2, raw, kernel
}

// TestImport converts a foreign qcow2 in the jail, as root and as an ordinary user.
func TestImport(t *testing.T) {
	qcow2, raw, kernel := foreignDisk(t)
	for name, uid := range importers() {
		t.Run(name, func(t *testing.T) {
			h := newHost(t, "")
			h.own(uid)
			h.start(os.Getenv("PATH"))
			if err := h.importDisk(qcow2, kernel); err != nil {
				t.Fatalf("%v\n%s", err, h.said())
			}
			if want, err := os.ReadFile(raw); err != nil || !bytes.Equal(want, h.diskOf("foreign")) {
				t.Errorf("the image's disk is not what was imported: %v", err)
			}
		})
	}
}

// TestImportIsJailed has a program in qemu-img's place try to get out, and then to live for ever.
func TestImportIsJailed(t *testing.T) {
	qcow2, _, kernel := foreignDisk(t)
	for name, uid := range importers() {
		t.Run(name, func(t *testing.T) {
			h := newHost(t, "")
			h.own(uid)
			h.start(stubDir + ":" + os.Getenv("PATH"))
			err := h.importDisk(qcow2, kernel)
			if err == nil || !strings.Contains(err.Error(), "tried:") {
				t.Fatalf("the stub was not heard: %v", err)
			}
			if strings.Contains(err.Error(), "ESCAPED") {
				t.Error(err)
			}
			t.Log(err)
		})
	}
}

// own gives the state to a user, who will be the daemon's.
func (h *host) own(uid int) {
	h.t.Helper()
	h.owner = uint32(uid)
	if err := os.Lchown(h.state, uid, uid); err != nil {
		h.t.Fatal(err)
	}
}

func (h *host) importDisk(disk, kernel string) error {
	ctx, cancel := context.WithTimeout(h.t.Context(), time.Minute)
	defer cancel()
	s, err := h.client.Images.Import(ctx, connect.NewRequest(&vigiav1.ImportRequest{File: disk, Name: "foreign", Kernel: kernel}))
	if err != nil {
		return err
	}
	defer s.Close()
	for s.Receive() {
	}
	return s.Err()
}

// diskOf is the whole disk of an image.
func (h *host) diskOf(name string) []byte {
	h.t.Helper()
	s, err := image.Open(filepath.Join(h.state, "images"), image.Options{})
	if err != nil {
		h.t.Fatal(err)
	}
	img, err := s.Get(name)
	if err != nil {
		h.t.Fatal(err)
	}
	layers, err := img.OpenDisk()
	if err != nil {
		h.t.Fatal(err)
	}
	v, err := volume.Open(layers, nil, volume.Options{})
	if err != nil {
		h.t.Fatal(err)
	}
	defer v.Close()
	b := make([]byte, v.Size())
	if _, err := v.ReadAt(b, 0); err != nil {
		h.t.Fatal(err)
	}
	return b
}
