package convert

import (
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"vigia/internal/inventory"
	"vigia/internal/volume"
)

// layer makes a frozen layer that holds an ext4 file system with one passwd and one shadow.
func layer(t *testing.T, dir, name, passwd, shadow string) string {
	t.Helper()
	root := filepath.Join(dir, name+".root")
	for file, text := range map[string]string{"passwd": passwd, "shadow": shadow, "os-release": "PRETTY_NAME=\"Debian GNU/Linux 12 (bookworm)\"\n"} {
		if err := os.MkdirAll(filepath.Join(root, "etc"), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(root, "etc", file), []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	mke2fs, err := exec.LookPath("mke2fs")
	if err != nil {
		mke2fs = "/sbin/mke2fs"
	}
	img := filepath.Join(dir, name+".img")
	if out, err := exec.Command(mke2fs, "-q", "-t", "ext4", "-d", root, img, "4M").CombinedOutput(); err != nil {
		t.Fatalf("mke2fs: %v: %s", err, out)
	}
	raw, err := os.Open(img)
	if err != nil {
		t.Fatal(err)
	}
	defer raw.Close()
	dst, err := os.Create(filepath.Join(dir, name+".vol"))
	if err != nil {
		t.Fatal(err)
	}
	defer dst.Close()
	if _, err := volume.ImportRaw(dst, raw, 4<<20, nil); err != nil {
		t.Fatal(err)
	}
	return dst.Name()
}

// TestAnAccountThatComesBackIsNamedFromTheDisksAlone.
func TestAnAccountThatComesBackIsNamedFromTheDisksAlone(t *testing.T) {
	dir, hash := t.TempDir(), "$6$s$"+strings.Repeat("h", 86)
	passwd := "root:x:0:0::/root:/bin/bash\neve:x:1000:1000::/home/eve:/bin/bash\n"
	files := []string{
		layer(t, dir, "then", passwd, "root:*:1:0:9:7:::\neve:"+hash+":20000:0:9:7:::\n"),
		layer(t, dir, "now", passwd, "root:*:1:0:9:7:::\neve:!"+hash+":20000:0:9:7:::\n"),
	}
	ask := func(q comparison) ([]inventory.Item, error) {
		text, err := json.Marshal(q)
		if err != nil {
			t.Fatal(err)
		}
		return reopens(string(text), func(n int) *os.File {
			f, err := os.Open(files[n])
			if err != nil {
				t.Fatal(err)
			}
			return f
		})
	}
	items, err := ask(comparison{Then: 1, Now: 1, At: time.Now()})
	if err != nil {
		t.Fatal(err)
	}
	if !slices.ContainsFunc(items, func(i inventory.Item) bool { return i.Kind == "account.enabled" && i.Subject == "eve" }) {
		t.Errorf("eve's account was locked since, and is not in %+v", items)
	}
	for _, q := range []comparison{{Then: 0, Now: 1}, {Then: 1 << 20, Now: 1}, {Then: -1, Now: 5}} {
		if _, err := ask(q); err == nil {
			t.Errorf("%+v is answered", q)
		}
	}
}
