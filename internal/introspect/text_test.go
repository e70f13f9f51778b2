package introspect

import (
	"cmp"
	"encoding/binary"
	"errors"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"

	"vigia/internal/kernel"
	"vigia/internal/kernel/patch"
)

// onTexts calls test with each recording of code.
func onTexts(t *testing.T, test func(t *testing.T, r textRecording, g *Guest)) {
	for _, name := range textRecordings {
		t.Run(strings.TrimSuffix(name, ".xz"), func(t *testing.T) {
			r := loadText(t, name)
			test(t, r, attach(t, r.recorded, r.profile))
		})
	}
}

// comparison returns what the comparison alone finds changed.
func comparison(t testing.TB, g *Guest, ref *kernel.Reference) *textCheck {
	t.Helper()
	c := &textCheck{Guest: g, ref: ref}
	if err := errors.Join(g.view(c.prepare), c.segments()); err != nil {
		t.Fatal(err)
	}
	return c
}

// recordedSorts are the sorts of places that a recording must hold for what is shown by it to be worth something.
var recordedSorts = map[string][]kernel.SiteKind{
	"text-6.1": {kernel.SiteRetpoline, kernel.SiteReturn, kernel.SiteParavirt, kernel.SiteAlternative, kernel.SiteLock, kernel.SiteStatic,
		kernel.SiteJump, kernel.SiteFtrace},
	"text-6.12": {kernel.SiteRetpoline, kernel.SiteReturn, kernel.SiteAlternative, kernel.SiteEndbr, kernel.SiteLock, kernel.SiteStatic,
		kernel.SiteJump, kernel.SiteFtrace, kernel.SitePointer},
}

// TestRecordedText: every byte of a running kernel's code and read-only data is explained, though hundreds of places differ
// from the kernel file; and whichever single byte is changed is found, at its place.
func TestRecordedText(t *testing.T) {
	onTexts(t, func(t *testing.T, r textRecording, g *Guest) {
		found, stats, err := g.CheckText(r.ref, nil)
		if err != nil || len(found) > 0 {
			t.Fatalf("a healthy kernel: %v, %v", found, err)
		}
		var kinds [256]int
		for i := range r.ref.NumSites() {
			kinds[r.ref.Site(i).Kind]++
		}
		for _, k := range recordedSorts[strings.TrimPrefix(t.Name(), "TestRecordedText/")] {
			if kinds[k] == 0 {
				t.Errorf("%s is not in the recording", siteNames[k])
			}
		}
		if asBuilt := differing(t, g, r.ref); asBuilt < 300 {
			t.Errorf("%d bytes differ from the kernel file: that shows little", asBuilt)
		}
		t.Logf("%+v %v", stats, kinds[:14])
		for _, s := range []kernel.Segment{r.ref.Text(), r.ref.Rodata()} {
			everyByte(t, r, g, s)
		}
	})
}

// differing counts the bytes of the text that are not what the kernel file has.
func differing(t *testing.T, g *Guest, ref *kernel.Reference) (n int) {
	text := ref.Text()
	got, file := make([]byte, len(text.Data)), make([]byte, len(text.Data))
	at := text.Addr + g.boot.Slide
	if err := g.space.Read(at, got); err != nil || !(patch.Kernel{Ref: ref, Slide: g.boot.Slide}).Original(at, file) {
		t.Fatal(err)
	}
	for i := range got {
		if got[i] != file[i] {
			n++
		}
	}
	return n
}

// everyByte changes each byte of a segment, some at a time and far apart: the comparison names each place.
func everyByte(t *testing.T, r textRecording, g *Guest, s kernel.Segment) {
	t.Helper()
	rng := rand.New(rand.NewPCG(5, 6))
	stride := max(512, len(s.Data)/maxTextFindings+1)
	missed := 0
	for first := range stride {
		var undo []func()
		var at []uint64
		for off := first; off < len(s.Data); off += stride {
			va := s.Addr + g.boot.Slide + uint64(off)
			undo, at = append(undo, r.change(t, g, va, byte(1+rng.IntN(255)))), append(at, va)
		}
		c := comparison(t, g, r.ref)
		for _, va := range at {
			in := func(x change) bool { return va >= x.addr && va < x.addr+uint64(x.n) }
			if missed < 10 && !slices.ContainsFunc(c.changes, in) {
				missed++
				t.Errorf("the byte at %#x (%s, %s) was changed, and that was not found", va, g.symbol(va), siteAt(c.object, va))
			}
		}
		for _, f := range undo {
			f()
		}
	}
}

