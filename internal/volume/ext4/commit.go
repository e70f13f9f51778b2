package ext4

import (
	"bytes"
	"cmp"
	"fmt"
	"slices"
)

// owned is a run of blocks that an inode gained or lost.
type owned struct {
	owner
	start, n uint64
}

// named is a directory entry that came or went.
type named struct {
	dir, inode uint32
	kind       byte
	name       string
}

// twin is an inode before and after a transaction.
type twin struct{ old, new *inode }

// delta is the difference that one transaction makes.
type delta struct {
	f        *FS
	x        *index
	old, new *view
	a, b     []byte // one block before and after

	lost, gained []owned
	lostTrees    map[uint64]bool
	dirs         map[uint64]uint32 // directory blocks and whose they were before; 0 for none
	twins        map[uint32]twin
	names        map[named]int // +1 came, -1 went
	data         []owned       // file data in the journal
	resized      bool
	fast         bool // made from a fast commit: inodes are not in their places
	broken       error
	budget       int
	paths        map[uint32]string // of directories, as asked for
}

const (
	maxDeltaDirs  = 1 << 16 // directory blocks in one transaction
	maxDeltaNames = 1 << 18
	maxOverlay    = 1 << 17 // committed blocks not yet in their places
)

// apply follows one committed transaction.
func (t *Tracker) apply(tx *transaction) {
	x := t.index.Load()
	t.fast.reset()
	top := make(map[uint64]logged, len(tx.blocks))
	tx.merge(top)
	d := t.newDelta(top)
	d.blocks(tx, top)
	d.settle()
	d.entries()
	came, went := d.sorted(+1), d.sorted(-1)
	for _, n := range went {
		t.retire(d, n)
	}
	for b, l := range top {
		o, _ := x.at(b)
		l.data = o.kind() == ownData && o != unowned
		t.putLogged(b, l)
	}
	for _, b := range tx.revoked {
		t.dropLogged(b)
	}
	if len(t.overlay) > maxOverlay {
		d.fail(fmt.Errorf("more than %d blocks wait in the journal: %w", maxOverlay, ErrTooLarge))
	}
	d.new = t.view()
	t.finish(d, tx, came, went)
	t.pending.turn()
}

func (t *Tracker) newDelta(top map[uint64]logged) *delta {
	bs := t.fs.sb.blockSize
	return &delta{f: t.fs, x: t.index.Load(), old: t.view(), new: t.view().under(top),
		a: make([]byte, bs), b: make([]byte, bs), lostTrees: map[uint64]bool{}, dirs: map[uint64]uint32{},
		twins: map[uint32]twin{}, names: map[named]int{}, paths: map[uint32]string{}, budget: 1<<20 + int(min(t.fs.sb.blocks, 1<<24))}
}

func (d *delta) fail(err error) {
	if err != nil && d.broken == nil {
		d.broken = err
	}
}

// blocks sorts a transaction's blocks by what they hold and takes the differences.
func (d *delta) blocks(tx *transaction, top map[uint64]logged) {
	var trees []owned
	for _, t := range tx.blocks {
		if l, ok := top[t.block]; !ok || l.index != t.index {
			continue // revoked, or a later copy counts
		}
		o, _ := d.x.at(t.block)
		switch {
		case o == specialInodes:
			d.inodes(t.block)
		case o == specialSuper:
			d.super(t.block)
		case o == specialGroups || o == specialBitmap:
		case o.kind() == ownTree:
			trees = append(trees, owned{o, t.block, 1})
		case o.kind() == ownDir:
			d.dirs[t.block] = o.inode()
		default: // of a file, or of nobody yet: its own data, or metadata that are new
			d.data = append(d.data, owned{o, t.block, 1})
		}
	}
	d.trees(trees)
}

func (d *delta) super(block uint64) {
	if err := d.new.block(block, d.b); err != nil {
		d.fail(err)
		return
	}
	at := superOffset % d.f.sb.blockSize
	sb, err := parseSuper(d.b[at:], int64(d.f.v.limit)*d.f.sb.blockSize)
	d.resized = d.resized || err != nil || !sb.same(d.f.sb)
}

