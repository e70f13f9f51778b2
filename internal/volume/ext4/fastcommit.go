package ext4

import (
	"bytes"
	"slices"
	"time"
)

// A fast commit is a short list of what changed since the last full commit, written to the end of the journal instead
// of the changed blocks. The full commit that follows says all of it again, so what a fast commit changed here is
// undone before that one is followed.
const (
	fastAddRange = 1
	fastDelRange = 2
	fastCreate   = 3
	fastLink     = 4
	fastUnlink   = 5
	fastInode    = 6
	fastPad      = 7
	fastTail     = 8
	fastHead     = 9
)

type fastLog struct {
	next    uint32 // the block of the area where the next one begins, from its start
	undo    []func()
	fresh   map[uint32]named // names that no directory block holds yet
	tooMany bool
}

const maxFastUndo = 1 << 14

func (l *fastLog) reset() {
	for _, u := range slices.Backward(l.undo) {
		u()
	}
	*l = fastLog{}
}

func (l *fastLog) path(t *Tracker, inode uint32) string {
	p := ""
	for range 16 {
		n, ok := l.fresh[inode]
		if !ok {
			break
		}
		p = "/" + n.name + p
		if dir, err := t.fs.dirPath(t.view(), t.parents, n.dir); err == nil {
			return dir + p
		}
		inode = n.dir
	}
	return ""
}

// followFast applies the complete fast commits that come next.
func (t *Tracker) followFast() {
	j := t.fs.log
	if j == nil || j.incompat&journalFastCommit == 0 {
		return
	}
	for !t.fast.tooMany {
		records, blocks := j.fast(t.fast.next)
		if blocks == 0 {
			return
		}
		t.fast.next += blocks
		t.applyFast(records)
		t.stats.Fast++
	}
}

type fastRecord struct {
	tag   uint16
	value []byte
}

// fast parses the fast commit that begins at block n of the area, if it is whole and belongs to the transaction that
// comes next.
func (j *journal) fast(n uint32) (records []fastRecord, blocks uint32) {
	sum := uint32(0)
	for ; j.last+1+n+blocks < j.maxlen; blocks++ { // the block at j.last is not used
		b := make([]byte, j.v.bs)
		if j.read(j.last+1+n+blocks, b) != nil {
			return nil, 0
		}
		for at := 0; at+4 <= len(b); {
			tag, size := le.Uint16(b[at:]), int(le.Uint16(b[at+2:]))
			if tag == 0 || tag > fastHead || at+4+size > len(b) {
				return nil, 0
			}
			value := b[at+4 : at+4+size]
			if first := n+blocks == 0 && at == 0; first != (tag == fastHead) || first && (size < 8 || le.Uint32(value[4:]) != j.seq) {
				return nil, 0
			}
			if tag == fastTail {
				if size < 8 || le.Uint32(value) != j.seq || crc32c(sum, b[at:at+8]) != le.Uint32(value[4:]) {
					return nil, 0
				}
				return records, blocks + 1
			}
			sum = crc32c(sum, b[at:at+4+size])
			records = append(records, fastRecord{tag, value})
			at += 4 + size
		}
	}
	return nil, 0
}

func (t *Tracker) applyFast(records []fastRecord) {
	d := t.newDelta(nil)
	d.fast = true
	for _, r := range records {
		switch r.tag {
		case fastAddRange, fastDelRange:
			t.fastRange(d, r)
		case fastCreate, fastLink, fastUnlink:
			t.fastName(d, r)
		case fastInode:
			t.fastInode(d, r.value)
		}
	}
	if len(t.fast.undo) > maxFastUndo {
		t.fast.tooMany = true // wait for the full commit
	}
	came, went := d.sorted(+1), d.sorted(-1)
	if t.fast.fresh == nil {
		t.fast.fresh = map[uint32]named{}
	}
	// The guest's kernel may be replaying these records right now: what is in its place already is no difference.
	came = slices.DeleteFunc(came, t.inPlace)
	went = slices.DeleteFunc(went, func(n named) bool { return !t.inPlace(n) && t.fast.fresh[n.inode] != n })
	for _, n := range came {
		t.fast.fresh[n.inode] = n
		t.parents.add(n.inode, n.dir)
		t.fast.undo = append(t.fast.undo, func() { t.parents.remove(n.inode, n.dir) })
	}
	for _, n := range went {
		t.parents.remove(n.inode, n.dir)
		t.fast.undo = append(t.fast.undo, func() { t.parents.add(n.inode, n.dir) })
	}
	t.rename(d, came, went, time.Time{})
	for _, g := range d.gained {
		t.bind(g)
	}
}

// inPlace says whether a directory block holds a name.
func (t *Tracker) inPlace(n named) bool {
	dir, err := t.fs.inode(n.dir)
	if err != nil {
		return false
	}
	inode, err := t.fs.child(t.view(), dir, n.name)
	return err == nil && inode == n.inode
}

// fastRange takes or gives up a range of one file's blocks.
func (t *Tracker) fastRange(d *delta, r fastRecord) {
	if len(r.value) < 12 {
		return
	}
	number := le.Uint32(r.value)
	x := t.index.Load()
	if r.tag == fastDelRange || len(r.value) < 16 || number == 0 || number > t.fs.sb.inodes {
		return // the blocks stay named until the full commit: nobody can be given them before
	}
	s := leaf(r.value[4:16])
	if s.n == 0 || s.start == 0 || s.start >= t.fs.sb.blocks || s.n > t.fs.sb.blocks-s.start {
		return
	}
	o := owner(number)
	for b, end := s.start, s.start+s.n; b < end; {
		got, next := x.at(b)
		next = min(next, end)
		if got == unowned {
			x.set(b, next-b, o, false)
			d.gained = append(d.gained, owned{o, b, next - b})
			t.fast.undo = append(t.fast.undo, func() { x.clear(b, next-b, o) })
		}
		b = next
	}
}

func (t *Tracker) fastName(d *delta, r fastRecord) {
	if len(r.value) < 9 || len(r.value) > 8+255 {
		return
	}
	n := named{dir: le.Uint32(r.value), inode: le.Uint32(r.value[4:]), name: string(bytes.TrimRight(r.value[8:], "\x00"))}
	if n.inode == 0 || n.inode > t.fs.sb.inodes || n.dir > t.fs.sb.inodes {
		return
	}
	if i, err := t.fs.inode(n.inode); err == nil && i.mode != 0 {
		n.kind = map[uint16]byte{modeRegular: ftypeRegular, modeDir: ftypeDir, modeSymlink: ftypeSymlink}[i.mode&modeType]
	}
	if w, ok := d.twins[n.inode]; ok {
		n.kind = map[uint16]byte{modeRegular: ftypeRegular, modeDir: ftypeDir, modeSymlink: ftypeSymlink}[w.new.mode&modeType]
	}
	if r.tag == fastUnlink {
		d.names[n]--
	} else {
		d.names[n]++
	}
}

func (t *Tracker) fastInode(d *delta, value []byte) {
	if len(value) < 4+128 || le.Uint32(value) == 0 || le.Uint32(value) > t.fs.sb.inodes {
		return
	}
	number := le.Uint32(value)
	raw := make([]byte, t.fs.sb.inodeSize)
	copy(raw, value[4:])
	old, err := t.fs.inode(number)
	if err != nil {
		return
	}
	d.twins[number] = twin{old, parseInode(number, raw)}
}