// TestProbedCode: where the kernel has a probe there may be a breakpoint, or a jump to what it keeps for this probe; not elsewhere,
// not another jump, and not any more once the probe is gone.
func TestProbedCode(t *testing.T) {
	onTexts(t, func(t *testing.T, r textRecording, g *Guest) {
		c := comparison(t, g, r.ref)
		at := r.ref.Text().Addr + g.boot.Slide + 100
		const made = 0xffffffffbf000000
		c.code.runs = append(c.code.runs, code{start: made, end: made + 4096, owner: ownerMade})
		slices.SortFunc(c.code.runs, func(a, b code) int { return cmp.Compare(a.start, b.start) })
		jump := func(to uint64) []byte { return binary.LittleEndian.AppendUint32([]byte{0xe9}, uint32(to-at-5)) }
		for _, k := range []struct {
			name  string
			armed []armed
			put   []byte
			fine  bool
		}{
			{"a breakpoint", []armed{{at: at}}, []byte{0xcc}, true},
			{"a breakpoint among others", []armed{{at: at - 1}, {at: at}, {at: at + 9}}, []byte{0xcc}, true},
			{"a breakpoint elsewhere", []armed{{at: at + 1}}, []byte{0xcc}, false},
			{"a breakpoint of nobody's", nil, []byte{0xcc}, false},
			{"its jump", []armed{{at: at, detour: made + 64}}, jump(made + 64), true},
			{"another jump", []armed{{at: at, detour: made + 64}}, jump(made + 65), false},
			{"a jump to what is not the kernel's", []armed{{at: at, detour: made + 8192}}, jump(made + 8192), false},
			{"a jump without a detour", []armed{{at: at}}, jump(made), false},
			{"a breakpoint over its jump", []armed{{at: at, detour: made + 64}}, append([]byte{0xcc}, jump(made + 64)[1:]...), true},
			{"a breakpoint over another", []armed{{at: at, detour: made + 64}}, append([]byte{0xcc}, jump(made + 99)[1:]...), false},
			{"another byte", []armed{{at: at, detour: made}}, []byte{0xcd}, false},
		} {
			var undo []func()
			for i, b := range k.put {
				now, _ := g.space.U8(at + uint64(i))
				undo = append(undo, r.change(t, g, at+uint64(i), now^b))
			}
			for _, step := range []struct {
				armed []armed
				fine  bool
			}{{k.armed, k.fine}, {nil, false}} {
				c.armed, c.changes = step.armed, nil
				if err := c.segments(); err != nil || (len(c.changes) == 0) != step.fine {
					t.Errorf("%s: %+v, %v", k.name, c.changes, err)
				}
			}
			for _, f := range undo {
				f()
			}
		}
	})
}

// TestUnknownCode: a kernel whose code is written over in ways that are not known is unknown, not changed; and none is that
// because of what is written at some places.
func TestUnknownCode(t *testing.T) {
	onTexts(t, func(t *testing.T, r textRecording, g *Guest) {
		c := comparison(t, g, r.ref)
		if err := c.unexplained(); err != nil {
			t.Errorf("Debian's kernel: %v", err)
		}
		for what, names := range map[string]patch.Names{"call depth tracking": {DepthReturns: []uint64{0x1234}}, "FineIBT": {Preambles: 4}} {
			c.names = names
			c.mode.Return = 0x1234
			if err := c.unexplained(); !errors.Is(err, kernel.ErrUnsupported) {
				t.Errorf("%s: %v", what, err)
			}
		}
		c.mode.Return, c.names = 0, patch.Names{DepthReturns: []uint64{0}}
		if err := c.unexplained(); err != nil {
			t.Errorf("a kernel without such a thunk: %v", err)
		}
	})
}

// TestKnownModule: a module that was found as it must be is known again as long as each of its bytes, its name and the places of its
// parts are the same.
func TestKnownModule(t *testing.T) {
	onTexts(t, func(t *testing.T, r textRecording, g *Guest) {
		c := comparison(t, g, r.ref)
		text := r.ref.Text()
		at := text.Addr + g.boot.Slide
		module := func() *loadedModule {
			return &loadedModule{code: code{start: at, end: at + 9000, name: "one", module: 1}, sections: map[string]uint64{".text": at, ".rodata": at + 8192}}
		}
		for _, s := range []stretch{{at, 8192}, {at + 8192, 808}} {
			b := make([]byte, s.n)
			c.readWhole(s.addr, b)
			c.saw(s.addr, b)
		}
		g.textSound.modules[1] = soundModule{g.textSound.identity(module()), c.seen, 3}
		if !c.sameModule(module()) {
			t.Error("nothing has changed")
		}
		for _, off := range []uint64{0, 5000, 8191, 8192, 8999} {
			undo := r.change(t, g, at+off, 1)
			if c.sameModule(module()) {
				t.Errorf("byte %d was changed", off)
			}
			undo()
		}
		for what, change := range map[string]func(m *loadedModule){
			"another module": func(m *loadedModule) { m.module = 2 }, "a name": func(m *loadedModule) { m.name = "two" },
			"its end": func(m *loadedModule) { m.end++ }, "a section": func(m *loadedModule) { m.sections[".text"]++ },
			"a section's name": func(m *loadedModule) { m.sections = map[string]uint64{".text": at, ".rodatb": at + 8192} },
			"a section less":   func(m *loadedModule) { delete(m.sections, ".rodata") },
		} {
			m := module()
			if change(m); c.sameModule(m) {
				t.Errorf("%s was changed", what)
			}
		}
		if !c.sameModule(module()) {
			t.Error("all is as it was")
		}
	})
}

