package ext4

import (
	"hash/crc32"
	"slices"
	"time"
)

const (
	journalMagic = 0xC03B3998

	blockDescriptor = 1
	blockCommit     = 2
	blockSuperV1    = 3
	blockSuperV2    = 4
	blockRevoke     = 5

	journalChecksum = 0x1 // compat

	journal64Bit      = 0x2 // incompat
	journalAsync      = 0x4
	journalCsumV2     = 0x8
	journalCsumV3     = 0x10
	journalFastCommit = 0x20
	journalKnown      = 0x1 | journal64Bit | journalAsync | journalCsumV2 | journalCsumV3 | journalFastCommit

	tagEscape   = 1
	tagSameUUID = 2
	tagLast     = 8

	maxJournalSpans = 1 << 16
	maxTransaction  = 1 << 18 // blocks: a kernel stops at a quarter of the log
)

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// crc32c is the kernel's: no inversion before or after.
func crc32c(seed uint32, b []byte) uint32 { return ^crc32.Update(^seed, castagnoli, b) }

// journal is a file system's own jbd2 journal: where its blocks lie, what its superblock says, and how far the
// transactions in it have been followed.
type journal struct {
	v     *view // without layers: the journal is never journalled
	spans []span

	compat, incompat    uint32
	maxlen, first, last uint32 // last is the first block behind the log
	seed                uint32

	live bool   // pos and seq hold; else the log is empty and the next place is not known yet
	pos  uint32 // where the next transaction begins
	seq  uint32 // its number
	tail uint32 // where the oldest transaction begins that is not wholly in place yet

	buf, data []byte
}

func newJournal(v *view, i *inode) (*journal, error) {
	plain := *v
	plain.layers = nil
	j := &journal{v: &plain, buf: make([]byte, v.bs), data: make([]byte, v.bs)}
	m := mapper{v: &plain, budget: maxJournalSpans, visit: func(s span) error {
		if !s.tree {
			j.spans = append(j.spans, s)
		}
		return nil
	}}
	if err := m.inode(i); err != nil {
		return nil, err
	}
	slices.SortFunc(j.spans, func(a, b span) int { return int(int64(a.logical) - int64(b.logical)) })
	return j, j.load()
}

// place is the disk block of block i of the journal.
func (j *journal) place(i uint32) (uint64, error) {
	n, found := slices.BinarySearchFunc(j.spans, uint64(i), func(s span, i uint64) int {
		switch {
		case i < s.logical:
			return 1
		case i >= s.logical+s.n:
			return -1
		}
		return 0
	})
	if !found {
		return 0, corrupt("journal has no block %d", i)
	}
	return j.spans[n].start + uint64(i) - j.spans[n].logical, nil
}

// index is the inverse of place.
func (j *journal) index(block uint64) (uint32, bool) {
	for _, s := range j.spans {
		if block >= s.start && block-s.start < s.n {
			return uint32(s.logical + block - s.start), true
		}
	}
	return 0, false
}

func (j *journal) read(i uint32, buf []byte) error {
	b, err := j.place(i)
	if err != nil {
		return err
	}
	return j.v.raw(b, buf)
}

func (j *journal) copyOf(l logged, buf []byte) error {
	if err := j.read(l.index, buf); err != nil {
		return err
	}
	if l.escape {
		be.PutUint32(buf, journalMagic)
	}
	return nil
}

