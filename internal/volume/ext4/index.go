package ext4

import (
	"slices"
	"sort"
	"sync/atomic"
	"unsafe"
)

// owner says whom a block belongs to: an inode number and, in the two top bits, what of it the block holds.
// Zero is nobody: free, or not known.
type owner uint32

const (
	ownData    owner = 0 << 30
	ownDir     owner = 1 << 30
	ownTree    owner = 2 << 30 // extent tree or indirect blocks
	ownSpecial owner = 3 << 30 // the file system's own; the low bits are one of special*
	ownMask    owner = 3 << 30

	specialSuper  = ownSpecial | 1
	specialGroups = ownSpecial | 2
	specialBitmap = ownSpecial | 3
	specialInodes = ownSpecial | 4

	unowned owner = 0
)

func (o owner) inode() uint32 { return uint32(o &^ ownMask) }
func (o owner) kind() owner   { return o & ownMask }

const (
	chunkShift  = 12
	chunkBlocks = 1 << chunkShift
)

// run begins at a block of its chunk and ends where the next begins.
type run struct {
	start uint16
	owner owner
}

// chunk is the owners of 4096 successive blocks as runs, the first at 0. A published chunk never changes: it is replaced.
type chunk []run

// index maps blocks to owners. Reading takes no lock; writing is for one goroutine at a time. Files lie in few runs, so
// it is far smaller than a table of four bytes a block: 10,000 files on 2 GiB take about 200 KB.
type index struct {
	chunks []atomic.Pointer[chunk]
	blocks uint64
	runs   int // in all chunks
	limit  int // of runs; what does not fit is left unowned
	full   bool

	building bool // not published yet: chunks are changed in place
}

func newIndex(blocks uint64, limit int) *index {
	return &index{chunks: make([]atomic.Pointer[chunk], (blocks+chunkBlocks-1)>>chunkShift), blocks: blocks, limit: limit, building: true}
}

// at returns the owner of block b and the first block behind it that may have another.
func (x *index) at(b uint64) (owner, uint64) {
	n := b >> chunkShift
	if n >= uint64(len(x.chunks)) {
		return unowned, ^uint64(0)
	}
	base := n << chunkShift
	p := x.chunks[n].Load()
	if p == nil {
		return unowned, base + chunkBlocks
	}
	c, off := *p, uint16(b&(chunkBlocks-1))
	lo, hi := 0, len(c) // c[lo].start <= off < c[hi].start
	for hi-lo > 1 {
		if mid := int(uint(lo+hi) >> 1); c[mid].start <= off {
			lo = mid
		} else {
			hi = mid
		}
	}
	if hi < len(c) {
		return c[lo].owner, base + uint64(c[hi].start)
	}
	return c[lo].owner, base + chunkBlocks
}

// set makes n blocks from b belong to o, unless the index is full and force is not set.
func (x *index) set(b, n uint64, o owner, force bool) {
	if o != unowned && x.runs >= x.limit && !force {
		x.full = true
		return
	}
	for end := min(b+n, x.blocks); b < end; {
		i := b >> chunkShift
		base := i << chunkShift
		stop := min(end, base+chunkBlocks)
		old := chunk{{}}
		if p := x.chunks[i].Load(); p != nil {
			old = *p
			x.runs -= len(old)
		}
		c := old.put(uint16(b-base), uint16(stop-base-1), o, x.building)
		x.runs += len(c)
		if p := x.chunks[i].Load(); p != nil && x.building {
			*p = c
		} else {
			x.chunks[i].Store(&c)
		}
		b = stop
	}
}

// clear makes those of n blocks from b that belong to o belong to nobody.
func (x *index) clear(b, n uint64, o owner) {
	for end := b + n; b < end; {
		got, next := x.at(b)
		next = min(next, end)
		if got == o {
			x.set(b, next-b, unowned, true)
		}
		b = next
	}
}

// put returns c with lo..hi (both included) owned by o. It is a copy, unless inPlace is set.
func (c chunk) put(lo, hi uint16, o owner, inPlace bool) chunk {
	i := sort.Search(len(c), func(k int) bool { return c[k].start >= lo })
	j := sort.Search(len(c), func(k int) bool { return c[k].start > hi })
	var with [2]run
	n := 0
	if i == 0 || c[i-1].owner != o {
		with[n] = run{lo, o}
		n++
	}
	switch after := hi + 1; {
	case after >= chunkBlocks:
	case j < len(c) && c[j].start == after:
		if c[j].owner == o {
			j++ // the next run goes on with the same owner
		}
	case c[j-1].owner != o:
		with[n] = run{after, c[j-1].owner}
		n++
	}
	if inPlace {
		return slices.Replace(c, i, j, with[:n]...)
	}
	out := make(chunk, 0, len(c)+n-(j-i))
	return append(append(append(out, c[:i]...), with[:n]...), c[j:]...)
}

// bytes is the memory the index takes.
func (x *index) bytes() int64 {
	return int64(len(x.chunks))*int64(unsafe.Sizeof(x.chunks[0])) + int64(x.runs)*int64(unsafe.Sizeof(run{}))
}