// change flips bits of one byte at a kernel address.
func (r *textRecording) change(t testing.TB, g *Guest, va uint64, bits byte) (undo func()) {
	pa, err := g.space.Translate(va)
	if err != nil {
		t.Fatal(err)
	}
	line := r.lines[pa&^(lineSize-1)]
	if line == nil { // zeros are not recorded
		line = new([lineSize]byte)
		r.lines[pa&^(lineSize-1)] = line
	}
	at := pa % lineSize
	line[at] ^= bits
	return func() { line[at] ^= bits }
}

// TestTextNeverEnds flips bits anywhere in what the comparison reads (code, page tables, lists of modules, keys of static calls): it
// neither panics nor hangs, and reads no more than a healthy guest lets it read by much.
func TestTextNeverEnds(t *testing.T) {
	rounds := 150
	if testing.Short() {
		rounds = 60
	}
	onTexts(t, func(t *testing.T, r textRecording, g *Guest) {
		addrs, rng := r.sorted(), rand.New(rand.NewPCG(7, 8))
		for range rounds {
			bits := make([]uint64, 1+rng.IntN(12))
			for i := range bits {
				bits[i] = rng.Uint64()
				r.flip(addrs, bits[i])
			}
			r.compareOnce(t, g)
			for _, n := range bits {
				r.flip(addrs, n)
			}
		}
		if found, _, err := g.CheckText(r.ref, nil); err != nil || len(found) > 0 {
			t.Errorf("the memory is not what it was: %v, %v", found, err)
		}
	})
}

// compareOnce runs both checks of code, whatever they find.
func (r *textRecording) compareOnce(t testing.TB, g *Guest) (found []Finding) {
	t.Helper()
	r.reads = 0
	found, _, err := g.CheckText(r.ref, nil)
	_, _, err2 := g.CheckExecutable()
	for _, err := range []error{err, err2} {
		if err != nil && !errors.Is(err, ErrTorn) && !errors.Is(err, ErrNotReady) && !errors.Is(err, ErrEndless) {
			t.Error(err)
		}
	}
	if len(found) > maxTextFindings+maxModules {
		t.Errorf("%d findings", len(found))
	}
	if r.reads > 1_000_000 {
		t.Errorf("%d reads of memory with a few bits flipped", r.reads)
	}
	return found
}

// FuzzText changes a byte of code or read-only data, which is to be found, and writes 8 bytes anywhere.
func FuzzText(f *testing.F) {
	f.Add(uint8(0), uint32(100), byte(1), uint64(12345), uint64(1))
	f.Add(uint8(1), uint32(40<<10), byte(0xcc), uint64(9), uint64(0xffff888000000000))
	f.Add(uint8(0), uint32(30000), byte(0x90), uint64(30000), ^uint64(0))
	f.Add(uint8(1), uint32(5), byte(0x80), uint64(4000), uint64(0))
	var bases []textRecording
	var sorted [][]uint64
	for _, name := range textRecordings {
		r := loadText(f, name)
		bases, sorted = append(bases, r), append(sorted, r.sorted())
	}
	f.Fuzz(func(t *testing.T, which uint8, at uint32, bits byte, word, v uint64) {
		n := int(which) % len(bases)
		r, addrs := bases[n], sorted[n]
		r.recorded = r.clone()
		g, err := Attach(r.recorded, r.profile)
		if err != nil {
			t.Fatal(err)
		}
		text, ro := r.ref.Text(), r.ref.Rodata()
		va := text.Addr + uint64(at)%uint64(len(text.Data)+len(ro.Data))
		if va >= text.End() {
			va += ro.Addr - text.End()
		}
		undo := r.change(t, g, va+g.boot.Slide, bits)
		if found := r.compareOnce(t, g); bits != 0 && len(found) == 0 {
			t.Errorf("%s was changed, and nothing found", g.symbol(va+g.boot.Slide))
		}
		undo()
		r.put(addrs[word/8%uint64(len(addrs))]+word%8*8, v)
		r.compareOnce(t, g)
	})
}