// inodes compares a block of an inode table with what it was.
func (d *delta) inodes(block uint64) {
	first, ok := d.f.firstInode(block)
	if !ok {
		return
	}
	if err := d.old.block(block, d.a); err != nil {
		d.fail(err)
		return
	}
	if err := d.new.block(block, d.b); err != nil {
		d.fail(err)
		return
	}
	size := d.f.sb.inodeSize
	for i := int64(0); (i+1)*size <= int64(len(d.a)); i++ {
		a, b := d.a[i*size:(i+1)*size], d.b[i*size:(i+1)*size]
		if number := first + uint32(i); !bytes.Equal(a, b) && number != resizeInode && number <= d.f.sb.inodes {
			d.inode(number, bytes.Clone(a), bytes.Clone(b))
		}
	}
}

func (d *delta) inode(number uint32, a, b []byte) {
	w := twin{parseInode(number, a), parseInode(number, b)}
	d.twins[number] = w
	was, is := w.old.inUse(d.f.sb.inodes), w.new.inUse(d.f.sb.inodes)
	const mapFlags = flagExtents | flagInline
	switch {
	case was && is && w.old.mode&modeType == w.new.mode&modeType && w.old.flags&mapFlags == w.new.flags&mapFlags:
		if bytes.Equal(w.old.root(), w.new.root()) && !w.new.inline() {
			return
		}
		if w.new.mapped() && w.old.mapped() && w.new.flags&flagExtents != 0 {
			d.nodes(w.new, w.old.root(), w.new.root())
			return
		}
	}
	if was {
		d.walk(d.old, w.old, d.lose)
		d.inlineNames(w.old, -1)
	}
	if is {
		d.walk(d.new, w.new, d.gain)
		d.inlineNames(w.new, +1)
	}
}

func (d *delta) inlineNames(i *inode, sign int) {
	if !i.isDir() || !i.inline() {
		return
	}
	d.fail(inlineEntries(i, d.f.filetype(), func(e entry) bool {
		d.names[named{i.number, e.inode, e.kind, string(e.name)}] += sign
		return true
	}))
}

func (d *delta) lose(i *inode, s span) {
	o := ownerOf(i, s)
	d.lost = append(d.lost, owned{o, s.start, s.n})
	if s.tree {
		d.lostTrees[s.start] = true
	}
}

func (d *delta) gain(i *inode, s span) {
	d.gained = append(d.gained, owned{ownerOf(i, s), s.start, s.n})
}

func (d *delta) walk(v *view, i *inode, visit func(*inode, span)) {
	m := d.mapper(v, i, visit)
	d.fail(m.inode(i))
	d.budget = m.budget
}

func (d *delta) mapper(v *view, i *inode, visit func(*inode, span)) *mapper {
	return &mapper{v: v, budget: d.budget, visit: func(s span) error { visit(i, s); return nil }}
}

// nodes compares a node of an extent tree with what it was. Children that both have are left alone: if they changed,
// they are in the transaction themselves.
func (d *delta) nodes(i *inode, a, b []byte) {
	na, da, err := extentHeader(a)
	if err != nil {
		na = 0
	}
	nb, db, err := extentHeader(b)
	if err != nil {
		d.fail(err)
		return
	}
	old := map[[12]byte]bool{}
	key := func(node []byte, n int) (k [12]byte) {
		copy(k[:], node[12+12*n:])
		if da > 0 {
			clear(k[:4]) // an index entry is the block it points to
			clear(k[10:])
		}
		return k
	}
	if da == db {
		for n := range na {
			old[key(a, n)] = true
		}
	}
	for n := range nb {
		if k := key(b, n); old[k] {
			old[k] = false
		} else {
			d.entry(i, d.new, b[12+12*n:], db, d.gain)
		}
	}
	for n := range na {
		if keep, known := old[key(a, n)]; keep || !known {
			d.entry(i, d.old, a[12+12*n:], da, d.lose)
		}
	}
}

