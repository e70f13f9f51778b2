package introspect

import (
	"hash/maphash"
	"maps"
	"slices"

	"vigia/internal/kernel/patch"
)

// soundText remembers windows that were found to be as they must be, by a sum of their bytes under a key that the guest
// can't know: as long as they stay the same they need not be explained again, which is what takes the time. So it does modules.
type soundText struct {
	boot   Boot
	seed   maphash.Seed
	mode   *patch.Mode       // what the kernel chose, asked again after anything was found
	known  map[uint64]uint64 // by link address
	traced map[uint64]int
	// modules are those whose code was found so, by the address of their struct.
	modules map[uint64]soundModule
}

// stretch is a stretch of memory.
type stretch struct {
	addr uint64
	n    int
}

// sightOf is what was read of a module, in order, and the sum of it.
type sightOf struct {
	spans []stretch
	sum   uint64
	// probed: the kernel has a probe in it.
	probed bool
}

// soundModule is a module whose code was as it must be: who it was, and what was read of it.
type soundModule struct {
	identity uint64
	sight    sightOf
	sites    int
}

// begin forgets what was known of another life of the kernel.
func (s *soundText) begin(boot Boot) {
	if s.boot != boot || s.known == nil {
		*s = soundText{boot: boot, seed: maphash.MakeSeed(), known: map[uint64]uint64{}, traced: map[uint64]int{},
			modules: map[uint64]soundModule{}}
	}
}

func (s *soundText) sum(b []byte) uint64 { return maphash.Bytes(s.seed, b) | 1 }

// saw notes what was read of a module.
func (t *textCheck) saw(addr uint64, got []byte) {
	t.seen.spans = append(t.seen.spans, stretch{addr, len(got)})
	t.seen.sum = t.textSound.chain(t.seen.sum, got)
}

// chain sums a stretch behind others.
func (s *soundText) chain(sum uint64, b []byte) uint64 {
	return maphash.Comparable(s.seed, [2]uint64{sum, maphash.Bytes(s.seed, b)})
}

// identity sums up who a module says it is and where its parts are.
func (s *soundText) identity(m *loadedModule) uint64 {
	sum := maphash.Comparable(s.seed, [3]uint64{m.module, m.start, m.end})
	sum = s.chain(sum, []byte(m.name))
	for _, name := range slices.Sorted(maps.Keys(m.sections)) {
		sum = maphash.Comparable(s.seed, [2]uint64{s.chain(sum, []byte(name)), m.sections[name]})
	}
	return sum
}

// sameModule reports whether a module is, byte by byte, what was found as it must be.
func (t *textCheck) sameModule(m *loadedModule) bool {
	known, ok := t.textSound.modules[m.module]
	if !ok || known.identity != t.textSound.identity(m) {
		return false
	}
	var sum uint64
	n := 0
	for _, s := range known.sight.spans {
		t.got = slices.Grow(t.got[:0], s.n)[:s.n]
		t.readWhole(s.addr, t.got)
		sum = t.textSound.chain(sum, t.got)
		n += s.n
	}
	if sum != known.sight.sum {
		return false
	}
	t.stats.Modules, t.stats.Bytes, t.stats.Sites = t.stats.Modules+1, t.stats.Bytes+n, t.stats.Sites+known.sites
	return true
}

// readWhole reads; pages that are gone read as zeros, and so are told as changed.
func (t *textCheck) readWhole(addr uint64, b []byte) {
	if read, _ := t.space.ReadSome(addr, b); read < len(b) {
		clear(b[read:])
	}
}

// forget lets go of modules that are not loaded any more.
func (s *soundText) forget(loaded []*loadedModule) {
	maps.DeleteFunc(s.modules, func(at uint64, _ soundModule) bool {
		return !slices.ContainsFunc(loaded, func(m *loadedModule) bool { return m.module == at })
	})
}
