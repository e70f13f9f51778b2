package ext4

import (
	"bytes"
	"errors"
	"time"
)

func (t *Tracker) view() *view { return t.fs.v }

// journalWritten looks at blocks of the journal that the guest has just written.
func (t *Tracker) journalWritten(b, end uint64, off int64, data []byte) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.fs == nil || t.fs.log == nil {
		return
	}
	fast := false
	for ; b < end; b++ {
		i, ok := t.fs.log.index(b)
		if !ok {
			continue
		}
		if held, ok := t.holds[i]; ok { // the log has come round
			t.dropLogged(held)
		}
		switch {
		case i == 0:
			t.journalSuper()
		case i >= t.fs.log.last:
			fast = true
		default:
			t.logWritten(t.blockOf(b, off, data))
		}
	}
	if fast {
		t.followFast()
	}
}

// blockOf is the part of a request's data that belongs to block b, or nil where it does not hold it all.
func (t *Tracker) blockOf(b uint64, off int64, data []byte) []byte {
	bs := t.fs.sb.blockSize
	at := t.at.Offset + int64(b)*bs - off
	if at < 0 || at+bs > int64(len(data)) {
		return nil
	}
	return data[at : at+bs]
}

// journalSuper takes note of a new tail, or of new features.
func (t *Tracker) journalSuper() {
	j := t.fs.log
	live, seq := j.live, j.seq
	if err := j.load(); err != nil {
		t.markStale("journal superblock: " + err.Error())
		return
	}
	for i, b := range t.holds {
		if !j.holds(i) {
			t.dropLogged(b)
		}
	}
	// A kernel that replays the log at its mount goes on with the number after next.
	if live && j.live && int32(j.seq-seq) > 1 {
		t.markStale("the journal jumped")
	}
	// A kernel that mounts after a crash writes what fast commits say straight to its place. While the log still holds
	// older copies of those blocks they hide it, in a rebuild too.
	if t.differs || t.fast.next > 0 && (!j.live || j.seq != seq) {
		t.differs = false
		t.markStale("blocks were changed under the journal")
	}
	t.fast.reset()
}

// logWritten looks for the commit block that completes the transaction that comes next.
func (t *Tracker) logWritten(b []byte) {
	j := t.fs.log
	async := j.incompat&journalAsync != 0
	if b == nil || be.Uint32(b) != journalMagic || be.Uint32(b[4:]) != blockCommit {
		if async && t.stats.Journal != "" {
			t.follow()
		}
		return
	}
	if !j.live {
		return
	}
	seq := be.Uint32(b[8:])
	followed := t.follow()
	if !followed && !async && int32(seq-j.seq) >= 0 {
		t.markStale("a transaction does not hold together")
	}
}

// follow applies the complete transactions that come next.
func (t *Tracker) follow() bool {
	j, any := t.fs.log, false
	for {
		tx, err := j.next()
		if err != nil {
			t.markStale("journal: " + err.Error())
		}
		if tx == nil {
			return any
		}
		began := time.Now()
		t.apply(tx)
		j.advance(tx)
		t.stats.Commits++
		t.stats.CommitTime += time.Since(began)
		any = true
	}
}

func (t *Tracker) putLogged(b uint64, l logged) {
	t.dropLogged(b)
	t.overlay[b] = l
	t.holds[l.index] = b
	if l.data {
		t.data.Add(1)
	}
}

func (t *Tracker) dropLogged(b uint64) {
	l, ok := t.overlay[b]
	if !ok {
		return
	}
	delete(t.overlay, b)
	if t.holds[l.index] == b {
		delete(t.holds, l.index)
	}
	if l.data {
		t.data.Add(-1)
	}
}

// writtenBack sees a write to a file while the journal holds data blocks: those were counted when they were committed.
func (t *Tracker) writtenBack(o owner, b, end uint64, off, n int64) {
	t.mu.Lock()
	bytes, g := int64(0), t.fsAt.Load()
	for ; b < end; b++ {
		if _, ok := t.overlay[b]; ok {
			t.dropLogged(b)
			continue
		}
		bytes += g.bytes(b, b+1, off, n)
	}
	t.mu.Unlock()
	if bytes > 0 {
		t.wrote(o, bytes, false)
	}
}

// metadata sees blocks of metadata written to their places (data is nil for zeros and discards). What the journal
// has committed may be written there; anything else happened behind the journal's back, or there is none.
func (t *Tracker) metadata(o owner, b, end uint64, off, n int64, data []byte) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.fs == nil {
		if o == specialSuper {
			t.markStale("a new superblock")
		}
		return
	}
	for ; b < end; b++ {
		l, held := t.overlay[b]
		same := !held
		if held {
			same = t.sameAsLogged(l, t.blockOf(b, off, data))
			t.dropLogged(b)
		}
		switch {
		case o == specialSuper:
			t.superWritten()
		case o == specialBitmap || o == specialGroups && t.fs.log != nil:
		case held && !same:
			t.differs = true
			t.markStale("metadata differ from what the journal committed")
		case !held && !t.harmless(o, b, off, data):
			t.markStale("metadata were written outside the journal")
		}
	}
}

func (t *Tracker) sameAsLogged(l logged, b []byte) bool {
	buf := make([]byte, t.fs.sb.blockSize)
	return b != nil && t.fs.log.copyOf(l, buf) == nil && bytes.Equal(buf, b)
}