func (d *delta) entry(i *inode, v *view, e []byte, depth int, visit func(*inode, span)) {
	m := d.mapper(v, i, visit)
	if depth == 0 {
		d.fail(m.emit(leaf(e)))
	} else {
		d.fail(m.child(extentChild(e), depth-1))
	}
	d.budget = m.budget
}

// trees compares the tree blocks of a transaction. One that left its tree was walked when its parent let go of it.
func (d *delta) trees(trees []owned) {
	type node struct {
		owned
		depth    int
		old, new []byte
	}
	var nodes []node
	remapped := map[uint32]bool{}
	for _, t := range trees {
		i, err := d.f.inodeIn(d.new, t.inode())
		if err != nil || !i.inUse(d.f.sb.inodes) || !i.mapped() {
			continue
		}
		if i.flags&flagExtents == 0 {
			if !remapped[i.number] {
				remapped[i.number] = true
				d.remap(i)
			}
			continue
		}
		n := node{owned: t, old: make([]byte, d.f.sb.blockSize), new: make([]byte, d.f.sb.blockSize)}
		if err := cmp.Or(d.old.block(t.start, n.old), d.new.block(t.start, n.new)); err != nil {
			d.fail(err)
			continue
		}
		_, n.depth, _ = extentHeader(n.old)
		nodes = append(nodes, n)
	}
	slices.SortFunc(nodes, func(a, b node) int { return b.depth - a.depth })
	for _, n := range nodes {
		if d.lostTrees[n.start] {
			continue
		}
		if i, err := d.f.inodeIn(d.new, n.inode()); err == nil {
			d.nodes(i, n.old, n.new)
		}
	}
}

// remap walks the whole map of a file with indirect blocks, before and after.
func (d *delta) remap(i *inode) {
	if _, done := d.twins[i.number]; done && !bytes.Equal(d.twins[i.number].old.root(), i.root()) {
		return // inode() has done it
	}
	if old, err := d.f.inodeIn(d.old, i.number); err == nil && old.inUse(d.f.sb.inodes) {
		d.walk(d.old, old, d.lose)
	}
	d.walk(d.new, i, d.gain)
}

// settle changes the index: what was gained first, then what was lost and not gained again, so that a concurrent read
// of an unchanged block never finds it unowned.
func (d *delta) settle() {
	for _, r := range d.lost {
		d.dirBlocks(r, r.inode())
	}
	slices.SortFunc(d.gained, func(a, b owned) int { return cmp.Compare(a.start, b.start) })
	for _, g := range d.gained {
		d.dirBlocks(g, 0)
		d.x.set(g.start, g.n, g.owner, false)
	}
	for _, r := range d.lost {
		d.release(r)
	}
}

// dirBlocks notes directory blocks whose names must be compared, and whose they were.
func (d *delta) dirBlocks(r owned, was uint32) {
	if r.kind() != ownDir {
		return
	}
	for b := r.start; b < r.start+r.n; b++ {
		if len(d.dirs) >= maxDeltaDirs {
			d.fail(fmt.Errorf("more than %d directory blocks: %w", maxDeltaDirs, ErrTooLarge))
			return
		}
		if _, known := d.dirs[b]; !known || was != 0 {
			d.dirs[b] = was
		}
	}
}

func (d *delta) release(r owned) {
	at, end := r.start, r.start+r.n
	i, _ := slices.BinarySearchFunc(d.gained, at, func(g owned, b uint64) int {
		if g.start+g.n <= b {
			return -1
		}
		return 1
	})
	for ; at < end; i++ {
		if i >= len(d.gained) || d.gained[i].start >= end {
			d.x.clear(at, end-at, r.owner)
			return
		}
		if g := d.gained[i]; g.start > at {
			d.x.clear(at, g.start-at, r.owner)
		}
		at = max(at, d.gained[i].start+d.gained[i].n)
	}
}

