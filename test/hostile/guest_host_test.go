package hostile

import (
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"testing"
)

// guestHost starts a daemon on a state that has the tiny image, or skips the test where nobody has built it.
func guestHost(t *testing.T) *host {
	h := newHost(t, "")
	if err := copyTree(tinyImages(t), filepath.Join(h.state, "images"), os.Link); err != nil {
		t.Fatal(err)
	}
	h.start(os.Getenv("PATH"))
	return h
}

// guestHostAs is guestHost with a daemon that is an ordinary user.
func guestHostAs(t *testing.T, uid int) *host {
	h := newHost(t, "")
	if err := copyTree(tinyImages(t), filepath.Join(h.state, "images"), copyFile); err != nil {
		t.Fatal(err)
	}
	err := filepath.WalkDir(h.state, func(path string, _ fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		return os.Lchown(path, uid, uid)
	})
	if err != nil {
		t.Fatal(err)
	}
	h.owner = uint32(uid)
	h.start(os.Getenv("PATH"))
	return h
}

// tinyImages is a directory of images of which one is named tiny.
func tinyImages(t *testing.T) string {
	t.Helper()
	built := os.Getenv("VIGIA_TEST_STATE")
	if built == "" {
		built, _ = filepath.Abs("../../.cache/test/image")
	}
	if _, err := os.Stat(filepath.Join(built, "images", "names", "tiny")); err != nil {
		t.Skip("no tiny image: script/test builds one, or name a state that has it by VIGIA_TEST_STATE")
	}
	return filepath.Join(built, "images")
}

// copyTree copies a tree of files, each by copy.
func copyTree(from, to string, copy func(from, to string) error) error {
	return filepath.WalkDir(from, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		rel, err := filepath.Rel(from, path)
		if err != nil {
			return err
		}
		switch {
		case d.IsDir() && d.Name() == ".tmp":
			return fs.SkipDir
		case d.IsDir():
			return os.MkdirAll(filepath.Join(to, rel), 0o711)
		}
		return copy(path, filepath.Join(to, rel))
	})
}

func copyFile(from, to string) error {
	src, err := os.Open(from)
	if err != nil {
		return err
	}
	defer src.Close()
	dst, err := os.Create(to)
	if err != nil {
		return err
	}
	defer dst.Close()
	_, err = io.Copy(dst, src)
	return err
}
