package memory

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"
)

// ramFile makes a sparse file whose byte at each mark says which mark it is.
func ramFile(t testing.TB, size int64, marks ...int64) *os.File {
	t.Helper()
	f, err := os.Create(filepath.Join(t.TempDir(), "ram"))
	if err != nil {
		t.Fatal(err)
	}
	if err := f.Truncate(size); err != nil {
		t.Fatal(err)
	}
	for i, at := range marks {
		if _, err := f.WriteAt([]byte{byte(i + 1)}, at); err != nil {
			t.Fatal(err)
		}
	}
	return f
}

// TestLayouts holds the layouts to what QEMU 7.2 says in `info mtree -f`.
func TestLayouts(t *testing.T) {
	const m, g = 1 << 20, 1 << 30
	for _, c := range []struct {
		name   string
		layout []Region
		want   []Region
	}{
		{"q35 256M", Q35Layout(256 * m), []Region{{0, 256 * m, 0}}},
		{"q35 2G", Q35Layout(2 * g), []Region{{0, 2 * g, 0}}},
		{"q35 2815M", Q35Layout(2815 * m), []Region{{0, 2815 * m, 0}}},
		{"q35 2816M", Q35Layout(2816 * m), []Region{{0, 2 * g, 0}, {4 * g, 768 * m, 2 * g}}},
		{"q35 6G", Q35Layout(6 * g), []Region{{0, 2 * g, 0}, {4 * g, 4 * g, 2 * g}}},
		{"microvm 3G", MicroVMLayout(3 * g), []Region{{0, 3 * g, 0}}},
		{"microvm 4G", MicroVMLayout(4 * g), []Region{{0, 3 * g, 0}, {4 * g, 1 * g, 3 * g}}},
	} {
		if !slices.Equal(c.layout, c.want) {
			t.Errorf("%s: %+v, want %+v", c.name, c.layout, c.want)
		}
	}
}

func TestReadAcrossTheHole(t *testing.T) {
	const g = 1 << 30
	f := ramFile(t, 4*g, 5, 2*g-1, 2*g, 4*g-1)
	r, err := Map(f, Q35Layout(4*g))
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	for i, pa := range []uint64{5, 2*g - 1, 4 * g, 6*g - 1} {
		for name, read := range map[string]func(uint64, []byte) error{"ReadPhys": r.ReadPhys, "PeekPhys": r.PeekPhys} {
			b := []byte{0}
			if err := read(pa, b); err != nil || b[0] != byte(i+1) {
				t.Errorf("%s(%#x) = %d, %v; want %d", name, pa, b[0], err, i+1)
			}
		}
	}
	for _, pa := range []uint64{2 * g, 3 * g, 4*g - 1, 6 * g, 1 << 60, ^uint64(0)} {
		if err := r.ReadPhys(pa, make([]byte, 1)); !errors.Is(err, ErrNoRAM) {
			t.Errorf("ReadPhys(%#x): %v", pa, err)
		}
	}
	if err := r.ReadPhys(2*g-4, make([]byte, 8)); !errors.Is(err, ErrNoRAM) {
		t.Errorf("a read into the hole: %v", err)
	}
}

// TestTruncated: cutting the RAM file short under the mapping is an error of a read, not the end of the process.
func TestTruncated(t *testing.T) {
	f := ramFile(t, 1<<20, 0)
	r, err := Map(f, Q35Layout(1<<20))
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	if err := f.Truncate(4096); err != nil {
		t.Fatal(err)
	}
	b := make([]byte, 8)
	if err := r.ReadPhys(0, b); err != nil || b[0] != 1 {
		t.Errorf("what is left reads %v, %v", b, err)
	}
	for _, n := range []int{1, 8, 4096, 100_000} {
		if err := r.ReadPhys(1<<19, make([]byte, n)); !errors.Is(err, ErrNoRAM) {
			t.Errorf("%d bytes of what is gone: %v", n, err)
		}
	}
	if err := r.PeekPhys(1<<19, b); !errors.Is(err, ErrNoRAM) {
		t.Errorf("peek at what is gone: %v", err)
	}
}