// entries compares the directory blocks. Names that moved between blocks of one directory cancel out.
func (d *delta) entries() {
	for block, was := range d.dirs {
		o, _ := d.x.at(block)
		is := uint32(0)
		if o.kind() == ownDir {
			is = o.inode()
		}
		if was != 0 {
			d.fail(d.old.block(block, d.a))
		}
		if is != 0 {
			d.fail(d.new.block(block, d.b))
		}
		switch {
		case was == is && (was == 0 || bytes.Equal(d.a, d.b)):
			continue
		}
		if was != 0 {
			d.list(d.a, was, -1)
		}
		if is != 0 {
			d.list(d.b, is, +1)
		}
	}
	for n, c := range d.names {
		if c == 0 {
			delete(d.names, n)
		}
	}
}

func (d *delta) list(b []byte, dir uint32, sign int) {
	d.fail(eachEntry(b, d.f.filetype(), func(e entry) bool {
		if len(d.names) >= maxDeltaNames {
			d.fail(fmt.Errorf("more than %d names: %w", maxDeltaNames, ErrTooLarge))
			return false
		}
		d.names[named{dir, e.inode, e.kind, string(e.name)}] += sign
		return true
	}))
}

// sorted lists the entries that came (sign 1) or went (-1), in a fixed order.
func (d *delta) sorted(sign int) []named {
	var out []named
	for n, c := range d.names {
		if c*sign > 0 && n.inode <= d.f.sb.inodes {
			out = append(out, n)
		}
	}
	slices.SortFunc(out, func(a, b named) int {
		return cmp.Or(cmp.Compare(a.dir, b.dir), cmp.Compare(a.name, b.name), cmp.Compare(a.inode, b.inode))
	})
	return out
}

// finish updates names and watches, and tells what happened.
func (t *Tracker) finish(d *delta, tx *transaction, came, went []named) {
	for _, n := range went {
		t.parents.remove(n.inode, n.dir)
	}
	for _, n := range came {
		t.parents.add(n.inode, n.dir)
	}
	t.rename(d, came, went, tx.time)
	t.journalled(d)
	for _, g := range d.gained {
		t.bind(g)
	}
	switch {
	case d.resized:
		t.markStale("the file system was resized or changed")
	case d.broken != nil:
		t.markStale(fmt.Sprintf("transaction %d: %v", tx.seq, d.broken))
	}
}

// journalled reports file data that were written to the journal itself, run by run.
func (t *Tracker) journalled(d *delta) {
	slices.SortFunc(d.data, func(a, b owned) int { return cmp.Compare(a.start, b.start) })
	for i := 0; i < len(d.data); {
		first := d.data[i]
		o, _ := d.x.at(first.start)
		n := uint64(1)
		for i++; i < len(d.data) && d.data[i].start == first.start+n && d.data[i].owner == first.owner; i++ {
			if next, _ := d.x.at(d.data[i].start); next != o {
				break
			}
			n++
		}
		if o != unowned && o.kind() == ownData {
			t.wrote(o, int64(n)*t.fs.sb.blockSize, first.owner != o)
		}
	}
}

// bind reports the writes to blocks that have got their owner just now.
func (t *Tracker) bind(g owned) {
	if g.kind() != ownData || t.quiet {
		return
	}
	n := t.pending.take(g.start, g.start+g.n)
	if n > 0 {
		t.wrote(g.owner, int64(n)*t.fs.sb.blockSize, true)
	}
}

// retire closes the counts of a file that is deleted, under the name it had: another file may get its number.
func (t *Tracker) retire(d *delta, n named) {
	w, known := d.twins[n.inode]
	if !known || w.new.links > 0 && w.new.inUse(d.f.sb.inodes) && w.old.generation == w.new.generation {
		return
	}
	tl, counted := t.counts.close(owner(n.inode))
	if !counted {
		return
	}
	c := Count{Inode: n.inode, Kind: KindData}
	if len(t.gone) < maxGone {
		dir, known := d.paths[n.dir]
		if !known {
			var err error
			if dir, err = t.fs.dirPath(t.view(), t.parents, n.dir); err != nil {
				dir = "?"
			}
			d.paths[n.dir] = dir
		}
		if dir != "?" {
			c.Path = dir + "/" + n.name
		}
	}
	c.take(tl)
	if c.Path == "" {
		t.rest.take(tl)
		return
	}
	t.gone = append(t.gone, c)
}

const maxGone = 1024
