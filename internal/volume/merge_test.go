package volume

import (
	"bytes"
	"errors"
	"math/rand/v2"
	"os"
	"path/filepath"
	"sync/atomic"
	"testing"
)

// merged flattens files into one.
func merged(t *testing.T, files []*os.File) *os.File {
	t.Helper()
	dst, err := os.Create(filepath.Join(t.TempDir(), "merged.vol"))
	if err != nil {
		t.Fatal(err)
	}
	if err := Flatten(dst, reopened(t, files), nil); err != nil {
		t.Fatal(err)
	}
	return dst
}

func reopened(t *testing.T, files []*os.File) (own []*os.File) {
	t.Helper()
	for _, f := range files {
		g, err := os.Open(f.Name())
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { g.Close() })
		own = append(own, g)
	}
	return own
}

// TestAChainGrowsForEver: a disk that is swapped more often than a chain may be long, with writes, zeros and reads all the time, says what
// it should, since what nobody needs apart is merged; so does the chain when it is opened anew.
func TestAChainGrowsForEver(t *testing.T) {
	const size = 8 << 20
	v := freshVolume(t, size)
	base := v.top.f.(*osFile).File
	want := make([]byte, size)
	rnd := rand.New(rand.NewPCG(1, 2))
	change := func() {
		off, n := rnd.Int64N(size/BlockSize-64)*BlockSize, (1+rnd.Int64N(64))*BlockSize
		p := bytes.Repeat([]byte{byte(rnd.Uint32())}, int(n))
		var err error
		if rnd.IntN(4) == 0 {
			clear(p)
			err = v.WriteZeroes(off, n, false)
		} else {
			_, err = v.WriteAt(p, off)
		}
		if err != nil {
			t.Fatal(err)
		}
		copy(want[off:], p)
	}
	var stop atomic.Bool
	stopped := make(chan error, 1)
	go func() { // a reader, whose files are replaced under it
		p := make([]byte, 1<<20)
		var err error
		for i := int64(0); err == nil && !stop.Load(); i++ {
			_, err = v.ReadAt(p, i%8<<20)
		}
		stopped <- err
	}()
	chain, top := []*os.File{}, base
	for round := range MaxLayers + 20 {
		for range 3 {
			change()
		}
		n := next(t, v)
		_, done, err := v.Swap(n)
		if err != nil {
			t.Fatalf("round %d: %v", round, err)
		}
		if err := <-done; err != nil {
			t.Fatal(err)
		}
		chain, top = append(chain, top), n.l.f.(*osFile).File
		if len(chain) < 20 {
			continue
		}
		low := rnd.IntN(len(chain) - 12)
		high := low + 1 + rnd.IntN(len(chain)-low-1)
		m := merged(t, chain[low:high+1])
		fewer, err := v.Replace(reopened(t, []*os.File{m})[0])
		if err != nil || fewer != high-low {
			t.Fatalf("%d to %d of %d: %d fewer, %v", low, high, len(chain), fewer, err)
		}
		chain = append(append(append([]*os.File{}, chain[:low]...), m), chain[high+1:]...)
		if len(v.chain) != len(chain)+1 {
			t.Fatalf("%d layers, want %d", len(v.chain), len(chain)+1)
		}
	}
	stop.Store(true)
	if err := <-stopped; err != nil {
		t.Errorf("a reader: %v", err)
	}
	change()
	got := make([]byte, size)
	if _, err := v.ReadAt(got, 0); err != nil || !bytes.Equal(got, want) {
		t.Errorf("the disk is not what was written (%v)", err)
	}
	if err := v.Flush(); err != nil {
		t.Fatal(err)
	}
	over, err := os.OpenFile(top.Name(), os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	again, err := Open(reopened(t, chain), over, Options{Unlocked: true})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := again.ReadAt(got, 0); err != nil || !bytes.Equal(got, want) {
		t.Errorf("opened anew, the disk is not what was written (%v)", err)
	}
}

// TestReplaceRefuses: a layer that is another's, is not frozen, lacks something, or is the overlay takes nobody's place.
func TestReplaceRefuses(t *testing.T) {
	v := freshVolume(t, 4<<20)
	chain := []*os.File{v.top.f.(*osFile).File}
	for i := range 4 {
		if _, err := v.WriteAt(bytes.Repeat([]byte{byte(i + 1)}, BlockSize), int64(i)*BlockSize); err != nil {
			t.Fatal(err)
		}
		n := next(t, v)
		_, done, err := v.Swap(n)
		if err != nil {
			t.Fatal(err)
		}
		if err := <-done; err != nil {
			t.Fatal(err)
		}
		chain = append(chain, n.l.f.(*osFile).File)
	}
	whole := merged(t, chain[1:4])
	empty, err := os.Create(filepath.Join(t.TempDir(), "empty.vol"))
	if err != nil {
		t.Fatal(err)
	}
	i1, _ := ReadInfo(chain[1])
	i3, _ := ReadInfo(chain[3])
	lacks := header{generation: 1, id: i3.ID, parent: i1.Parent, size: 4 << 20, state: layerFrozen, geo: geometryOf(4 << 20)}
	if err := empty.Truncate(lacks.geo.fileSize(lacks.size)); err != nil {
		t.Fatal(err)
	}
	if err := sealNew(hostFile(empty), lacks, newBlockMap(lacks.size)); err != nil {
		t.Fatal(err)
	}
	other := freshVolume(t, 4<<20)
	if _, err := other.Freeze(); err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]struct {
		f    *os.File
		want error
	}{
		"it lacks blocks":          {empty, ErrNotMine},
		"of another disk":          {other.chain[0].f.(*osFile).File, ErrNotMine},
		"not frozen":               {newOverlay(t, 4<<20, i3.ID), ErrNotFrozen},
		"the overlay of the chain": {chain[4], ErrNotFrozen},
	} {
		if n, err := v.Replace(reopened(t, []*os.File{c.f})[0]); !errors.Is(err, c.want) || n != 0 {
			t.Errorf("%s: %d, %v", name, n, err)
		}
	}
	if len(v.chain) != 5 {
		t.Errorf("%d layers", len(v.chain))
	}
	if n, err := v.Replace(reopened(t, []*os.File{whole})[0]); err != nil || n != 2 {
		t.Errorf("the right one: %d, %v", n, err)
	}
	p := make([]byte, BlockSize)
	for i := range 4 {
		if _, err := v.ReadAt(p, int64(i)*BlockSize); err != nil || p[7] != byte(i+1) {
			t.Errorf("block %d: %d %v", i, p[7], err)
		}
	}
}
