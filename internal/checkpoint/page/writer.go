package page

import (
	"bufio"
	"bytes"
	"encoding/binary"
	"fmt"
	"hash/crc32"
	"io"
	"slices"
	"sync"

	"github.com/klauspost/compress/s2"
)

// Known is what is known of the parent's pages: digests by page number, to leave out what has not changed, and the contents
// of those that changed last, of which the next change is stored as a difference. A Writer brings it up to date: it then
// describes the file that was written, and serves the next.
type Known struct {
	digests []Digest
	set     []bool
	hot     map[uint32][]byte
}

// hotPages bounds the contents that are kept: 16 MiB.
const hotPages = 4096

// NewKnown knows nothing of a machine with so many pages: each of them will be stored, or found to be zero.
func NewKnown(pages uint64) *Known {
	return &Known{digests: make([]Digest, pages), set: make([]bool, pages), hot: map[uint32][]byte{}}
}

// Stats of a file that was written.
type Stats struct {
	Pages  int64 // entries
	Zero   int64 // of them, zero
	Same   int64 // pages given that had not changed, and are not in the file
	Shared int64 // equal to another page of the file
	Delta  int64 // stored as a difference
	Bytes  int64 // of the file
	Sum    Sum
}

// Writer writes one file. Page is called by one goroutine; frames are compressed by others.
type Writer struct {
	head    header
	known   *Known
	whole   bool // there is no parent: zero needs no entry
	entries []stored
	seen    map[Digest]stored
	last    map[uint32][]byte // contents for Known.hot
	frame   *frame
	stats   Stats

	jobs chan *frame
	wg   sync.WaitGroup

	mu  sync.Mutex
	out io.Writer
	at  uint64
	err error
}

// stored is an entry whose frame may not have its place yet.
type stored struct {
	entry
	in *frame
}

// frame gathers pages until it is full.
type frame struct {
	data []byte
	at   uint64 // once it is written
}

// NewWriter begins a file. With parent the zero ID it is whole, and known must know nothing. Frames are packed by so many goroutines, each of
// which calls settle first, if that is given.
func NewWriter(out io.Writer, pages uint64, id, parent ID, known *Known, workers int, settle func()) (*Writer, error) {
	if pages == 0 || pages > MaxPages || uint64(len(known.digests)) != pages {
		return nil, fmt.Errorf("%w: %d pages", ErrFormat, pages)
	}
	w := &Writer{head: header{version: version2, pages: pages, id: id, parent: parent}, known: known, whole: parent == ID{}, seen: map[Digest]stored{},
		last: map[uint32][]byte{}, jobs: make(chan *frame, 2*workers), out: out, at: headerSize}
	if _, err := out.Write(w.head.put()); err != nil {
		return nil, err
	}
	for range workers {
		w.wg.Go(func() {
			if settle != nil {
				settle()
			}
			w.compress()
		})
	}
	return w, nil
}

var zeroPage [Size]byte
var zeroDigest = DigestOf(zeroPage[:])

// Page takes the content of a page. It does not keep b. Each page may come once.
func (w *Writer) Page(number uint32, b []byte) {
	if bytes.Equal(b, zeroPage[:]) {
		w.take(number, zeroPage[:], zeroDigest)
	} else {
		w.take(number, b, DigestOf(b))
	}
}

// Zero takes a page that is known to be zero.
func (w *Writer) Zero(number uint32) { w.take(number, zeroPage[:], zeroDigest) }

func (w *Writer) take(number uint32, b []byte, digest Digest) {
	e := stored{entry: entry{page: number, digest: digest}}
	zero := digest == zeroDigest
	known := w.known.set[number]
	if known && w.known.digests[number] == e.digest || zero && !known && w.whole {
		w.stats.Same++
		w.learn(number, e.digest, nil)
		return
	}
	switch twin, ok := w.seen[e.digest]; {
	case zero:
		w.stats.Zero++
	case ok:
		e.kind, e.slot, e.in = twin.kind, twin.slot, twin.in
		w.stats.Shared++
	default:
		w.store(&e, b)
	}
	w.entries = append(w.entries, e)
	w.learn(number, e.digest, b)
}

