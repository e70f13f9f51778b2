package volume

import (
	"bytes"
	"fmt"
	"io"
	"math/rand/v2"
	"slices"
	"testing"
)

// machine does random things to a volume and to a plain slice of bytes, and compares.
type machine struct {
	t      *testing.T
	r      *rand.Rand
	v      *Volume
	model  []byte
	layers []*crashFile
	over   *crashFile
	log    []string
}

const modelDisk = 5<<20 + 3*512

func (m *machine) say(format string, a ...any) { m.log = append(m.log, fmt.Sprintf(format, a...)) }

func (m *machine) must(err error) {
	m.t.Helper()
	if err != nil {
		m.fail(err)
	}
}

func (m *machine) fail(what any) {
	m.t.Helper()
	k := max(0, len(m.log)-30)
	for _, l := range m.log[k:] {
		m.t.Log(l)
	}
	m.t.Fatal(what)
}

func (m *machine) overlay(parent ID) *crashFile {
	f := newCrashFile(pages{}, 0)
	m.must(create(f, CreateOptions{Size: modelDisk, Parent: parent}))
	return f
}

func (m *machine) files() []file {
	var fs []file
	for _, l := range m.layers {
		fs = append(fs, l)
	}
	return fs
}

func (m *machine) span() (off, n int64) {
	off = m.r.Int64N(modelDisk)
	n = 1 + m.r.Int64N([]int64{600, 5000, 70000, 700000}[m.r.IntN(4)])
	if m.r.IntN(2) == 0 {
		off, n = off/BlockSize*BlockSize, (n+BlockSize-1)/BlockSize*BlockSize
	}
	return off, min(n, modelDisk-off)
}

func (m *machine) write() {
	off, n := m.span()
	p := pattern(int(n), m.r.Uint64())
	copy(m.model[off:], p)
	m.say("write %d at %d", n, off)
	_, err := m.v.WriteAt(p, off)
	m.must(err)
}

func (m *machine) zero() {
	off, n := m.span()
	clear(m.model[off : off+n])
	allocate := m.r.IntN(2) == 0
	m.say("zero %d at %d, allocate %v", n, off, allocate)
	m.must(m.v.WriteZeroes(off, n, allocate))
}

func (m *machine) trim() {
	off, n := m.span()
	m.say("trim %d at %d", n, off)
	from, to := (off+BlockSize-1)/BlockSize*BlockSize, (off+n)/BlockSize*BlockSize
	if off+n == modelDisk {
		to = modelDisk
	}
	if from < to {
		clear(m.model[from:to])
	}
	m.must(m.v.Trim(off, n))
}

func (m *machine) read() {
	off, n := m.span()
	p := pattern(int(n), 1)
	_, err := m.v.ReadAt(p, off)
	m.must(err)
	if !bytes.Equal(p, m.model[off:off+n]) {
		m.fail(fmt.Sprintf("read of %d at %d differs", n, off))
	}
}

// extents compares what is said to be zero with what is.
func (m *machine) extents() {
	off, n := m.span()
	at := off
	m.must(m.v.Extents(off, n, func(e Extent) bool {
		if e.Zero && !bytes.Equal(m.model[at:at+e.Length], make([]byte, e.Length)) {
			m.fail(fmt.Sprintf("extent of %d at %d is not zero", e.Length, at))
		}
		at += e.Length
		return true
	}))
	if at != off+n {
		m.fail("extents do not cover the range")
	}
}

func (m *machine) reopen() {
	m.say("reopen")
	m.must(m.v.Flush())
	m.over = newCrashFile(m.over.now, m.over.size)
	v, err := open(m.files(), m.over, Options{})
	m.must(err)
	m.v = v
}

func (m *machine) freeze() {
	m.say("freeze")
	id, err := m.v.Freeze()
	m.must(err)
	if _, err := m.v.WriteAt([]byte{1}, 0); err == nil {
		m.fail("a frozen volume took a write")
	}
	rep, err := Check(m.over, m.over.size)
	m.must(err)
	if !rep.Sound() || !rep.Frozen || rep.ID != id || len(rep.Notes) != 0 {
		m.fail(fmt.Sprintf("frozen layer: %+v", rep))
	}
	m.layers, m.over = append(m.layers, m.over), m.overlay(id)
	if m.r.IntN(2) == 0 { // a clone: another volume over the same layers
		m.say("clone")
		v, err := open(m.files(), m.over, Options{})
		m.must(err)
		m.v = v
		return
	}
	m.must(m.v.push(m.over))
}

// swap freezes beside whatever happens next.
func (m *machine) swap() {
	m.say("swap")
	next := m.overlay(m.v.ID())
	n, err := m.v.prepare(next)
	m.must(err)
	_, done, err := m.v.Swap(n)
	m.must(err)
	m.layers, m.over = append(m.layers, m.over), next
	for range m.r.IntN(3) {
		m.write()
		m.read()
	}
	m.must(<-done)
}

func (m *machine) step() {
	switch m.r.IntN(40) {
	case 0, 1, 2, 3:
		m.trim()
	case 4, 5, 6, 7:
		m.zero()
	case 8, 9:
		m.must(m.v.Flush())
	case 10:
		m.reopen()
	case 11:
		if m.r.IntN(2) == 0 {
			m.swap()
		} else {
			m.freeze()
		}
	case 12:
		m.flatten()
	case 13:
		m.extents()
	case 14, 15, 16, 17, 18, 19, 20:
		m.read()
	default:
		m.write()
	}
}

func TestAgainstModel(t *testing.T) {
	for seed := range uint64(8) {
		t.Run(fmt.Sprint(seed), func(t *testing.T) {
			t.Parallel()
			m := &machine{t: t, r: rand.New(rand.NewPCG(seed, 3)), model: make([]byte, modelDisk)}
			m.over = m.overlay(ID{})
			v, err := open(nil, m.over, Options{})
			m.must(err)
			m.v = v
			for range 200 {
				m.step()
			}
			m.finish()
		})
	}
}

// flatten puts one layer in the place of some that lie over each other.
func (m *machine) flatten() {
	if len(m.layers) < 2 {
		return
	}
	i := m.r.IntN(len(m.layers))
	j := i + 1 + m.r.IntN(len(m.layers)-i)
	m.say("flatten %d to %d of %d", i, j, len(m.layers))
	m.must(m.v.Flush())
	flat := newCrashFile(pages{}, 0)
	m.must(flatten(flat, m.files()[i:j], func(int64, int64) {}))
	m.layers = slices.Concat(m.layers[:i], []*crashFile{flat}, m.layers[j:])
	m.reopen()
}

// finish reads all, and checks every layer by itself and their chain.
func (m *machine) finish() {
	m.must(m.v.Flush())
	p := make([]byte, modelDisk)
	_, err := m.v.ReadAt(p, 0)
	m.must(err)
	if !bytes.Equal(p, m.model) {
		m.fail("the disk differs in the end")
	}
	var reps []Report
	for _, f := range append(m.layers, m.over) {
		rep, err := Check(io.ReaderAt(f), f.size)
		m.must(err)
		reps = append(reps, rep)
	}
	CheckChain(reps)
	for i, rep := range reps {
		if !rep.Sound() {
			m.fail(fmt.Sprintf("layer %d: %v", i, rep.Damage))
		}
	}
}
