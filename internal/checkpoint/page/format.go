// Package page keeps guest memory on disk: the format of a checkpoint's RAM, its writer and its reader.
//
// A checkpoint's RAM file holds the pages that differ from its parent's, and nothing else: a page of zeros is an entry
// without data, equal pages are stored once, a page of which a few bytes changed is stored as the difference, and all of
// it is compressed. A file without a parent is whole: what it does not name is zero. Memory is put together by laying the
// files of a chain over each other, the oldest first, and every page is then compared with its digest.
//
//	header   who this is, whose child, how many pages the machine has
//	frames   up to 16 pages each, one after another as they were taken, compressed where that helps, with a CRC
//	index    an entry for each page in the file, by page number: its kind, where its data lie, its digest
//	trailer  where the index is, and the sum over header and index
//
// The sum stands in the checkpoint's record too: it vouches for the index, the index's digests for the pages. So damage
// and forgery are found, and named by page. The layout, byte by byte, is in doc/checkpoint-format.md.
//
// A guest fills these pages, and the process that writes them reads what the guest wrote: a reader takes nothing in the
// file on trust. All numbers are little endian.
package page

import (
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"

	"lukechampine.com/blake3"
)

// version is that of a file's format. The last is written, and every one is read.
type version uint32

const (
	version1 version = 1 // digests are BLAKE3's, frames are packed by zstd
	version2 version = 2 // SHA-256, which processors have instructions for, and S2: doc/decisions/185
)

// Size of a page, and how many pages a frame has at most.
const (
	Size       = 4096
	framePages = 16
)

// MaxPages bounds the memory of a machine: 1 TiB.
const MaxPages = 1 << 28

const (
	headerSize  = 64
	entrySize   = 32
	trailerSize = 64

	headerMagic  = "VIGIARAM"
	trailerMagic = "VIGIAEND"

	packed    = 1 << 31 // in a frame's length: it is compressed
	frameHead = 8       // its length and its CRC
)

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// Errors of reading. Every one of them says that the file can't be used.
var (
	ErrFormat  = errors.New("not a checkpoint's memory")
	ErrDamaged = errors.New("damaged")
	ErrChain   = errors.New("not of one chain")
)

// ID names a checkpoint's memory.
type ID [16]byte

// Digest is the first half of a page's hash.
type Digest [16]byte

// Sum is the hash of header and index.
type Sum [32]byte

// DigestOf hashes a page as a Writer does.
func DigestOf(p []byte) Digest { return version2.digest(p) }

func (v version) digest(p []byte) Digest {
	h := v.hash(p)
	return Digest(h[:16])
}

// frameHead is how many bytes stand before a frame: of version 1 its length alone.
func (v version) frameHead() int {
	if v == version1 {
		return 4
	}
	return frameHead
}

func (v version) hash(b []byte) [32]byte {
	if v == version1 {
		return blake3.Sum256(b)
	}
	return sha256.Sum256(b)
}

// kind is how an entry's page is stored.
type kind uint8

const (
	kindZero kind = iota // nothing is stored
	kindWhole
	kindDelta // what is stored is the difference (exclusive or) from the page as the parent has it
)

// entry is one page in the index.
type entry struct {
	page   uint32
	kind   kind
	slot   uint8 // in its frame
	frame  uint64
	digest Digest
}

func (e entry) put(b []byte) {
	binary.LittleEndian.PutUint32(b, e.page)
	b[4], b[5], b[6], b[7] = byte(e.kind), e.slot, 0, 0
	binary.LittleEndian.PutUint64(b[8:], e.frame)
	copy(b[16:], e.digest[:])
}

func getEntry(b []byte) entry {
	return entry{page: binary.LittleEndian.Uint32(b), kind: kind(b[4]), slot: b[5], frame: binary.LittleEndian.Uint64(b[8:]), digest: Digest(b[16:32])}
}

// check refuses an entry that no writer makes: after the page before, within the machine, its frame between header and index.
func (e entry) check(after int64, pages, index uint64) error {
	switch {
	case int64(e.page) <= after:
		return fmt.Errorf("%w: page %d comes after page %d", ErrFormat, e.page, after)
	case uint64(e.page) >= pages:
		return fmt.Errorf("%w: page %d of %d", ErrFormat, e.page, pages)
	case e.kind > kindDelta:
		return fmt.Errorf("%w: page %d is of kind %d", ErrFormat, e.page, e.kind)
	case e.kind == kindZero:
		return nil
	case e.slot >= framePages || e.frame < headerSize || e.frame >= index:
		return fmt.Errorf("%w: page %d lies at %d, slot %d", ErrFormat, e.page, e.frame, e.slot)
	}
	return nil
}

// header begins a file.
type header struct {
	version    version
	pages      uint64
	id, parent ID
}

func (h header) put() []byte {
	b := make([]byte, headerSize)
	copy(b, headerMagic)
	binary.LittleEndian.PutUint32(b[8:], uint32(h.version))
	binary.LittleEndian.PutUint32(b[12:], Size)
	binary.LittleEndian.PutUint64(b[16:], h.pages)
	copy(b[24:], h.id[:])
	copy(b[40:], h.parent[:])
	return b
}

func getHeader(b []byte) (header, error) {
	if len(b) < headerSize || string(b[:8]) != headerMagic {
		return header{}, fmt.Errorf("%w: it does not begin as one", ErrFormat)
	}
	v, s := version(binary.LittleEndian.Uint32(b[8:])), binary.LittleEndian.Uint32(b[12:])
	if v < version1 || v > version2 || s != Size {
		return header{}, fmt.Errorf("%w: version %d with pages of %d bytes; versions up to %d are known, with %d", ErrFormat, v, s, version2, Size)
	}
	h := header{version: v, pages: binary.LittleEndian.Uint64(b[16:]), id: ID(b[24:40]), parent: ID(b[40:56])}
	if h.pages == 0 || h.pages > MaxPages {
		return header{}, fmt.Errorf("%w: %d pages", ErrFormat, h.pages)
	}
	return h, nil
}

// trailer ends a file.
type trailer struct {
	index   uint64 // where the index begins
	entries uint64
	sum     Sum
}

func (t trailer) put() []byte {
	b := make([]byte, trailerSize)
	copy(b, trailerMagic)
	binary.LittleEndian.PutUint64(b[8:], t.index)
	binary.LittleEndian.PutUint64(b[16:], t.entries)
	copy(b[24:], t.sum[:])
	return b
}

func getTrailer(b []byte, size int64, pages uint64) (trailer, error) {
	if len(b) < trailerSize || string(b[:8]) != trailerMagic {
		return trailer{}, fmt.Errorf("%w: it has no end", ErrDamaged)
	}
	t := trailer{index: binary.LittleEndian.Uint64(b[8:]), entries: binary.LittleEndian.Uint64(b[16:]), sum: Sum(b[24:56])}
	if t.entries > pages || t.index < headerSize || t.index > uint64(size) || uint64(size)-t.index != t.entries*entrySize+trailerSize {
		return trailer{}, fmt.Errorf("%w: %d entries at %d of %d bytes", ErrFormat, t.entries, t.index, size)
	}
	return t, nil
}

// sum vouches for header and index, which follow each other in b.
func (v version) sum(b []byte) Sum { return Sum(v.hash(b)) }