// harmless knows the kernel's late zeroing of inode tables that were never used.
func (t *Tracker) harmless(o owner, b uint64, off int64, data []byte) bool {
	if o != specialInodes {
		return false
	}
	if data != nil {
		for _, c := range t.blockOf(b, off, data) {
			if c != 0 {
				return false
			}
		}
	}
	first, ok := t.fs.firstInode(b)
	for i := uint32(0); ok && i < uint32(t.fs.sb.blockSize/t.fs.sb.inodeSize); i++ {
		if first+i < 12 || t.parents.one(first+i) != 0 {
			return false
		}
	}
	return true
}

// superWritten compares the superblock with the one that the index was built for.
func (t *Tracker) superWritten() {
	buf := make([]byte, superSize)
	_, err := t.r.ReadAt(buf, t.at.Offset+superOffset)
	if err == nil {
		var sb *superblock
		if sb, err = parseSuper(buf, t.at.Size); err == nil && !sb.same(t.fs.sb) {
			err = errors.New("the file system was resized, changed or made anew")
		}
	}
	if err != nil {
		t.markStale(err.Error())
	}
}

// markStale starts a rebuild after a little quiet, and seldom enough to leave the processor alone.
func (t *Tracker) markStale(why string) {
	if !t.stale.Swap(true) || t.tries > 0 {
		t.stats.Reason = why
	}
	if t.timer != nil || t.closed {
		return
	}
	t.timer = time.AfterFunc(max(t.o.RebuildDelay, 20*t.stats.LastBuild)<<t.tries, func() {
		t.mu.Lock()
		defer t.mu.Unlock()
		t.timer = nil
		if !t.closed && t.stale.Load() {
			_ = t.rebuild(t.stats.Reason) // its error is in Stats
		}
	})
}

// mend has the index rebuilt after a write that may have completed what was broken.
func (t *Tracker) mend() {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.markStale("blocks were written outside the journal")
}

// Sync rebuilds a stale index now instead of soon.
func (t *Tracker) Sync() error {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.closed || !t.stale.Load() {
		return nil
	}
	return t.rebuild(t.stats.Reason)
}

// rebuild reads the whole file system and replaces the index.
func (t *Tracker) rebuild(why string) error {
	began := time.Now()
	first := t.fsAt.Load() == nil
	err := t.load()
	t.stats.LastBuild = time.Since(began)
	var unsupported ErrUnsupported
	switch {
	case first:
		return err
	case err == nil:
		t.stats.Rebuilds++
		t.stats.Reason, t.stats.State, t.tries = why, "", 0
		t.stale.Store(false)
	case errors.Is(err, ErrNotExt4) || errors.As(err, &unsupported):
		t.lose(err)
		t.stale.Store(false)
	default: // it may be in the middle of a change
		t.tries = min(t.tries+1, 10)
		t.markStale(err.Error())
	}
	return err
}

// load builds everything anew from the disk.
func (t *Tracker) load() error {
	f, err := Open(t.r, t.at.Offset, t.at.Size)
	if err != nil {
		return err
	}
	if f.tooMuch != nil {
		return f.tooMuch
	}
	// A third of the bound for the parents, the rest for the runs.
	l := limits{runs: int(t.o.MaxBytes / 3 * 2 / 8), parents: int(t.o.MaxBytes / 3 / 4 / parentChunk)}
	b, err := f.build(f.v, l)
	if err != nil {
		return err
	}
	was := t.fs
	t.fast = fastLog{} // nothing to undo in what is new
	t.fs, t.parents = f, b.parents
	t.overlay, t.holds = map[uint64]logged{}, map[uint32]uint64{}
	t.data.Store(0)
	t.torn.Store(f.log == nil && b.skipped > 0)
	if f.v.layers != nil {
		for block, l := range f.v.layers[0] {
			o, _ := b.index.at(block)
			l.data = o.kind() == ownData && o != unowned
			t.putLogged(block, l)
		}
	}
	f.v.layers = []map[uint64]logged{t.overlay}
	t.counts.journal.Store(f.sb.journalInode)
	t.stats.Kind, t.stats.Journal = f.Kind(), f.journalKind()
	t.stats.Inodes, t.stats.Skipped = b.inodes, b.skipped
	shift := uint(10)
	for int64(1)<<shift < f.sb.blockSize {
		shift++
	}
	t.index.Store(b.index)
	t.fsAt.Store(&geometry{off: t.at.Offset, end: t.at.Offset + int64(f.sb.blocks)<<shift, shift: shift})
	t.rewatch(was != nil)
	return nil
}

// lose leaves nothing but an eye on the place of the superblock.
func (t *Tracker) lose(err error) {
	t.fs, t.overlay, t.holds = nil, nil, nil
	x := newIndex(1, 16)
	x.set(0, 1, specialSuper, true)
	x.building = false
	t.index.Store(x)
	t.fsAt.Store(&geometry{off: t.at.Offset, end: t.at.Offset + 4096, shift: 12})
	t.watched.Store(&watchSet{})
	t.data.Store(0)
	t.counts.journal.Store(uint32(ownSpecial)) // no inode
	t.stats.State, t.stats.Reason = "lost", err.Error()
}

func (f *FS) journalKind() string {
	switch {
	case f.external:
		return "external"
	case f.log == nil:
		return "none"
	case f.log.incompat&journalFastCommit != 0:
		return "fast_commit"
	}
	return "journal"
}