func TestMapRefuses(t *testing.T) {
	f := ramFile(t, 1<<20)
	defer f.Close()
	for name, layout := range map[string][]Region{
		"larger than the file": Q35Layout(2 << 20),
		"none":                 nil,
		"empty":                {{Size: 0}},
		"overlapping":          {{0, 8192, 0}, {4096, 4096, 8192}},
		"wrapping":             {{^uint64(0) - 100, 4096, 0}},
		"offset wrapping":      {{0, 4096, ^uint64(0) - 100}},
	} {
		if _, err := Map(f, layout); !errors.Is(err, ErrLayout) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// TestPeekLeavesHoles: a search through RAM must not make the guest's untouched pages present in the host.
func TestPeekLeavesHoles(t *testing.T) {
	fd, err := unix.MemfdCreate("ram", unix.MFD_CLOEXEC|unix.MFD_ALLOW_SEALING)
	if err != nil {
		t.Skipf("no memfd here: %v", err)
	}
	f := os.NewFile(uintptr(fd), "ram")
	if err := f.Truncate(64 << 20); err != nil {
		t.Fatal(err)
	}
	if _, err := unix.FcntlInt(f.Fd(), unix.F_ADD_SEALS, unix.F_SEAL_SHRINK); err != nil {
		t.Fatal(err)
	}
	r, err := Map(f, Q35Layout(64<<20))
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	blocks := func() int64 {
		var st unix.Stat_t
		if err := unix.Fstat(fd, &st); err != nil {
			t.Fatal(err)
		}
		return st.Blocks
	}
	b := make([]byte, 16)
	for pa := uint64(0); pa < 64<<20; pa += 2 << 20 {
		if err := r.PeekPhys(pa, b); err != nil {
			t.Fatal(err)
		}
	}
	if n := blocks(); n != 0 {
		t.Errorf("peeking made %d blocks present", n)
	}
	if !r.sealed {
		t.Error("the seal is not seen")
	}
	if err := r.ReadPhys(4096, b); err != nil || !bytes.Equal(b, make([]byte, 16)) {
		t.Errorf("%v %v", b, err)
	}
}

// TestProcess reads this process's own memory as if it were a clone's RAM.
func TestProcess(t *testing.T) {
	ram, err := unix.Mmap(-1, 0, 1<<20, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANON)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = unix.Munmap(ram) }()
	copy(ram[0x80000:], "private")
	mem, err := os.Open("/proc/self/mem")
	if err != nil {
		t.Fatal(err)
	}
	defer mem.Close()
	layout := []Region{{0, 0x80000, 0}, {1 << 32, 0x80000, 0x80000}}
	p, err := NewProcess(mem, uint64(uintptr(unsafe.Pointer(&ram[0]))), layout)
	if err != nil {
		t.Fatal(err)
	}
	b := make([]byte, 7)
	if err := p.ReadPhys(1<<32, b); err != nil || string(b) != "private" {
		t.Errorf("%q, %v", b, err)
	}
	if err := p.ReadPhys(0x80000, b); !errors.Is(err, ErrNoRAM) {
		t.Errorf("in the hole: %v", err)
	}
	if _, err := NewProcess(mem, 1<<47, layout); !errors.Is(err, ErrLayout) {
		t.Errorf("a base beyond user space: %v", err)
	}
	none, err := NewProcess(mem, 4096, layout) // never mapped
	if err != nil {
		t.Fatal(err)
	}
	if err := none.ReadPhys(0, b); !errors.Is(err, ErrNoRAM) {
		t.Errorf("unmapped: %v", err)
	}
}

// BenchmarkReadPhys compares a file that might be cut short with one that is sealed against it.
func BenchmarkReadPhys(b *testing.B) {
	for _, sealed := range []bool{false, true} {
		b.Run(map[bool]string{false: "file", true: "sealed"}[sealed], func(b *testing.B) {
			r, err := Map(ramFile(b, 1<<20, 0), Q35Layout(1<<20))
			if err != nil {
				b.Fatal(err)
			}
			defer r.Close()
			r.sealed = sealed
			var buf [8]byte
			for b.Loop() {
				if err := r.ReadPhys(64, buf[:]); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
