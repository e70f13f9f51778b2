package volume

import (
	"math/rand/v2"
	"os"
	"testing"
)

// BenchmarkClone is what a clone of a 2 GiB disk costs: a new overlay, opened over a frozen layer.
func BenchmarkClone(b *testing.B) {
	const size = 2 << 30
	f := newOverlay(b, size, ID{})
	v, err := Open(nil, f, Options{})
	if err != nil {
		b.Fatal(err)
	}
	r := rand.New(rand.NewPCG(3, 3))
	buf := make([]byte, 1<<20)
	for range 1200 {
		n := int64(1) << (12 + r.IntN(9))
		v.WriteAt(buf[:n], r.Int64N((size-n)/4096)*4096)
	}
	id, err := v.Freeze()
	if err != nil {
		b.Fatal(err)
	}
	over, err := os.CreateTemp(b.TempDir(), "clone")
	if err != nil {
		b.Fatal(err)
	}
	for b.Loop() {
		over.Truncate(0)
		if err := Create(over, CreateOptions{Size: size, Parent: id}); err != nil {
			b.Fatal(err)
		}
		if _, err := Open([]*os.File{f}, over, Options{Unlocked: true}); err != nil {
			b.Fatal(err)
		}
	}
}

// BenchmarkSwap is for how long a swap of overlays holds requests up: a 2 GiB disk, 16 MiB of which were written since the last flush.
func BenchmarkSwap(b *testing.B) {
	const size = 2 << 30
	v := freshVolume(b, size)
	r := rand.New(rand.NewPCG(3, 3))
	buf := make([]byte, 1<<20)
	for range 1200 {
		n := int64(1) << (12 + r.IntN(9))
		v.WriteAt(buf[:n], r.Int64N((size-n)/4096)*4096)
	}
	for i := 0; b.Loop(); i++ {
		b.StopTimer()
		for range 256 {
			v.WriteAt(buf[:64<<10], r.Int64N(size/65536)*65536)
		}
		n := next(b, v)
		b.StartTimer()
		_, done, err := v.Swap(n)
		b.StopTimer()
		if err != nil {
			b.Fatal(err)
		}
		if err := <-done; err != nil {
			b.Fatal(err)
		}
		b.StartTimer()
	}
}

func BenchmarkRead4k(b *testing.B) {
	f := newOverlay(b, 64<<20, ID{})
	v, err := Open(nil, f, Options{})
	if err != nil {
		b.Fatal(err)
	}
	v.WriteAt(make([]byte, 64<<20), 0)
	buf := make([]byte, 4096)
	r := rand.New(rand.NewPCG(1, 1))
	for b.Loop() {
		v.ReadAt(buf, r.Int64N(16384)*4096)
	}
}