// load reads the journal's superblock. The kernel writes it when the log turns from empty to used and back, and when
// the log's tail moves; its features change at the first mount.
func (j *journal) load() error {
	b := j.buf
	if err := j.read(0, b); err != nil {
		return err
	}
	t := be.Uint32(b[4:])
	if be.Uint32(b) != journalMagic || t != blockSuperV1 && t != blockSuperV2 {
		return corrupt("journal without its superblock")
	}
	j.compat, j.incompat = 0, 0
	if t == blockSuperV2 {
		j.compat, j.incompat = be.Uint32(b[0x24:]), be.Uint32(b[0x28:])
	}
	if unknown := j.incompat &^ journalKnown; unknown != 0 {
		return ErrUnsupported{"journal feature"}
	}
	j.maxlen, j.first = be.Uint32(b[16:]), be.Uint32(b[20:])
	if int64(be.Uint32(b[12:])) != j.v.bs || j.first == 0 || j.maxlen <= j.first || uint64(j.maxlen) > j.v.blocks {
		return corrupt("journal of %d blocks from %d", j.maxlen, j.first)
	}
	j.last = j.maxlen
	if j.incompat&journalFastCommit != 0 {
		n := be.Uint32(b[0x54:])
		if n == 0 {
			n = 256
		}
		if n >= j.maxlen || j.maxlen-n <= j.first {
			return corrupt("%d fast commit blocks of %d", n, j.maxlen)
		}
		j.last -= n
	}
	j.seed = crc32c(^uint32(0), b[0x30:0x40])
	return j.locate(be.Uint32(b[28:]), be.Uint32(b[24:]))
}

// locate takes over the log's tail from the superblock, unless the log has been followed beyond it already.
func (j *journal) locate(start, seq uint32) error {
	j.tail = start
	switch {
	case start == 0:
		j.live, j.seq = false, seq
	case start < j.first || start >= j.last:
		return corrupt("journal begins at block %d", start)
	case !j.live || int32(seq-j.seq) > 0:
		j.live, j.pos, j.seq = true, start, seq
	}
	return nil
}

// holds says whether block i of the log lies between its tail and where it has been followed to.
func (j *journal) holds(i uint32) bool {
	switch {
	case !j.live:
		return false
	case j.tail <= j.pos:
		return i >= j.tail && i < j.pos
	}
	return i >= j.tail || i < j.pos
}

func (j *journal) wrap(i uint32) uint32 {
	if i >= j.last {
		return j.first + (i-j.last)%(j.last-j.first)
	}
	return i
}

func (j *journal) summed() bool { return j.incompat&(journalCsumV2|journalCsumV3) != 0 }

// transaction is one complete transaction of the log.
type transaction struct {
	seq     uint32
	blocks  []taggedBlock // in log order: the last of several copies of a block counts
	revoked []uint64
	time    time.Time
	end     uint32
}

type taggedBlock struct {
	block uint64
	logged
}

// next parses the transaction at j.pos. It returns nil if none is complete there.
func (j *journal) next() (*transaction, error) {
	if !j.live {
		return nil, nil
	}
	tx, pos := &transaction{seq: j.seq}, j.pos
	for steps := uint32(0); steps < j.last-j.first; {
		if err := j.read(pos, j.buf); err != nil {
			return nil, err
		}
		if be.Uint32(j.buf) != journalMagic || be.Uint32(j.buf[8:]) != j.seq {
			return nil, nil
		}
		pos, steps = j.wrap(pos+1), steps+1
		switch be.Uint32(j.buf[4:]) {
		case blockDescriptor:
			n, ok, err := j.descriptor(tx, pos)
			if err != nil || !ok {
				return nil, err
			}
			pos, steps = j.wrap(pos+n), steps+n
		case blockRevoke:
			if !j.revoke(tx) {
				return nil, nil
			}
		case blockCommit:
			if !j.commit(tx) {
				return nil, nil
			}
			tx.end = pos
			return tx, nil
		default:
			return nil, nil
		}
	}
	return nil, nil
}

// advance moves behind tx.
func (j *journal) advance(tx *transaction) { j.pos, j.seq = tx.end, tx.seq+1 }

func (j *journal) tagSize() int {
	switch {
	case j.incompat&journalCsumV3 != 0:
		return 16
	case j.incompat&journalCsumV2 != 0 && j.incompat&journal64Bit != 0:
		return 14
	case j.incompat&journalCsumV2 != 0:
		return 10
	case j.incompat&journal64Bit != 0:
		return 12
	}
	return 8
}

