package volume

import (
	"bytes"
	"encoding/binary"
	"math/rand/v2"
	"os"
	"testing"
)

func tempFile(t testing.TB) *os.File {
	t.Helper()
	f, err := os.CreateTemp(t.TempDir(), "layer")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	return f
}

func newOverlay(t testing.TB, size int64, parent ID) *os.File {
	t.Helper()
	f := tempFile(t)
	if err := Create(f, CreateOptions{Size: size, Parent: parent}); err != nil {
		t.Fatal(err)
	}
	return f
}

func pattern(n int, seed uint64) []byte {
	p := make([]byte, n)
	r := rand.New(rand.NewPCG(seed, 1))
	for i := 0; i < n; i += 8 {
		var w [8]byte
		binary.LittleEndian.PutUint64(w[:], r.Uint64())
		copy(p[i:], w[:])
	}
	return p
}

func TestImportOverlayReopen(t *testing.T) {
	raw := make([]byte, 5<<20+512)
	copy(raw[1<<20:], pattern(1<<20, 1))
	copy(raw[len(raw)-512:], pattern(512, 2))
	base := tempFile(t)
	id, err := ImportRaw(base, bytes.NewReader(raw), int64(len(raw)), nil)
	if err != nil {
		t.Fatal(err)
	}
	if got, err := Verify(base); err != nil || got != id {
		t.Fatalf("verify: %v, %v", got, err)
	}
	over := newOverlay(t, int64(len(raw)), id)
	v, err := Open([]*os.File{base}, over, Options{})
	if err != nil {
		t.Fatal(err)
	}
	w := pattern(10000, 3)
	copy(raw[1<<20-100:], w)
	if _, err := v.WriteAt(w, 1<<20-100); err != nil {
		t.Fatal(err)
	}
	clear(raw[3<<19 : 3<<19+100000])
	if err := v.WriteZeroes(3<<19, 100000, false); err != nil {
		t.Fatal(err)
	}
	check := func(v *Volume) {
		t.Helper()
		got := make([]byte, len(raw))
		if _, err := v.ReadAt(got, 0); err != nil || !bytes.Equal(got, raw) {
			t.Fatal("disk differs", err)
		}
	}
	check(v)
	name := over.Name()
	if err := v.Close(); err != nil {
		t.Fatal(err)
	}
	open := func(name string) *os.File {
		f, err := os.OpenFile(name, os.O_RDWR, 0)
		if err != nil {
			t.Fatal(err)
		}
		return f
	}
	if v, err = Open([]*os.File{open(base.Name())}, open(name), Options{}); err != nil {
		t.Fatal(err)
	}
	check(v)
	oid, err := v.Freeze()
	if err != nil {
		t.Fatal(err)
	}
	if err := v.Push(newOverlay(t, int64(len(raw)), oid)); err != nil {
		t.Fatal(err)
	}
	check(v)
	v.Close()
}
