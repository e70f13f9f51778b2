package page

import (
	"encoding/binary"
	"fmt"
	"hash/crc32"
	"io"
	"os"
	"sync"

	"github.com/klauspost/compress/s2"
	"github.com/klauspost/compress/zstd"
)

// File is one checkpoint's memory, opened for reading. Its index is checked; its pages are when they are used.
type File struct {
	head    header
	entries []entry
	index   uint64
	sum     Sum
	r       io.ReaderAt
}

// Open reads header and index. With want not zero, it must be the sum of the file.
func Open(f *os.File, want Sum) (*File, error) {
	st, err := f.Stat()
	if err != nil {
		return nil, err
	}
	return OpenReader(f, st.Size(), want)
}

// OpenReader opens a file of so many bytes.
func OpenReader(r io.ReaderAt, size int64, want Sum) (*File, error) {
	if size < headerSize+trailerSize {
		return nil, fmt.Errorf("%w: %d bytes", ErrFormat, size)
	}
	first := make([]byte, headerSize)
	var last [trailerSize]byte
	if _, err := r.ReadAt(first, 0); err != nil {
		return nil, err
	}
	if _, err := r.ReadAt(last[:], size-trailerSize); err != nil {
		return nil, err
	}
	head, err := getHeader(first)
	if err != nil {
		return nil, err
	}
	end, err := getTrailer(last[:], size, head.pages)
	if err != nil {
		return nil, err
	}
	first = append(first, make([]byte, end.entries*entrySize)...) // no larger than the file
	index := first[headerSize:]
	if _, err := r.ReadAt(index, int64(end.index)); err != nil {
		return nil, err
	}
	f := &File{head: head, index: end.index, sum: head.version.sum(first), r: r}
	if f.sum != end.sum || want != (Sum{}) && f.sum != want {
		return nil, fmt.Errorf("%w: the index does not have the sum it should", ErrDamaged)
	}
	f.entries = make([]entry, end.entries)
	after := int64(-1)
	for i := range f.entries {
		e := getEntry(index[i*entrySize:])
		if err := e.check(after, head.pages, end.index); err != nil {
			return nil, err
		}
		f.entries[i], after = e, int64(e.page)
	}
	return f, nil
}

// ID, Parent, Pages and Sum say what the header does, and what vouches for it.
func (f *File) ID() ID        { return f.head.id }
func (f *File) Parent() ID    { return f.head.parent }
func (f *File) Pages() uint64 { return f.head.pages }
func (f *File) Sum() Sum      { return f.sum }

// frameReader unpacks one file's frames, keeping the last.
type frameReader struct {
	f    *File
	zstd *zstd.Decoder // of version 1
	at   uint64
	data []byte
	buf  []byte
}

func newFrameReader(f *File) (*frameReader, error) {
	r := &frameReader{f: f}
	if f.head.version != version1 {
		return r, nil
	}
	var err error
	r.zstd, err = zstd.NewReader(nil, zstd.WithDecoderConcurrency(1), zstd.WithDecoderMaxMemory(framePages*Size), zstd.WithDecoderLowmem(true))
	return r, err
}

// page returns the stored bytes of an entry, valid until the next call.
func (r *frameReader) page(e entry) ([]byte, error) {
	if r.at != e.frame {
		if err := r.load(e.frame); err != nil {
			r.at = 0
			return nil, err
		}
		r.at = e.frame
	}
	off := int(e.slot) * Size
	if off+Size > len(r.data) {
		return nil, fmt.Errorf("%w: page %d is in slot %d of a frame of %d bytes", ErrFormat, e.page, e.slot, len(r.data))
	}
	return r.data[off : off+Size], nil
}

func (r *frameReader) load(at uint64) error {
	var head [frameHead]byte
	n := uint64(r.f.head.version.frameHead())
	if at+n > r.f.index {
		return fmt.Errorf("%w: a frame at %d reaches into the index", ErrFormat, at)
	}
	if _, err := r.f.r.ReadAt(head[:n], int64(at)); err != nil {
		return err
	}
	at += n
	length := binary.LittleEndian.Uint32(head[:])
	if n = uint64(length &^ packed); n > framePages*Size || at+n > r.f.index {
		return fmt.Errorf("%w: a frame of %d bytes at %d", ErrFormat, n, at)
	}
	if cap(r.buf) < int(n) {
		r.buf = make([]byte, framePages*Size)
	}
	r.buf = r.buf[:n]
	if _, err := r.f.r.ReadAt(r.buf, int64(at)); err != nil {
		return err
	}
	if r.f.head.version != version1 && crc32.Checksum(r.buf, castagnoli) != binary.LittleEndian.Uint32(head[4:]) {
		return fmt.Errorf("%w: the frame at %d", ErrDamaged, at)
	}
	if length&packed == 0 {
		r.data = append(r.data[:0], r.buf...)
		return nil
	}
	data, err := r.unpack()
	if err != nil {
		return fmt.Errorf("%w: frame at %d: %v", ErrDamaged, at, err)
	}
	r.data = data
	return nil
}

