package image

import (
	"context"
	"errors"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"vigia/internal/vm"
	"vigia/internal/volume"
)

func TestStore(t *testing.T) {
	s := openStore(t)
	if _, err := s.Get("web"); !errors.Is(err, ErrUnknown) || !strings.Contains(err.Error(), `"web"`) || !strings.Contains(err.Error(), "vigia image build") {
		t.Errorf("empty store: %v", err)
	}
	one := addImage(t, s, "web", "aaaa")
	two := addImage(t, s, "db", "bbbb")
	if one.ID == two.ID || len(one.ID) != 64 {
		t.Fatalf("ids %s %s", one.ID, two.ID)
	}
	for _, key := range []string{"web", one.ID, one.ID[:8]} {
		if got, err := s.Get(key); err != nil || got.ID != one.ID || got.Name != "web" {
			t.Errorf("Get(%s): %+v %v", key, got.Info, err)
		}
	}
	if _, err := s.Get("mail"); !errors.Is(err, ErrUnknown) || !strings.Contains(err.Error(), "there are db, web") {
		t.Errorf("unknown: %v", err)
	}
	list, err := s.List()
	if err != nil || len(list) != 2 || list[0].Name != "db" || list[1].Name != "web" || list[1].Bytes == 0 || list[1].Kernel != "6.1" {
		t.Errorf("%+v %v", list, err)
	}
	if got, ok := s.FindRecipe(strings.Repeat("0", 60) + "bbbb"); !ok || got.ID != two.ID {
		t.Errorf("by recipe: %v %v", got.Info, ok)
	}
	if _, ok := s.FindRecipe(strings.Repeat("1", 64)); ok {
		t.Error("found a recipe that was never built")
	}
	leftovers(t, s)
}

func TestNamesMove(t *testing.T) {
	s := openStore(t)
	old := addImage(t, s, "web", "aaaa")
	addImage(t, s, "web", "bbbb")
	if got, err := s.Get(old.ID); err != nil || got.Name != "" {
		t.Errorf("the older image is gone or still named: %+v %v", got.Info, err)
	}
	list, _ := s.List()
	if len(list) != 2 || list[0].Name != "web" || list[1].ID != old.ID {
		t.Errorf("%+v", list)
	}
	if err := s.Tag(old.ID, "before"); err != nil {
		t.Fatal(err)
	}
	if err := s.Tag(old.ID, "../x"); !errors.Is(err, vm.ErrInvalid) {
		t.Errorf("a name that is a path: %v", err)
	}
	if got, err := s.Get("before"); err != nil || got.ID != old.ID {
		t.Errorf("%+v %v", got.Info, err)
	}
}

func TestSameContentIsKeptOnce(t *testing.T) {
	s := openStore(t)
	a := addImage(t, s, "one", "same")
	b := addImage(t, s, "two", "same")
	if a.ID != b.ID || !a.Created.Equal(b.Created) {
		t.Errorf("%s %s", a.ID, b.ID)
	}
	if err := s.Remove("one"); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Get("two"); err != nil {
		t.Errorf("removing one name took the image from the other: %v", err)
	}
	if err := s.Remove("two"); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(filepath.Join(s.dir, a.ID)); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("the last name is gone, the image is not: %v", err)
	}
	if err := s.Remove("two"); !errors.Is(err, ErrUnknown) {
		t.Errorf("removed twice: %v", err)
	}
	leftovers(t, s)
}

func TestRemoveByID(t *testing.T) {
	s := openStore(t)
	a := addImage(t, s, "one", "same")
	addImage(t, s, "two", "same")
	if err := s.Remove(a.ID); err != nil {
		t.Fatal(err)
	}
	if list, err := s.List(); err != nil || len(list) != 0 {
		t.Errorf("%+v %v", list, err)
	}
}

func TestImageOpens(t *testing.T) {
	s := openStore(t)
	addImage(t, s, "web", "aaaa")
	img, err := s.Get("web")
	if err != nil {
		t.Fatal(err)
	}
	layers, err := img.OpenDisk()
	if err != nil {
		t.Fatal(err)
	}
	defer layers[0].Close()
	v, err := volume.Open(layers, nil, volume.Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer v.Close()
	head := make([]byte, 9)
	if _, err := v.ReadAt(head, 0); err != nil || string(head) != "aaaa aaaa" {
		t.Errorf("the layer holds %q %v", head, err)
	}
	if _, err := img.OpenInitrd(); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("an initrd out of nothing: %v", err)
	}
	if img.Path(PartInitrd) != "" || img.Path(PartKernel) == "" {
		t.Error("paths")
	}
	profile, err := img.OpenProfile()
	if err != nil {
		t.Fatal(err)
	}
	defer profile.Close()
	if text, _ := io.ReadAll(profile); string(text) != "profile of kern" {
		t.Errorf("profile %q", text)
	}
	if f, err := os.OpenFile(img.Path(PartDisk), os.O_RDWR, 0); err == nil && os.Geteuid() != 0 {
		f.Close()
		t.Error("an image can be opened for writing")
	}
}