// descriptor takes the tags of j.buf, whose blocks follow from pos on. ok is false where a checksum does not hold: the
// transaction is torn or not wholly written.
func (j *journal) descriptor(tx *transaction, pos uint32) (n uint32, ok bool, err error) {
	b := j.buf
	end := len(b)
	if j.summed() {
		if !tailHolds(j.seed, b) {
			return 0, false, nil
		}
		end -= 4
	}
	size := j.tagSize()
	for at := 12; at+size <= end; {
		t := j.tag(b[at:])
		if t.block >= j.v.limit || len(tx.blocks) >= maxTransaction || n >= j.last-j.first {
			return 0, false, corrupt("journal names block %d", t.block)
		}
		index := j.wrap(pos + n)
		if j.summed() {
			if holds, err := j.tagHolds(tx.seq, index, t.sum); err != nil || !holds {
				return 0, false, err
			}
		}
		tx.blocks = append(tx.blocks, taggedBlock{t.block, logged{index: index, escape: t.flags&tagEscape != 0}})
		n++
		if t.flags&tagLast != 0 {
			return n, true, nil
		}
		at += size
		if t.flags&tagSameUUID == 0 {
			at += 16
		}
	}
	return n, true, nil
}

type tag struct {
	block      uint64
	flags, sum uint32
}

func (j *journal) tag(b []byte) tag {
	if j.incompat&journalCsumV3 != 0 {
		return j.high(tag{uint64(be.Uint32(b)), be.Uint32(b[4:]), be.Uint32(b[12:])}, b)
	}
	return j.high(tag{uint64(be.Uint32(b)), uint32(be.Uint16(b[6:])), uint32(be.Uint16(b[4:]))}, b)
}

func (j *journal) high(t tag, b []byte) tag {
	if j.incompat&journal64Bit != 0 {
		t.block |= uint64(be.Uint32(b[8:])) << 32
	}
	return t
}

func (j *journal) tagHolds(seq, index, sum uint32) (bool, error) {
	if err := j.read(index, j.data); err != nil {
		return false, err
	}
	var n [4]byte
	be.PutUint32(n[:], seq)
	c := crc32c(crc32c(j.seed, n[:]), j.data)
	if j.incompat&journalCsumV3 == 0 {
		c &= 0xFFFF
	}
	return c == sum, nil
}

// tailHolds checks the checksum in the last four bytes of a descriptor or revoke block.
func tailHolds(seed uint32, b []byte) bool {
	at := len(b) - 4
	sum := be.Uint32(b[at:])
	c := crc32c(crc32c(seed, b[:at]), []byte{0, 0, 0, 0})
	return c == sum
}

func (j *journal) revoke(tx *transaction) bool {
	b := j.buf
	if j.summed() && !tailHolds(j.seed, b) {
		return false
	}
	size := 4
	if j.incompat&journal64Bit != 0 {
		size = 8
	}
	end := min(int(be.Uint32(b[12:])), len(b))
	for at := 16; at+size <= end && len(tx.revoked) < maxTransaction; at += size {
		if size == 8 {
			tx.revoked = append(tx.revoked, be.Uint64(b[at:]))
		} else {
			tx.revoked = append(tx.revoked, uint64(be.Uint32(b[at:])))
		}
	}
	return true
}

func (j *journal) commit(tx *transaction) bool {
	b := j.buf
	if j.summed() {
		sum := be.Uint32(b[16:])
		be.PutUint32(b[16:], 0)
		if crc32c(j.seed, b) != sum {
			return false
		}
	}
	tx.time = time.Unix(int64(be.Uint64(b[48:])), int64(be.Uint32(b[56:])))
	return true
}

// merge notes in layer what tx left in the log. A revoked block was freed: its older copies must not come back.
func (tx *transaction) merge(layer map[uint64]logged) {
	for _, t := range tx.blocks {
		layer[t.block] = t.logged
	}
	for _, b := range tx.revoked {
		delete(layer, b)
	}
}
