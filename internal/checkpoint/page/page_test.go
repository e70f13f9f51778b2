package page

import (
	"bytes"
	"errors"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
)

// machine is memory that a test changes and saves.
type machine struct {
	t     testing.TB
	dir   string
	mem   []byte
	known *Known
	last  ID
	n     byte
	r     *rand.Rand
}

func newMachine(t testing.TB, pages int) *machine {
	return &machine{t: t, dir: t.TempDir(), mem: make([]byte, pages*Size), known: NewKnown(uint64(pages)), r: rand.New(rand.NewPCG(1, 2))}
}

func (m *machine) page(i int) []byte { return m.mem[i*Size : (i+1)*Size] }

// save writes the pages named, or all, and returns the file's path.
func (m *machine) save(pages ...int) (string, Stats) {
	m.t.Helper()
	m.n++
	path := filepath.Join(m.dir, string('a'+m.n-1))
	f, err := os.Create(path)
	if err != nil {
		m.t.Fatal(err)
	}
	defer f.Close()
	id := ID{m.n}
	w, err := NewWriter(f, uint64(len(m.mem)/Size), id, m.last, m.known, 2, nil)
	if err != nil {
		m.t.Fatal(err)
	}
	if pages == nil {
		for i := range len(m.mem) / Size {
			pages = append(pages, i)
		}
	}
	for _, i := range pages {
		w.Page(uint32(i), m.page(i))
	}
	stats, err := w.Finish()
	if err != nil {
		m.t.Fatal(err)
	}
	m.last = id
	return path, stats
}

func chainOf(t testing.TB, paths ...string) Chain {
	t.Helper()
	var c Chain
	for _, p := range paths {
		f, err := os.Open(p)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { f.Close() })
		file, err := Open(f, Sum{})
		if err != nil {
			t.Fatal(err)
		}
		c = append(c, file)
	}
	return c
}

func restore(c Chain, size int) ([]byte, error) {
	out := make([]byte, size)
	var mu sync.Mutex
	err := c.Restore(2, func(b []byte, off int64) error {
		mu.Lock()
		defer mu.Unlock()
		copy(out[off:], b)
		return nil
	})
	return out, err
}

func (m *machine) fill(i int) {
	p := m.page(i)
	for k := range p {
		p[k] = byte(m.r.Uint32())
	}
}

// TestChain changes memory at random, saves it again and again, and gets each state back.
func TestChain(t *testing.T) {
	const pages = 3000
	m := newMachine(t, pages)
	for i := range 1500 {
		switch i % 4 {
		case 0:
			m.fill(i)
		case 1:
			copy(m.page(i), strings.Repeat("the same page ", 400))
		case 2:
			copy(m.page(i), strings.Repeat(string(rune('a'+i%20)), Size/2))
		}
	}
	var paths []string
	var states [][]byte
	path, stats := m.save()
	if stats.Shared < 300 || stats.Pages > 1200 {
		t.Errorf("equal and zero pages were stored: %+v", stats)
	}
	paths, states = append(paths, path), append(states, bytes.Clone(m.mem))
	for round := range 12 {
		var dirty []int
		for range 200 {
			i := m.r.IntN(pages)
			switch m.r.IntN(6) {
			case 0:
				m.fill(i)
			case 1:
				clear(m.page(i))
			case 2: // dirty, yet as it was
			case 3:
				copy(m.page(i), m.page(m.r.IntN(pages)))
			default:
				m.page(i)[m.r.IntN(Size)]++
			}
			dirty = append(dirty, i)
		}
		if round%4 == 3 {
			dirty = nil // whoever lost track gives all
		} else {
			dirty = unique(dirty)
		}
		if round == 6 { // another process goes on
			var err error
			if m.known, err = chainOf(t, paths...).Known(); err != nil {
				t.Fatal(err)
			}
		}
		path, stats := m.save(dirty...)
		if stats.Pages > 200 {
			t.Errorf("round %d: %d pages are stored, at most 200 have changed", round, stats.Pages)
		}
		paths, states = append(paths, path), append(states, bytes.Clone(m.mem))
	}
	for i := range states {
		got, err := restore(chainOf(t, paths[:i+1]...), len(m.mem))
		if err != nil || !bytes.Equal(got, states[i]) {
			t.Fatalf("state %d does not come back: %v", i, err)
		}
	}
}

// TestVersion1 reads files that the first version wrote. Nothing is written on top of them.
func TestVersion1(t *testing.T) {
	m := newMachine(t, 64)
	for i := range 24 {
		for k := range m.page(i) {
			m.page(i)[k] = byte(i + k/64)
		}
	}
	m.fill(30)
	for i := range 8 {
		m.page(i)[7]++
	}
	clear(m.page(9))
	copy(m.page(40), m.page(30))
	c := chainOf(t, "testdata/v1-first", "testdata/v1-second")
	if got, err := restore(c, len(m.mem)); err != nil || !bytes.Equal(got, m.mem) {
		t.Errorf("it does not come back: %v", err)
	}
	if _, err := c.Known(); !errors.Is(err, ErrChain) {
		t.Errorf("something may be written on version 1: %v", err)
	}
	path, _ := m.save()
	if _, err := restore(append(c[:1:1], chainOf(t, path)...), len(m.mem)); !errors.Is(err, ErrChain) {
		t.Errorf("two versions on each other: %v", err)
	}
}

