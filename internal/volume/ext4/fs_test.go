package ext4

import (
	"bytes"
	"errors"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// makeImage makes a file system with mke2fs, filled from a directory.
func makeImage(t *testing.T, size, dir string, args ...string) (*os.File, int64) {
	t.Helper()
	if _, err := exec.LookPath("mke2fs"); err != nil {
		t.Skip("no mke2fs: install e2fsprogs")
	}
	name := filepath.Join(t.TempDir(), "disk")
	args = append(args, "-q", "-F", "-d", dir, name, size)
	if out, err := exec.Command("mke2fs", args...).CombinedOutput(); err != nil {
		t.Fatalf("mke2fs %v: %v: %s", args, err, out)
	}
	f, err := os.Open(name)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	info, err := f.Stat()
	if err != nil {
		t.Fatal(err)
	}
	return f, info.Size()
}

func sampleTree(t *testing.T) (string, map[string][]byte) {
	t.Helper()
	dir := t.TempDir()
	files := map[string][]byte{
		"boot/vmlinuz-6.1": bytes.Repeat([]byte("kernel!?"), 300_000), "etc/passwd": []byte("root:x:0:0::/:\n"), "empty": nil,
		"a/b/c/deep": []byte("deep"), "exact": bytes.Repeat([]byte{7}, 4096), "sparse": append(make([]byte, 1<<20), "end"...),
		"small-enough-for-the-inode": []byte(strings.Repeat("0123456789", 12)),
	}
	for name, b := range files {
		p := filepath.Join(dir, name)
		if err := errors.Join(os.MkdirAll(filepath.Dir(p), 0o755), os.WriteFile(p, b, 0o640)); err != nil {
			t.Fatal(err)
		}
	}
	links := map[string]string{"vmlinuz": "boot/vmlinuz-6.1", "loop1": "loop2", "loop2": "loop1", "abs": "/a/b", "out": "../../../../etc/passwd",
		"long": strings.Repeat("./", 60) + "etc/passwd", "dangling": "nowhere", "dot": "."}
	for name, to := range links {
		if err := os.Symlink(to, filepath.Join(dir, name)); err != nil {
			t.Fatal(err)
		}
	}
	return dir, files
}

func TestReader(t *testing.T) {
	features := map[string][]string{
		"ext4":            {"-t", "ext4"},
		"ext4 1k":         {"-t", "ext4", "-b", "1024"},
		"ext4 64k":        {"-t", "ext4", "-b", "65536"},
		"ext3":            {"-t", "ext3", "-b", "1024"},
		"ext2":            {"-t", "ext2", "-b", "1024"},
		"revision 0":      {"-t", "ext2", "-r", "0", "-O", "none"},
		"128-byte inodes": {"-t", "ext4", "-I", "128", "-O", "^metadata_csum,^64bit"},
		"inline_data":     {"-t", "ext4", "-O", "inline_data", "-I", "512"},
		"bigalloc":        {"-t", "ext4", "-O", "bigalloc", "-C", "32768"},
		"meta_bg":         {"-t", "ext4", "-b", "1024", "-O", "meta_bg,^resize_inode"},
		"sparse_super2":   {"-t", "ext4", "-O", "sparse_super2"},
		"no flex_bg":      {"-t", "ext4", "-b", "1024", "-O", "^flex_bg"},
		"no filetype":     {"-t", "ext4", "-O", "^filetype"},
	}
	dir, files := sampleTree(t)
	for name, args := range features {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			d, size := makeImage(t, "48M", dir, args...)
			f, err := Open(d, 0, size)
			if err != nil {
				t.Fatal(err)
			}
			for name, want := range files {
				got, err := f.ReadFile("/"+name, 4<<20)
				if err != nil || !bytes.Equal(got, want) {
					t.Errorf("%s: %d bytes, not %d: %v", name, len(got), len(want), err)
				}
			}
			readLinks(t, f, files)
			w, err := NewTracker(d, Filesystem{Size: size}, Options{Watch: []string{"/a/**", "/abs/c/*", "/vmlinuz"}})
			if err != nil {
				t.Fatal(err)
			}
			defer w.Close()
			if s := w.Stats(); s.Skipped != 0 || s.Watched != 2 || s.Degraded != "" {
				t.Errorf("%+v", s)
			}
			if got := w.watch.bound["/vmlinuz"]; got == 0 || got != w.watch.bound["/vmlinuz"] {
				t.Errorf("bound: %v", w.watch.bound)
			}
			if w.watch.bound["/abs/c/deep"] != w.watch.bound["/a/b/c/deep"] {
				t.Errorf("bound: %v", w.watch.bound)
			}
			if out, err := exec.Command("e2fsck", "-fn", d.Name()).CombinedOutput(); err != nil {
				t.Errorf("e2fsck: %v: %s", err, out)
			}
		})
	}
}