// TestDamage changes one thing of an image at a time. What costs nothing to see is seen by Get, the rest by Verify.
func TestDamage(t *testing.T) {
	flip := func(name string) error {
		os.Chmod(name, 0o600)
		f, err := os.OpenFile(name, os.O_RDWR, 0)
		if err != nil {
			return err
		}
		defer f.Close()
		info, _ := f.Stat()
		b := make([]byte, 1)
		f.ReadAt(b, info.Size()/2)
		b[0] ^= 1
		_, err = f.WriteAt(b, info.Size()/2)
		return err
	}
	for _, c := range []struct {
		name   string
		damage func(dir string) error
		get    bool // Get sees it
		says   string
	}{
		{"no manifest", func(d string) error { return os.Remove(d + "/image.json") }, true, "image.json"},
		{"empty manifest", func(d string) error { return replace(d+"/image.json", "") }, true, "image.json"},
		{"huge manifest", func(d string) error { return replace(d+"/image.json", strings.Repeat(" ", 1<<20)) }, true, "longer than"},
		{"version", func(d string) error { return edit(d+"/image.json", `"version": 1`, `"version": 2`) }, true, "version 2"},
		{"command line", func(d string) error { return edit(d+"/image.json", "LABEL=root", "LABEL=evil") }, true, "was changed"},
		{"part out of the directory", func(d string) error { return edit(d+"/image.json", `"vmlinuz"`, `"../../x"`) }, true, "was changed"},
		{"kernel gone", func(d string) error { return os.Remove(d + "/vmlinuz") }, true, "vmlinuz is missing"},
		{"kernel a link", func(d string) error {
			return errors.Join(os.Remove(d+"/vmlinuz"), os.Symlink("/etc/passwd", d+"/vmlinuz"))
		}, true, "vmlinuz"},
		{"disk cut off", func(d string) error {
			return errors.Join(os.Chmod(d+"/disk.layer", 0o600), os.Truncate(d+"/disk.layer", 5000))
		}, true, "disk.layer has 5000 bytes"},
		{"disk bit", func(d string) error { return flip(d + "/disk.layer") }, false, "disk.layer has changed"},
		{"kernel bit", func(d string) error { return flip(d + "/vmlinuz") }, false, "vmlinuz has changed"},
		{"profile bit", func(d string) error { return flip(d + "/profile") }, false, "profile has changed"},
	} {
		t.Run(c.name, func(t *testing.T) {
			s := openStore(t)
			img := addImage(t, s, "web", "aaaa")
			if _, err := s.Verify(t.Context(), "web"); err != nil {
				t.Fatalf("before: %v", err)
			}
			if err := c.damage(img.dir); err != nil {
				t.Fatal(err)
			}
			_, gerr := s.Get("web")
			if c.get != (gerr != nil) || gerr != nil && !errors.Is(gerr, ErrCorrupt) {
				t.Errorf("Get: %v", gerr)
			}
			_, err := s.Verify(t.Context(), "web")
			if !errors.Is(err, ErrCorrupt) || !strings.Contains(err.Error(), c.says) || !strings.Contains(err.Error(), "web") {
				t.Errorf("Verify: %v", err)
			}
			if list, err := s.List(); err != nil || len(list) != 1 || list[0].Name != "web" {
				t.Errorf("List: %+v %v", list, err)
			}
			if again := addImage(t, s, "web", "aaaa"); c.get {
				if _, err := s.Verify(t.Context(), "web"); err != nil || again.ID != img.ID {
					t.Errorf("building it again does not mend it: %v", err)
				}
			}
			if err := s.Remove("web"); err != nil {
				t.Errorf("a damaged image can't be removed: %v", err)
			}
		})
	}
}

func replace(name, text string) error {
	os.Remove(name)
	return os.WriteFile(name, []byte(text), 0o600)
}

func edit(name, old, new string) error {
	text, err := os.ReadFile(name)
	if err != nil || !strings.Contains(string(text), old) {
		return errors.Join(err, errors.New("nothing to edit"))
	}
	return replace(name, strings.ReplaceAll(string(text), old, new))
}

func TestNamesDirectoryIsNotTrusted(t *testing.T) {
	s := openStore(t)
	addImage(t, s, "web", "aaaa")
	for name, text := range map[string]string{"a": "../../etc", "b": "", "c": strings.Repeat("0", 64)} {
		if err := os.WriteFile(filepath.Join(s.dir, "names", name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		if _, err := s.Get(name); !errors.Is(err, ErrUnknown) {
			t.Errorf("%q: %v", text, err)
		}
	}
}

func TestConcurrentUse(t *testing.T) {
	s := openStore(t)
	var wg sync.WaitGroup
	for i := range 4 {
		wg.Go(func() {
			name := string(rune('a' + i))
			for range 5 {
				addImage(t, s, name, "same")
				s.List()
				if err := s.Remove(name); err != nil && !errors.Is(err, ErrUnknown) {
					t.Error(err)
				}
			}
		})
	}
	wg.Wait()
	if list, err := s.List(); err != nil || len(list) != 0 {
		t.Errorf("%+v %v", list, err)
	}
	leftovers(t, s)
}

func TestMeasure(t *testing.T) {
	dir := t.TempDir()
	sum := func(name string, write func(*os.File) error) part {
		t.Helper()
		path := filepath.Join(dir, name)
		if err := create(path, write); err != nil {
			t.Fatal(err)
		}
		f, err := os.Open(path)
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		p, err := measure(t.Context(), f, nil)
		if err != nil {
			t.Fatal(err)
		}
		return p
	}
	const size = 5*pieceSize + 77
	holes := sum("holes", func(f *os.File) error {
		_, err := f.WriteAt([]byte("x"), 3*pieceSize)
		return errors.Join(err, f.Truncate(size))
	})
	full := sum("full", func(f *os.File) error {
		b := make([]byte, size)
		b[3*pieceSize] = 'x'
		_, err := f.Write(b)
		return err
	})
	if holes != full || holes.Bytes != size {
		t.Errorf("a hole is not the same as zeros: %v %v", holes, full)
	}
	// of an empty file: sha256 of nothing
	if empty := sum("empty", func(*os.File) error { return nil }); empty.Hash != "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855" {
		t.Errorf("empty: %v", empty)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	f, _ := os.Open(filepath.Join(dir, "full"))
	defer f.Close()
	if _, err := measure(ctx, f, nil); !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled: %v", err)
	}
}
