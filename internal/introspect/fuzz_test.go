package introspect

import (
	"encoding/binary"
	"errors"
	"math/rand/v2"
	"slices"
	"testing"

	"vigia/internal/kernel"
)

// views runs every view, for those who do not care what it finds.
func (g *Guest) views(t testing.TB, r *recorded) {
	for name, view := range map[string]func() error{
		"processes": func() error { _, err := g.Processes(); return err },
		"cpu":       func() error { _, err := g.CPU(nil); return err },
		"modules":   func() error { _, err := g.Modules(); return err },
		"sockets":   func() error { _, err := g.Sockets(); return err },
		"files":     func() error { _, err := g.Files(0); return err },
		"system":    func() error { _, err := g.System(); return err },
		"tables":    func() error { _, err := g.SocketsByTables(); return err },
		"maps":      func() error { return g.allMaps() },
		"pulse":     func() error { _, err := g.Pulse(); return err },
		"clock":     func() error { _, err := g.Clock(); return ignore(err, errNoSymbol) },
		"reseeds":   func() error { _, err := g.Reseeds(); return ignore(err, errNoRandomness) },
		"glances":   func() error { _, err := g.Glances(nil); return err },
		"moments":   func() error { return g.allMoments(g.profile) },
	} {
		r.reads = 0
		err := view()
		if err != nil && !errors.Is(err, ErrTorn) && !errors.Is(err, ErrNotReady) && !errors.Is(err, ErrEndless) && !errors.Is(err, kernel.ErrUnsupported) {
			t.Errorf("%s: %v", name, err)
		}
		if r.reads > 200_000 {
			t.Errorf("%s: %d reads of memory with a few bits flipped", name, r.reads)
		}
	}
}

// allMaps lists the regions of those processes whose memory is recorded.
func (g *Guest) allMaps() error {
	list, err := g.CPU(nil)
	for _, p := range list {
		if name := string(p.Comm()); name == "scene" || name == "sshd" {
			if _, one := g.Maps(p.PID); one != nil && !errors.Is(one, ErrNoProcess) {
				err = one
			}
		}
	}
	return err
}

// sorted returns the addresses of the recorded lines in order, so that a number names the same bit each time.
func (r *recorded) sorted() []uint64 {
	var addrs []uint64
	for at := range r.lines {
		addrs = append(addrs, at)
	}
	slices.Sort(addrs)
	return addrs
}

func (r *recorded) flip(addrs []uint64, n uint64) {
	line := r.lines[addrs[n/(lineSize*8)%uint64(len(addrs))]]
	line[n/8%lineSize] ^= 1 << (n % 8)
}

// TestFlippedBits flips bits of real memory, a few at a time: no view panics, hangs, or reads without end.
func TestFlippedBits(t *testing.T) {
	rounds := 200
	if testing.Short() {
		rounds = 100
	}
	flip := func(t *testing.T, r *recorded, p *kernel.Profile) {
		g, addrs := attach(t, r, p), r.sorted()
		rng := rand.New(rand.NewPCG(1, 2))
		for range rounds {
			bits := make([]uint64, 1+rng.IntN(6))
			for i := range bits {
				bits[i] = rng.Uint64()
				r.flip(addrs, bits[i])
			}
			g.views(t, r)
			for _, n := range bits {
				r.flip(addrs, n)
			}
		}
		if len(processes(t, g)) < 50 {
			t.Error("the memory is not what it was")
		}
	}
	onRecordings(t, flip)
	onScenes(t, flip)
}