func readLinks(t *testing.T, f *FS, files map[string][]byte) {
	t.Helper()
	for name, to := range map[string]string{"/vmlinuz": "boot/vmlinuz-6.1", "/out": "etc/passwd", "/long": "etc/passwd", "/abs/c/deep": "a/b/c/deep", "/dot/dot/a/../etc/passwd": "etc/passwd"} {
		got, err := f.ReadFile(name, 4<<20)
		if err != nil || !bytes.Equal(got, files[to]) {
			t.Errorf("%s: %d bytes: %v", name, len(got), err)
		}
	}
	for _, name := range []string{"/loop1", "/dangling", "/etc/passwd/x", "/a", "/no"} {
		if _, err := f.Open(name); err == nil {
			t.Errorf("%s was opened", name)
		}
	}
	if _, err := f.Stat("/dangling"); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("%v", err)
	}
	if i, err := f.Lstat("/loop1"); err != nil || i.Mode()&fs.ModeSymlink == 0 {
		t.Errorf("%v %v", i, err)
	}
	if _, err := f.ReadDir("/", 3); !errors.Is(err, ErrTooLarge) {
		t.Errorf("%v", err)
	}
	if i, err := f.Stat("/etc/passwd"); err != nil || i.Mode() != 0o640 || i.Name() != "passwd" || i.Size() != 15 {
		t.Errorf("%v %v", i, err)
	}
}

func TestRefused(t *testing.T) {
	dir := t.TempDir()
	d, size := makeImage(t, "16M", dir, "-t", "ext4")
	b := make([]byte, size)
	if _, err := d.ReadAt(b, 0); err != nil {
		t.Fatal(err)
	}
	change := func(at int, v ...byte) *disk {
		c := bytes.Clone(b)
		copy(c[1024+at:], v)
		return &disk{b: c}
	}
	for name, c := range map[string]struct {
		d    *disk
		size int64
		want string
	}{
		"empty":          {&disk{}, 0, "not an ext4 file system"},
		"zeros":          {&disk{b: make([]byte, 1<<20)}, 1 << 20, "not an ext4 file system"},
		"cut":            {&disk{b: b[:size/2]}, size / 2, "on a volume of"},
		"compression":    {change(0x60, 0xC3), size, "compression"},
		"journal device": {change(0x60, 0xCA), size, "external journal of another"},
		"unknown":        {change(0x63, 0x80), size, "incompat 0x80000000"},
		"block size":     {change(0x18, 30), size, "block size"},
		"groups":         {change(0x28, 8), size, "inodes in"},
	} {
		if _, err := Open(c.d, 0, c.size); err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %v", name, err)
		}
	}
	external := change(0xE0, 0, 0, 0, 0)
	f, err := Open(external, 0, size)
	if err != nil || len(f.Notes()) != 1 {
		t.Fatalf("%v %v", f.Notes(), err)
	}
	w := newTracker(t, external, size, Options{})
	if s := w.Stats(); s.Journal != "external" || !strings.Contains(s.Degraded, "another device") {
		t.Errorf("%+v", s)
	}
}