// unpack takes no more room than a frame has, whatever buf says.
func (r *frameReader) unpack() ([]byte, error) {
	if r.zstd != nil {
		return r.zstd.DecodeAll(r.buf, r.data[:0])
	}
	if n, err := s2.DecodedLen(r.buf); err != nil || n > framePages*Size {
		return nil, fmt.Errorf("%d bytes (%v)", n, err)
	}
	return s2.Decode(r.data[:cap(r.data)], r.buf)
}

func (r *frameReader) close() {
	if r.zstd != nil {
		r.zstd.Close()
	}
}

// Chain is the files that make one machine's memory, oldest first.
type Chain []*File

// Check says whether the files belong on each other, the first of them whole.
func (c Chain) Check() error {
	if len(c) == 0 {
		return fmt.Errorf("%w: no file", ErrChain)
	}
	var below ID
	for i, f := range c {
		if f.head.version != c[0].head.version {
			return fmt.Errorf("%w: file %d is of version %d, the first of %d", ErrChain, i, f.head.version, c[0].head.version)
		}
		if f.head.parent != below || f.head.pages != c[0].head.pages {
			return fmt.Errorf("%w: file %d is a child of %x with %d pages, what lies below is %x with %d", ErrChain, i, f.head.parent, f.head.pages, below, c[0].head.pages)
		}
		below = f.head.id
	}
	return nil
}

// Known gathers what a Writer needs to write the next child. A chain of an older version can have none.
func (c Chain) Known() (*Known, error) {
	if err := c.Check(); err != nil {
		return nil, err
	}
	if v := c[0].head.version; v != version2 {
		return nil, fmt.Errorf("%w: of version %d, what is written is %d", ErrChain, v, version2)
	}
	k := NewKnown(c[0].head.pages)
	k.restIsZero()
	for _, f := range c {
		for _, e := range f.entries {
			k.digests[e.page] = e.digest
		}
	}
	return k, nil
}

// part is how many pages are put together at once: 1 MiB.
const part = 256

// Restore puts the memory together and gives it, run by run, to write; zeros are left out. Every page is compared with its
// digest before it is given. Workers share the work; write is called from all of them.
func (c Chain) Restore(workers int, write func(b []byte, off int64) error) error {
	if err := c.Check(); err != nil {
		return err
	}
	parts := make(chan uint32)
	errs := make(chan error, workers)
	stop := make(chan struct{})
	var once sync.Once
	for range workers {
		go func() {
			a, err := c.assembler()
			for first := range parts {
				if err == nil {
					err = a.part(first, write)
				}
				if err != nil {
					once.Do(func() { close(stop) })
				}
			}
			if a != nil {
				a.close()
			}
			errs <- err
		}()
	}
feed:
	for first := uint64(0); first < c[0].head.pages; first += part {
		select {
		case parts <- uint32(first):
		case <-stop:
			break feed
		}
	}
	close(parts)
	var err error
	for range workers {
		if e := <-errs; e != nil && err == nil {
			err = e
		}
	}
	return err
}

// assembler puts parts of a chain's memory together; the parts it is given ascend.
type assembler struct {
	version version
	readers []*frameReader
	next    []int // the entry of each file that is next
	data    [part * Size]byte
	digests [part]Digest
	filled  [part]bool
}

func (c Chain) assembler() (*assembler, error) {
	a := &assembler{version: c[0].head.version, next: make([]int, len(c))}
	for _, f := range c {
		r, err := newFrameReader(f)
		if err != nil {
			return nil, err
		}
		a.readers = append(a.readers, r)
	}
	return a, nil
}

func (a *assembler) close() {
	for _, r := range a.readers {
		r.close()
	}
}

func (a *assembler) part(first uint32, write func([]byte, int64) error) error {
	a.filled = [part]bool{}
	for i, r := range a.readers {
		if err := a.lay(i, r, first); err != nil {
			return err
		}
	}
	for i := 0; i < part; {
		if !a.filled[i] {
			i++
			continue
		}
		from := i
		for ; i < part && a.filled[i]; i++ {
			if a.version.digest(a.data[i*Size:(i+1)*Size]) != a.digests[i] {
				return fmt.Errorf("%w: page %d is not what was saved", ErrDamaged, first+uint32(i))
			}
		}
		if err := write(a.data[from*Size:i*Size], (int64(first)+int64(from))*Size); err != nil {
			return err
		}
	}
	return nil
}

// lay puts one file's pages over what the older ones gave.
func (a *assembler) lay(i int, r *frameReader, first uint32) error {
	entries := r.f.entries
	n := a.next[i]
	for n < len(entries) && entries[n].page < first {
		n++
	}
	for ; n < len(entries) && entries[n].page < first+part; n++ {
		e := entries[n]
		k := e.page - first
		page := a.data[k*Size : (k+1)*Size]
		if !a.filled[k] {
			clear(page)
		}
		if e.kind == kindZero {
			a.filled[k] = false
			continue
		}
		b, err := r.page(e)
		if err != nil {
			return err
		}
		if e.kind == kindWhole {
			copy(page, b)
		} else {
			xor(page, b)
		}
		a.digests[k], a.filled[k] = e.digest, true
	}
	a.next[i] = n
	return nil
}