// FuzzViews writes 8 bytes at up to 8 recorded places.
func FuzzViews(f *testing.F) {
	f.Add(uint8(0), uint64(77), uint64(0), uint64(12345), uint64(1))
	f.Add(uint8(1), uint64(5000), ^uint64(0), uint64(9), uint64(0xffff888000000000))
	f.Add(uint8(2), uint64(3000), uint64(1)<<63, uint64(30000), uint64(0xffff888000000000))
	f.Add(uint8(3), uint64(20000), uint64(0), uint64(9), uint64(2))
	type base struct {
		r     *recorded
		p     *kernel.Profile
		addrs []uint64
	}
	var bases []base
	for _, name := range slices.Concat(recordings, scenes) {
		r, p := load(f, name)
		bases = append(bases, base{r, p, r.sorted()})
	}
	f.Fuzz(func(t *testing.T, which uint8, at1, v1, at2, v2 uint64) {
		b := bases[int(which)%len(bases)]
		r := b.r.clone()
		g, err := Attach(r, b.p)
		if err != nil {
			t.Fatal(err)
		}
		place := func(n uint64) uint64 { return b.addrs[n/8%uint64(len(b.addrs))] + n%8*8 }
		r.put(place(at1), v1)
		r.put(place(at2), v2)
		g.views(t, r)
		_, _ = Attach(r, b.p)
	})
}

// TestFlippedBitsChecked flips bits of real memory under the checks that compare views, and writes pointers from one place
// over another: no check panics, hangs, or reads without end.
func TestFlippedBitsChecked(t *testing.T) {
	rounds := 300
	if testing.Short() {
		rounds = 60
	}
	for _, name := range checkRecordings {
		r, p := load(t, name)
		g, addrs := attach(t, r, p), r.sorted()
		rng := rand.New(rand.NewPCG(3, 4))
		for range rounds {
			bits := make([]uint64, 1+rng.IntN(12))
			for i := range bits {
				bits[i] = rng.Uint64()
				r.flip(addrs, bits[i])
			}
			checkOnce(t, g, r)
			for _, n := range bits {
				r.flip(addrs, n)
			}
		}
		for range rounds { // a word of one line over a word of another: lists that lead into each other, and loops
			at, from := r.lines[addrs[rng.IntN(len(addrs))]], r.lines[addrs[rng.IntN(len(addrs))]]
			was := *at
			copy(at[8*rng.IntN(8):], from[8*rng.IntN(8):][:8])
			checkOnce(t, g, r)
			*at = was
		}
		if found := round(t, quick(g), true); len(found) > 0 {
			t.Errorf("the memory is not what it was: %+v", found)
		}
	}
}

func checkOnce(t testing.TB, g *Guest, r *recorded) {
	t.Helper()
	c := quick(g)
	r.reads = 0
	rep, err := c.Run(true)
	if err != nil && !errors.Is(err, ErrTorn) && !errors.Is(err, ErrNotReady) && !errors.Is(err, ErrEndless) && !errors.Is(err, ErrStarting) {
		t.Errorf("%v", err)
	}
	if len(rep.Findings) > maxFindings {
		t.Errorf("%d findings", len(rep.Findings))
	}
	if r.reads > 1_000_000 {
		t.Errorf("%d reads of memory with a few bits flipped", r.reads)
	}
}

// FuzzChecks writes 8 bytes at two recorded places.
func FuzzChecks(f *testing.F) {
	f.Add(uint8(0), uint64(77), uint64(0), uint64(12345), uint64(1))
	f.Add(uint8(1), uint64(5000), ^uint64(0), uint64(9), uint64(0xffff888000000000))
	f.Add(uint8(2), uint64(3000), uint64(1)<<63, uint64(30000), uint64(0xffff888000000000))
	f.Add(uint8(3), uint64(20000), uint64(0), uint64(9), uint64(2))
	type base struct {
		r     *recorded
		p     *kernel.Profile
		addrs []uint64
	}
	var bases []base
	for _, name := range checkRecordings {
		r, p := load(f, name)
		bases = append(bases, base{r, p, r.sorted()})
	}
	f.Fuzz(func(t *testing.T, which uint8, at1, v1, at2, v2 uint64) {
		b := bases[int(which)%len(bases)]
		g, err := Attach(b.r, b.p)
		if err != nil {
			t.Fatal(err)
		}
		var undo []func()
		for _, w := range [][2]uint64{{at1, v1}, {at2, v2}} {
			line := b.r.lines[b.addrs[w[0]/8%uint64(len(b.addrs))]]
			was := *line
			undo = append(undo, func() { *line = was })
			binary.LittleEndian.PutUint64(line[w[0]%8*8:], w[1])
		}
		checkOnce(t, g, b.r)
		for _, f := range slices.Backward(undo) {
			f()
		}
	})
}
