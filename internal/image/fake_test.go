package image

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// fakeKernels is a Worker that takes any file for a kernel: real ones are too large for tests.
type fakeKernels struct{ InProcess }

func (fakeKernels) Profile(_ context.Context, kernel, profile, reference *os.File) error {
	head := make([]byte, 4)
	if _, err := kernel.ReadAt(head, 0); err != nil {
		return err
	}
	_, err1 := fmt.Fprintf(profile, "profile of %s", head)
	_, err2 := fmt.Fprintf(reference, "reference of %s", head)
	return errors.Join(err1, err2)
}

func openStore(t *testing.T) *Store {
	t.Helper()
	s, err := Open(filepath.Join(t.TempDir(), "images"), Options{Worker: fakeKernels{}})
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// addImage puts an image with a small disk into the store, as Build would.
func addImage(t *testing.T, s *Store, name, content string) Image {
	t.Helper()
	img, err := s.make(t.Context(), name, func(tmp *temporary) (manifest, error) {
		if err := os.WriteFile(tmp.path(PartKernel), []byte("kernel "+content), 0o600); err != nil {
			return manifest{}, err
		}
		disk := append(bytes.Repeat([]byte(content+" "), 1000), make([]byte, 1<<20)...)
		if err := os.WriteFile(tmp.path("raw"), disk, 0o600); err != nil {
			return manifest{}, err
		}
		m := manifest{Origin: "build", Recipe: "r", Digest: strings.Repeat("0", 60) + content, Kernel: "6.1", Cmdline: "root=LABEL=root", Root: "LABEL=root", Disk: uint64(len(disk))}
		return m, s.addLayer(t.Context(), tmp, tmp.path("raw"), int64(len(disk)), nil)
	}, nil)
	if err != nil {
		t.Fatal(err)
	}
	return img
}

// leftovers lists what is in the making: after every test, nothing should be.
func leftovers(t *testing.T, s *Store) {
	t.Helper()
	entries, err := os.ReadDir(filepath.Join(s.dir, ".tmp"))
	if err != nil || len(entries) != 0 {
		t.Errorf("left behind: %v %v", entries, err)
	}
}

type tarEntry struct {
	name, content string
	link          string
}

func fakeRoot(t *testing.T, name string) {
	entries := []tarEntry{
		{name: "./etc/"}, {name: "./usr/"}, {name: "./usr/bin/"}, {name: "./boot/"}, {name: "./usr/lib/modules/6.1.0-9/"},
		{name: "./boot/vmlinuz-6.1.0-9", content: "old kernel"},
		{name: "./boot/vmlinuz-6.1.0-10", content: "new kernel"},
		{name: "./usr/bin/busybox", content: "#!busybox"},
		{name: "./usr/bin/sh", link: "busybox"},
		{name: "./usr/lib/modules/6.1.0-10/modules.dep", content: "kernel/virtio_blk.ko: kernel/virtio.ko\nkernel/virtio.ko:\nkernel/other.ko:\n"},
		{name: "./usr/lib/modules/6.1.0-10/kernel/virtio_blk.ko", content: "driver"},
		{name: "./usr/lib/modules/6.1.0-10/kernel/virtio.ko", content: "bus"},
		{name: "./usr/lib/modules/6.1.0-10/kernel/other.ko", content: "other"},
	}
	err := create(name, func(f *os.File) error {
		w := tar.NewWriter(f)
		for _, e := range entries {
			h := &tar.Header{Name: e.name, Mode: 0o755, Size: int64(len(e.content)), Typeflag: tar.TypeReg}
			if strings.HasSuffix(e.name, "/") {
				h.Typeflag = tar.TypeDir
			}
			if e.link != "" {
				h.Typeflag, h.Linkname = tar.TypeSymlink, e.link
			}
			if err := w.WriteHeader(h); err != nil {
				return err
			}
			if _, err := w.Write([]byte(e.content)); err != nil {
				return err
			}
		}
		return w.Close()
	})
	if err != nil {
		t.Fatal(err)
	}
}

// fakeMmdebstrap puts a program of this name first in the PATH; the script gets the tar to write as $tar, and the
// tar of a small root as $root.
func fakeMmdebstrap(t *testing.T, script string) {
	t.Helper()
	if os.Geteuid() != 0 && canUnshare() != nil {
		t.Skip("neither root nor able to use user namespaces")
	}
	dir := t.TempDir()
	root := filepath.Join(dir, "root.tar")
	fakeRoot(t, root)
	text := "#!/bin/sh\nroot=" + quote(root) + "\nfor a; do case $a in */root.tar) tar=$a;; esac; done\n" + script + "\n"
	if err := os.WriteFile(filepath.Join(dir, "mmdebstrap"), []byte(text), 0o755); err != nil {
		t.Fatal(err)
	}
	t.Setenv("PATH", dir+":"+os.Getenv("PATH"))
}

func testRecipe(t *testing.T) Recipe {
	t.Helper()
	r, err := Parse("test.yaml", []byte("size: 64M\ninit: script\n"), nil)
	if err != nil {
		t.Fatal(err)
	}
	return r
}

// makeDisk makes a raw ext4 disk of a tree of files, as name: content; names ending in a slash are directories.
func makeDisk(t *testing.T, files map[string]string) string {
	t.Helper()
	tools, err := findBuilders()
	if err != nil && tools.mke2fs == "" {
		t.Skip(err)
	}
	dir, disk := t.TempDir(), filepath.Join(t.TempDir(), "disk.raw")
	for name, content := range files {
		at := filepath.Join(dir, name)
		if strings.HasSuffix(name, "/") {
			err = os.MkdirAll(at, 0o755)
		} else if err = os.MkdirAll(filepath.Dir(at), 0o755); err == nil {
			err = os.WriteFile(at, []byte(content), 0o644)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	run(t, tools.mke2fs, "-q", "-F", "-t", "ext4", "-L", "foreign", "-U", testUUID, "-d", dir, disk, "16M")
	return disk
}

const testUUID = "01234567-89ab-4def-8123-456789abcdef"

func run(t *testing.T, name string, args ...string) {
	t.Helper()
	if out, err := exec.Command(name, args...).CombinedOutput(); err != nil {
		t.Fatalf("%s %q: %v\n%s", name, args, err, out)
	}
}

func qemuImg(t *testing.T, args ...string) {
	t.Helper()
	tool, err := findTool("qemu-img", "qemu-utils")
	if err != nil {
		t.Skip(err)
	}
	run(t, tool, args...)
}
