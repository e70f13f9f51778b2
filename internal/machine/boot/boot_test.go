package boot

import (
	"bytes"
	"encoding/binary"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
)

// TestLoader holds the loader to its source, where there is an assembler.
func TestLoader(t *testing.T) {
	for _, tool := range []string{"as", "ld"} {
		if _, err := exec.LookPath(tool); err != nil {
			t.Skip(err)
		}
	}
	dir := t.TempDir()
	object, out := filepath.Join(dir, "l.o"), filepath.Join(dir, "l.bin")
	for _, cmd := range [][]string{{"as", "--32", "loader.S", "-o", object}, {"ld", "-m", "elf_i386", "-Ttext", "0", "--oformat", "binary", object, "-o", out}} {
		if said, err := exec.Command(cmd[0], cmd[1:]...).CombinedOutput(); err != nil {
			t.Fatalf("%v: %v\n%s", cmd, err, said)
		}
	}
	if b, err := os.ReadFile(out); err != nil || !bytes.Equal(b, loader) {
		t.Errorf("loader.bin is not what loader.S says (%v): %d bytes, %d", err, len(loader), len(b))
	}
}

// plain is the header of a kernel that is like most, and a little behind it.
func plain() []byte {
	b := make([]byte, 5000)
	b[0x1f1] = 2
	copy(b[0x202:], "HdrS")
	binary.LittleEndian.PutUint16(b[0x206:], 0x20f)
	b[0x211] = 1
	b[4999] = 7
	return b
}

func TestJoin(t *testing.T) {
	kernel := plain()
	var first, joined bytes.Buffer
	if err := Join(bytes.NewReader(kernel), int64(len(kernel)), bytes.NewReader([]byte("initrd")), &first, &joined); err != nil {
		t.Fatal(err)
	}
	got := joined.Bytes()
	if len(got) != 8192+6 || !bytes.Equal(got[:5000], kernel) || string(got[8192:]) != "initrd" {
		t.Errorf("%d bytes", len(got))
	}
	if b := first.Bytes(); len(b) != 1536 || binary.LittleEndian.Uint32(b[0x3f8:]) != 5000 || binary.LittleEndian.Uint32(b[0x3fc:]) != 8192 {
		t.Errorf("the loader has not their sizes")
	}
	for name, harm := range map[string]func(b []byte) []byte{
		"short":      func(b []byte) []byte { return b[:0x200] },
		"no header":  func(b []byte) []byte { b[0x202] = 0; return b },
		"old":        func(b []byte) []byte { b[0x206] = 5; b[0x207] = 2; return b },
		"loaded low": func(b []byte) []byte { b[0x211] = 0; return b },
		"real mode":  func(b []byte) []byte { b[0x1f1] = 9; return b },
	} {
		b := harm(plain())
		first.Reset()
		joined.Reset()
		if err := Join(bytes.NewReader(b), int64(len(b)), nil, &first, &joined); !errors.Is(err, ErrKernel) || first.Len()+joined.Len() > 0 {
			t.Errorf("%s: %v, %d bytes written", name, err, first.Len()+joined.Len())
		}
	}
}

// FuzzJoin: a kernel as an import may bring it.
func FuzzJoin(f *testing.F) {
	f.Add(plain())
	f.Fuzz(func(t *testing.T, b []byte) {
		var first, joined bytes.Buffer
		if err := Join(bytes.NewReader(b), int64(len(b)), nil, &first, &joined); err == nil && joined.Len()%align != 0 {
			t.Errorf("%d bytes of %d", joined.Len(), len(b))
		}
	})
}
