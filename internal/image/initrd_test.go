package image

import (
	"bytes"
	"compress/gzip"
	"crypto/sha256"
	"errors"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/klauspost/compress/zstd"
	"github.com/ulikunitz/xz"
)

// readCPIO reads what the kernel would, by the format's document alone.
func readCPIO(t *testing.T, b []byte) map[string]archived {
	t.Helper()
	files := map[string]archived{}
	for at := 0; ; {
		if at+110 > len(b) || string(b[at:at+6]) != "070701" {
			t.Fatalf("no header at %d of %d", at, len(b))
		}
		field := func(n int) int {
			v, err := strconv.ParseUint(string(b[at+6+8*n:at+14+8*n]), 16, 32)
			if err != nil {
				t.Fatal(err)
			}
			return int(v)
		}
		mode, size, nameSize := field(1), field(6), field(11)
		name := string(b[at+110 : at+110+nameSize-1])
		data := (at + 110 + nameSize + 3) / 4 * 4
		if name == "TRAILER!!!" {
			return files
		}
		files[name] = archived{uint32(mode), b[data : data+size]}
		at = (data + size + 3) / 4 * 4
	}
}

func TestInitrd(t *testing.T) {
	name := filepath.Join(t.TempDir(), "root.tar")
	fakeRoot(t, name)
	root, err := openRootTar(name)
	if err != nil {
		t.Fatal(err)
	}
	defer root.Close()
	var out, again bytes.Buffer
	if err := errors.Join(writeInitrd(&out, root, "6.1.0-10"), writeInitrd(&again, root, "6.1.0-10")); err != nil {
		t.Fatal(err)
	}
	if sha256.Sum256(out.Bytes()) != sha256.Sum256(again.Bytes()) {
		t.Error("two initrds of one root differ")
	}
	z, err := gzip.NewReader(&out)
	if err != nil {
		t.Fatal(err)
	}
	raw, err := io.ReadAll(z)
	if err != nil || len(raw)%512 != 0 {
		t.Fatal(err, len(raw))
	}
	files := readCPIO(t, raw)
	for name, want := range map[string]archived{
		"init":                  {modeFile | 0o755, nil},
		"bin/busybox":           {modeFile | 0o755, []byte("#!busybox")},
		"bin/sh":                {modeLink | 0o777, []byte("busybox")},
		"dev/console":           {modeChar | 0o600, []byte{}},
		"root":                  {modeDir | 0o755, []byte{}},
		"modules/order":         {modeFile | 0o644, []byte("virtio.ko\nvirtio_blk.ko\n")},
		"modules/virtio_blk.ko": {modeFile | 0o644, []byte("driver")},
	} {
		got, ok := files[name]
		if !ok || got.mode != want.mode || want.data != nil && !bytes.Equal(got.data, want.data) {
			t.Errorf("%s: %o %q", name, got.mode, got.data)
		}
	}
	if _, ok := files["modules/other.ko"]; ok {
		t.Error("a driver that nobody asked for")
	}
}

func TestLoadOrder(t *testing.T) {
	dep := "kernel/a.ko.xz: kernel/b.ko kernel/c.ko\nkernel/b.ko: kernel/c.ko\nkernel/c.ko:\nkernel/my-mod.ko: kernel/my-mod.ko\n"
	got := loadOrder([]byte(dep), []string{"built_in", "a", "my_mod", "my-mod"})
	if want := []string{"kernel/c.ko", "kernel/b.ko", "kernel/a.ko.xz", "kernel/my-mod.ko"}; !slices.Equal(got, want) {
		t.Errorf("%q", got)
	}
}

func TestCompressedModules(t *testing.T) {
	var x, g, z bytes.Buffer
	xw, _ := xz.NewWriter(&x)
	zw, _ := zstd.NewWriter(&z)
	for _, w := range []io.WriteCloser{xw, gzip.NewWriter(&g), zw} {
		w.Write([]byte("driver"))
		w.Close()
	}
	for name, data := range map[string][]byte{"m.ko": []byte("driver"), "m.ko.xz": x.Bytes(), "m.ko.gz": g.Bytes(), "m.ko.zst": z.Bytes()} {
		if got, err := decompressModule(name, data); err != nil || string(got) != "driver" {
			t.Errorf("%s: %q %v", name, got, err)
		}
		if name != "m.ko" {
			if _, err := decompressModule(name, data[:len(data)/2]); err == nil {
				t.Errorf("%s cut off: no error", name)
			}
		}
	}
	if _, err := decompressModule("m.ko.rar", nil); err == nil {
		t.Error("unknown compression")
	}
}

func TestVersionsAreCompared(t *testing.T) {
	ordered := []string{"5.10.0-9", "6.1.0-9-amd64", "6.1.0-10-amd64", "6.1.0-10-cloud", "6.12", "6.12.1", "10.0"}
	for i := 1; i < len(ordered); i++ {
		if compareVersions(ordered[i-1], ordered[i]) >= 0 || compareVersions(ordered[i], ordered[i-1]) <= 0 {
			t.Errorf("%s is not below %s", ordered[i-1], ordered[i])
		}
	}
	if compareVersions("6.01", "6.1") != 0 {
		t.Error("leading zeros count")
	}
}

func TestMirrors(t *testing.T) {
	dir := t.TempDir()
	write := func(name, text string) {
		t.Helper()
		path := filepath.Join(dir, name)
		if err := errors.Join(os.MkdirAll(filepath.Dir(path), 0o755), os.WriteFile(path, []byte(text), 0o600)); err != nil {
			t.Fatal(err)
		}
	}
	if got := chooseMirrors(hostSources(dir), "bookworm", []string{"main"}); got != nil {
		t.Errorf("a host without sources: %q", got)
	}
	write("sources.list", "# deb http://commented.example/debian bookworm main\ndeb [arch=amd64 signed-by=/k.gpg] http://one.example/debian trixie main contrib # x\ndeb-src http://one.example/debian trixie main\n")
	write("sources.list.d/sec.sources", "Types: deb\nURIs: http://sec.example/security\nSuites: trixie-security\nComponents: main\nSigned-By: /k.gpg\n\nEnabled: no\nTypes: deb\nURIs: http://off.example/\nSuites: trixie-updates\nComponents: main\n")
	write("sources.list.d/tool.list", "deb http://tool.example stable tool\n")
	got := chooseMirrors(hostSources(dir), "trixie", []string{"main"})
	if want := []string{"deb [signed-by=/k.gpg] http://one.example/debian trixie main", "deb [signed-by=/k.gpg] http://sec.example/security trixie-security main"}; !slices.Equal(got, want) {
		t.Errorf("own suite: %q", got)
	}
	got = chooseMirrors(hostSources(dir), "bookworm", []string{"main", "contrib"})
	if want := []string{"deb http://one.example/debian bookworm main contrib", "deb http://sec.example/security bookworm-security main contrib"}; !slices.Equal(got, want) {
		t.Errorf("other suite: %q", got)
	}
	write("sources.list", "deb http://archive.example/ubuntu noble main universe\n")
	os.Remove(filepath.Join(dir, "sources.list.d/sec.sources"))
	if got := chooseMirrors(hostSources(dir), "bookworm", []string{"main"}); got != nil {
		t.Errorf("a host that is no Debian: %q", got)
	}
	write("sources.list", "deb http://me:secret@private.example/debian bookworm main\n")
	if got := chooseMirrors(hostSources(dir), "bookworm", []string{"main"}); strings.Contains(strings.Join(got, ""), "secret") {
		t.Errorf("a password would go into the image: %q", got)
	}
}
