package scan

import (
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"vigia/internal/volume/ext4"
)

// twoTrees makes two file systems of one tree, the second one changed by change.
func twoTrees(t *testing.T, change func(root string)) (a, b *ext4.FS) {
	t.Helper()
	root := t.TempDir()
	old := time.Unix(1_700_000_000, 0)
	for name, text := range map[string]string{"etc/passwd": "root", "etc/motd": "hello", "usr/bin/true": strings.Repeat("x", 9000), "usr/bin/forged": "good", "home/gone": "g"} {
		path := filepath.Join(root, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
		os.Chtimes(path, old, old)
	}
	os.Symlink("/etc/motd", filepath.Join(root, "link"))
	a = fsOf(t, root)
	change(root)
	return a, fsOf(t, root)
}

func fsOf(t *testing.T, root string) *ext4.FS {
	t.Helper()
	mke2fs, err := exec.LookPath("mke2fs")
	if err != nil {
		mke2fs = "/sbin/mke2fs"
	}
	img := filepath.Join(t.TempDir(), "img")
	if out, err := exec.Command(mke2fs, "-q", "-t", "ext4", "-d", root, img, "4M").CombinedOutput(); err != nil {
		t.Fatalf("mke2fs: %v: %s", err, out)
	}
	f, err := os.Open(img)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	fsys, err := ext4.Open(f, 0, 4<<20)
	if err != nil {
		t.Fatal(err)
	}
	return fsys
}

func told(d Difference) (lines []string) {
	for _, c := range d.Files {
		lines = append(lines, c.Change+" "+c.Path+" "+strings.Join(c.What, ","))
	}
	return lines
}

// TestAForgedFileIsFound: one that was written, and has its size and times again, beside what is plain to see.
func TestAForgedFileIsFound(t *testing.T) {
	old := time.Unix(1_700_000_000, 0)
	a, b := twoTrees(t, func(root string) {
		forged := filepath.Join(root, "usr/bin/forged")
		os.WriteFile(forged, []byte("evil"), 0o644)
		os.Chtimes(forged, old, old)
		os.WriteFile(filepath.Join(root, "etc/motd"), []byte("hello again"), 0o644)
		os.Chmod(filepath.Join(root, "usr/bin/true"), 0o4755)
		os.Remove(filepath.Join(root, "home/gone"))
		os.WriteFile(filepath.Join(root, "home/new\x1b[2J"), []byte("n"), 0o600)
		os.Remove(filepath.Join(root, "link"))
		os.Symlink("/etc/passwd", filepath.Join(root, "link"))
	})
	d, err := Compare(a, b, func(a, b *ext4.File) bool { return false })
	if err != nil || len(d.Notes) > 0 || d.LeftOut != 0 {
		t.Fatalf("%+v %v", d, err)
	}
	all := strings.Join(told(d), "\n")
	for _, want := range []string{"changed /usr/bin/forged content", "changed /usr/bin/true mode", "removed /home/gone ", "added /home/new\\x1b[2J ", "changed /link "} {
		if !strings.Contains(all, want) {
			t.Errorf("%q is not in\n%s", want, all)
		}
	}
	if motd := d.Files[slices.IndexFunc(d.Files, func(c Change) bool { return c.Path == "/etc/motd" })]; !slices.Contains(motd.What, "size") || motd.Before.Size != 5 || motd.After.Size != 11 {
		t.Errorf("motd: %+v", motd)
	}
	if strings.Contains(all, "/etc/passwd") {
		t.Errorf("what did not change is told:\n%s", all)
	}
	if same, err := Compare(a, a, SamePlace(func(off, n int64) bool { return true })); err != nil || len(same.Files) != 0 {
		t.Errorf("one with itself: %+v %v", same, err)
	}
	if blind, err := Compare(a, b, SamePlace(func(off, n int64) bool { return false })); err != nil || len(blind.Files) != len(d.Files) {
		t.Errorf("where nothing is known to be shared: %v %v", told(blind), err)
	}
}
