package volume

import (
	"errors"
	"io"
	"maps"
	"math/rand/v2"
	"sort"
	"sync"
)

// pages is the content of a sparse file, by 4 KiB page. Pages are never changed in place, so a copy of the map is a copy
// of the file.
type pages map[int64]*[BlockSize]byte

func (p pages) ReadAt(b []byte, off int64) (int, error) {
	for done := 0; done < len(b); {
		n, in := (off+int64(done))/BlockSize, (off+int64(done))%BlockSize
		k := min(len(b)-done, int(BlockSize-in))
		if pg := p[n]; pg != nil {
			copy(b[done:done+k], pg[in:])
		} else {
			clear(b[done : done+k])
		}
		done += k
	}
	return len(b), nil
}

// write puts the part of b, which lies at off, that falls into page n.
func (p pages) write(n int64, b []byte, off int64) {
	pg := new([BlockSize]byte)
	if old := p[n]; old != nil {
		*pg = *old
	}
	at := n * BlockSize
	lo, hi := max(at, off), min(at+BlockSize, off+int64(len(b)))
	copy(pg[lo-at:hi-at], b[lo-off:hi-off])
	p[n] = pg
}

// host counts what is done to all files of a test, so that a crash of all of them can be played at one instant.
type host struct {
	mu sync.Mutex
	n  int
}

func (h *host) tick() int {
	if h == nil {
		return 0
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	h.n++
	return h.n - 1
}

// op is something done to a crashFile.
type op struct {
	at   int // the host's count
	sync bool
	off  int64
	data []byte // nil: the n bytes at off were punched out
	n    int64
}

// crashFile is a file in memory that remembers everything done to it.
type crashFile struct {
	mu     sync.Mutex
	now    pages
	start  pages
	size   int64
	ops    []op
	made   pages // what the first madeOf operations made
	madeOf int
	onSync func()                         // called while a sync is under way
	fail   func(what string, n int) error // what: read, write, sync, punch
	host   *host
}

func newCrashFile(p pages, size int64) *crashFile {
	return &crashFile{now: maps.Clone(p), start: maps.Clone(p), size: size}
}

func (f *crashFile) failing(what string, n int) error {
	if f.fail == nil {
		return nil
	}
	return f.fail(what, n)
}

func (f *crashFile) ReadAt(b []byte, off int64) (int, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if err := f.failing("read", len(b)); err != nil {
		return 0, err
	}
	if off+int64(len(b)) > f.size {
		return 0, io.ErrUnexpectedEOF
	}
	return f.now.ReadAt(b, off)
}

func (f *crashFile) WriteAt(b []byte, off int64) (int, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if err := f.failing("write", len(b)); err != nil {
		return 0, err
	}
	if off+int64(len(b)) > f.size {
		return 0, errors.New("a write behind the end of the layer's file")
	}
	o := op{at: f.host.tick(), off: off, data: append([]byte(nil), b...), n: int64(len(b))}
	f.ops = append(f.ops, o)
	for n := off / BlockSize; n*BlockSize < off+o.n; n++ {
		f.now.write(n, o.data, off)
	}
	return len(b), nil
}

func (f *crashFile) Punch(off, n int64) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if err := f.failing("punch", int(n)); err != nil {
		return err
	}
	f.ops = append(f.ops, op{at: f.host.tick(), off: off, n: n})
	for k := off / BlockSize; k*BlockSize < off+n; k++ {
		delete(f.now, k)
	}
	return nil
}

func (f *crashFile) Sync() error {
	if f.onSync != nil {
		f.onSync()
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	if err := f.failing("sync", 0); err != nil {
		return err
	}
	f.ops = append(f.ops, op{at: f.host.tick(), sync: true})
	return nil
}

func (f *crashFile) Truncate(n int64) error { f.size = n; return nil }
func (f *crashFile) Size() (int64, error)   { return f.size, nil }

func (f *crashFile) done() int {
	f.mu.Lock()
	defer f.mu.Unlock()
	return len(f.ops)
}

// until is how many operations were begun before the host's count was t.
func (f *crashFile) until(t int) int {
	return sort.Search(len(f.ops), func(i int) bool { return f.ops[i].at >= t })
}

// after is what a power cut leaves once the first k operations were begun: everything up to the last sync, and of each
// sector what it was at some moment since, as writeback goes page by page in any order and may tear a page between
// sectors. A killed process leaves everything: tear is nil.
func (f *crashFile) after(k int, tear *rand.Rand) pages {
	if k == 0 {
		return maps.Clone(f.start)
	}
	synced := 0
	for i, o := range f.ops[:k] {
		if o.sync {
			synced = i
		}
	}
	disk := f.upTo(synced)
	// progress says, of a page (-1-n) or a sector, up to which operation it has reached the disk.
	progress := map[int64]int{}
	if last := f.ops[k-1]; tear != nil && !last.sync && tear.IntN(2) == 0 {
		// What was written last is there, which is what a missing sync before it cannot bear.
		for n := last.off / BlockSize; n*BlockSize < last.off+last.n; n++ {
			progress[-1-n] = k
		}
	}
	for j, o := range f.ops[synced:k] {
		i := synced + j
		if o.sync {
			continue
		}
		for n := o.off / BlockSize; n*BlockSize < o.off+o.n; n++ {
			if tear == nil {
				o.apply(disk, n)
				continue
			}
			o.applyTorn(disk, n, i, k, synced, progress, tear)
		}
	}
	return disk
}

// upTo is what the first k operations made, torn by nothing. It goes on from what it was asked for last.
func (f *crashFile) upTo(k int) pages {
	if f.made == nil || k < f.madeOf {
		f.made, f.madeOf = maps.Clone(f.start), 0
	}
	for _, o := range f.ops[f.madeOf:k] {
		for n := o.off / BlockSize; !o.sync && n*BlockSize < o.off+o.n; n++ {
			o.apply(f.made, n)
		}
	}
	f.madeOf = k
	return maps.Clone(f.made)
}

func (o op) apply(disk pages, n int64) {
	if o.data == nil {
		delete(disk, n)
		return
	}
	disk.write(n, o.data, o.off)
}

func (o op) applyTorn(disk pages, n int64, i, k, synced int, progress map[int64]int, tear *rand.Rand) {
	pageLimit, ok := progress[-1-n]
	if !ok {
		pageLimit = synced + tear.IntN(k-synced+1)
		if tear.IntN(4) == 0 {
			pageLimit = k
		}
		progress[-1-n] = pageLimit
	}
	torn := (uint64(n)*0x9e3779b97f4a7c15+uint64(k))>>61 == 0 // one page in eight is torn between sectors
	if !torn {
		if i < pageLimit {
			o.apply(disk, n)
		}
		return
	}
	for s := n * 8; s < n*8+8; s++ {
		limit, ok := progress[s]
		if !ok {
			limit = synced + tear.IntN(k-synced+1)
			progress[s] = limit
		}
		lo, hi := max(s*sector, o.off), min((s+1)*sector, o.off+o.n)
		if i >= limit || lo >= hi {
			continue
		}
		if o.data == nil {
			disk.write(n, make([]byte, hi-lo), lo)
		} else {
			disk.write(n, o.data[lo-o.off:hi-o.off], lo)
		}
	}
}