func unique(in []int) []int {
	seen := map[int]bool{}
	var out []int
	for _, i := range in {
		if !seen[i] {
			seen[i] = true
			out = append(out, i)
		}
	}
	return out
}

// TestSmallChangesAreSmall: a hundred savings of a machine that changes a few bytes take little.
func TestSmallChangesAreSmall(t *testing.T) {
	m := newMachine(t, 4000)
	for i := range 2000 {
		m.fill(i)
	}
	_, first := m.save()
	var sum int64
	for range 100 {
		var dirty []int
		for i := range 150 {
			m.page(i)[m.r.IntN(Size)]++
			dirty = append(dirty, i)
		}
		_, s := m.save(dirty...)
		sum += s.Bytes
	}
	if sum > 3*first.Bytes/10 {
		t.Errorf("a hundred take %d bytes beside the first's %d", sum, first.Bytes)
	}
}

// TestDamage flips every kind of byte: what comes back is an error, never another memory.
func TestDamage(t *testing.T) {
	m := newMachine(t, 300)
	for i := range 200 {
		m.fill(i)
		clear(m.page(i)[100:])
	}
	a, _ := m.save()
	for i := range 50 {
		m.page(i)[7]++
	}
	b, _ := m.save()
	whole, err := os.ReadFile(b)
	if err != nil {
		t.Fatal(err)
	}
	base, child := chainOf(t, a)[0], chainOf(t, b)[0]
	step := max(1, len(whole)/4000)
	for at := 0; at < len(whole); at += step {
		bad := bytes.Clone(whole)
		bad[at] ^= 0x10
		f, err := OpenReader(bytes.NewReader(bad), int64(len(bad)), Sum{})
		if err == nil {
			var got []byte
			if got, err = restore(Chain{base, f}, len(m.mem)); err == nil && !bytes.Equal(got, m.mem) {
				t.Fatalf("byte %d flipped: another memory comes back", at)
			}
		}
		if err == nil && at < len(whole)-8 { // the last bytes mean nothing
			t.Errorf("byte %d of %d flipped: nobody noticed", at, len(whole))
		}
	}
	for n := 0; n < len(whole); n += step {
		if _, err := OpenReader(bytes.NewReader(whole[:n]), int64(n), Sum{}); err == nil {
			t.Errorf("cut to %d bytes: nobody noticed", n)
		}
	}
	if _, err := OpenReader(bytes.NewReader(whole), int64(len(whole)), Sum{1}); !errors.Is(err, ErrDamaged) {
		t.Errorf("another file's sum: %v", err)
	}
	if _, err := restore(Chain{child}, len(m.mem)); !errors.Is(err, ErrChain) {
		t.Errorf("a child alone: %v", err)
	}
	if _, err := restore(Chain{base, base}, len(m.mem)); !errors.Is(err, ErrChain) {
		t.Errorf("a file twice: %v", err)
	}
}

// FuzzOpen: a file as a process that was taken over may write it.
func FuzzOpen(f *testing.F) {
	m := newMachine(f, 64)
	for i := range 20 {
		m.fill(i)
		clear(m.page(i)[64:])
	}
	path, _ := m.save()
	good, err := os.ReadFile(path)
	if err != nil {
		f.Fatal(err)
	}
	f.Add(good)
	old, err := os.ReadFile("testdata/v1-first")
	if err != nil {
		f.Fatal(err)
	}
	f.Add(old)
	f.Fuzz(func(t *testing.T, b []byte) {
		file, err := OpenReader(bytes.NewReader(b), int64(len(b)), Sum{})
		if err != nil || file.Pages() > 1024 {
			return
		}
		Chain{file}.Restore(1, func(b []byte, off int64) error {
			if off < 0 || off+int64(len(b)) > int64(file.Pages())*Size {
				t.Fatalf("%d bytes at %d", len(b), off)
			}
			return nil
		})
	})
}

func BenchmarkSave(b *testing.B) {
	m := newMachine(b, 20000)
	for i := range 20000 {
		m.fill(i)
		clear(m.page(i)[1500:])
	}
	b.SetBytes(20000 * Size)
	for b.Loop() {
		m.known, m.last, m.n = NewKnown(20000), ID{}, 0
		m.save()
	}
}

func BenchmarkRestore(b *testing.B) {
	m := newMachine(b, 20000)
	for i := range 20000 {
		m.fill(i)
		clear(m.page(i)[1500:])
	}
	path, _ := m.save()
	c := chainOf(b, path)
	out := make([]byte, len(m.mem))
	b.SetBytes(20000 * Size)
	for b.Loop() {
		if err := c.Restore(2, func(b []byte, off int64) error { copy(out[off:], b); return nil }); err != nil {
			b.Fatal(err)
		}
	}
}