// store puts a page, or its difference from the parent's, into the open frame.
func (w *Writer) store(e *stored, b []byte) {
	if w.frame == nil {
		w.frame = &frame{data: make([]byte, 0, framePages*Size)}
	}
	e.kind, e.in, e.slot = kindWhole, w.frame, uint8(len(w.frame.data)/Size)
	w.frame.data = append(w.frame.data, b...)
	if old := w.known.hot[e.page]; old != nil {
		e.kind = kindDelta
		w.stats.Delta++
		xor(w.frame.data[len(w.frame.data)-Size:], old)
	} else {
		w.seen[e.digest] = *e
	}
	if len(w.frame.data) == framePages*Size {
		w.jobs <- w.frame
		w.frame = nil
	}
}

func (w *Writer) learn(number uint32, d Digest, b []byte) {
	w.known.digests[number], w.known.set[number] = d, true
	if b != nil && len(w.last) < hotPages {
		w.last[number] = bytes.Clone(b)
	}
}

func xor(dst, src []byte) {
	for i := 0; i+8 <= len(dst); i += 8 {
		binary.LittleEndian.PutUint64(dst[i:], binary.LittleEndian.Uint64(dst[i:])^binary.LittleEndian.Uint64(src[i:]))
	}
}

// compress writes frames as they come, each at its own place.
func (w *Writer) compress() {
	buf := make([]byte, frameHead+s2.MaxEncodedLen(framePages*Size))
	for f := range w.jobs {
		data := f.data
		body := s2.Encode(buf[frameHead:cap(buf)], data)
		length := uint32(len(body)) | packed
		if len(body) >= len(data) {
			body = append(body[:0], data...)
			length = uint32(len(data))
		}
		binary.LittleEndian.PutUint32(buf, length)
		binary.LittleEndian.PutUint32(buf[4:], crc32.Checksum(body, castagnoli))
		buf = buf[:frameHead+len(body)]
		f.data = nil
		w.mu.Lock()
		f.at = w.at
		w.at += uint64(len(buf))
		if w.err == nil {
			_, w.err = w.out.Write(buf)
		}
		w.mu.Unlock()
	}
}

// Finish writes index and trailer. The caller syncs the file.
func (w *Writer) Finish() (Stats, error) {
	if w.frame != nil {
		w.jobs <- w.frame
	}
	w.Abort()
	if w.err != nil {
		return Stats{}, w.err
	}
	slices.SortFunc(w.entries, func(a, b stored) int { return int(a.page) - int(b.page) })
	vouched := append(w.head.put(), make([]byte, len(w.entries)*entrySize)...)
	index := vouched[headerSize:]
	for i, e := range w.entries {
		if e.in != nil {
			e.frame = e.in.at
		}
		e.put(index[i*entrySize:])
	}
	w.stats.Sum = w.head.version.sum(vouched)
	end := trailer{index: w.at, entries: uint64(len(w.entries)), sum: w.stats.Sum}
	out := bufio.NewWriterSize(w.out, 1<<20)
	out.Write(index)
	out.Write(end.put())
	if err := out.Flush(); err != nil {
		return Stats{}, err
	}
	if w.whole {
		w.known.restIsZero()
	}
	w.known.keep(w.last)
	w.stats.Pages, w.stats.Bytes = int64(len(w.entries)), int64(w.at)+int64(len(index))+trailerSize
	return w.stats, nil
}

// keep makes the pages of the file that was just written the hot ones; of the older ones those stay for which there is room,
// unless they have changed since.
func (k *Known) keep(last map[uint32][]byte) {
	for number, b := range k.hot {
		if len(last) >= hotPages {
			break
		}
		if last[number] == nil && k.digests[number] == DigestOf(b) {
			last[number] = b
		}
	}
	k.hot = last
}

// restIsZero: what a whole file does not name is zero.
func (k *Known) restIsZero() {
	for i, set := range k.set {
		if !set {
			k.digests[i], k.set[i] = zeroDigest, true
		}
	}
}

// Abort gives a file up, and what is known with it; it may be called more than once.
func (w *Writer) Abort() {
	if w.jobs != nil {
		close(w.jobs)
		w.wg.Wait()
		w.jobs = nil
	}
}
