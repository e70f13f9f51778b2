package ext4

import (
	"fmt"
	"io"
	"slices"
	"sync"
	"sync/atomic"
	"time"
)

// Op is what a request does.
type Op string

// The two operations.
const (
	OpRead  Op = "read"
	OpWrite Op = "write"
)

// Kind says what of a file system a request touched.
type Kind string

// The kinds of blocks. Reading a file's inode or its directory is not reading the file.
const (
	KindData     Kind = "data"
	KindDir      Kind = "dir"
	KindInodes   Kind = "inode-table"
	KindJournal  Kind = "journal"
	KindMetadata Kind = "metadata" // superblock, group descriptors, bitmaps, block maps
	KindUnowned  Kind = "unowned"  // free blocks, extended attributes, and what the index does not know
)

// Access is a request's touch of one watched file.
type Access struct {
	Op    Op
	Kind  Kind
	Inode uint32
	Path  string   // the watched path
	Paths []string // all watched paths of the file, where it has several
	Bytes int64
	// Pending: the blocks were written before their owner was known. It was bound at the journal's commit.
	Pending bool
	// Inline: the file's data lie in its inode, whose block the guest read or wrote. It may have wanted a neighbour.
	Inline bool
	// Stale: the index is being rebuilt, the name may be out of date.
	Stale bool
}

// Change is a change of a watched path, seen when the journal committed it.
type Change struct {
	Path   string
	Inode  uint32
	What   string // created, removed, renamed, modified, mode or owner
	Detail string
	Time   time.Time // of the commit, by the guest's clock; zero where not known
}

// Options of a tracker. The zero value watches nothing and has the default limits.
type Options struct {
	// Watch lists exact paths ("/etc/shadow"), "dir/*" for the files in a directory and "dir/**" for all below it.
	// A path need not exist yet.
	Watch []string
	// Access gets one call for each access to a watched file, on the goroutine of the request. It must be quick, and must
	// not call the tracker.
	Access func(Access)
	// Changed gets one call for each change of a watched path, in the order of the commits. Same terms.
	Changed func(Change)
	// MaxBytes bounds the memory of the index (default 16 MiB). Beyond it, blocks of unwatched files stay unnamed, and
	// Stats says so.
	MaxBytes int64
	// TopN bounds what Counts returns (default 64).
	TopN int
	// RebuildDelay is how long a stale index waits for quiet before it is rebuilt (default 100 ms).
	RebuildDelay time.Duration
}

// Tracker names the files that disk requests touch, and follows the file system's changes.
//
// Read, Written, Zeroed and Trimmed are called with every request that touches the volume, by any number of goroutines,
// offsets counted from the start of the volume. Written, Zeroed and Trimmed are called after the change was made in
// r and before the request is answered; that keeps the order the guest's kernel relies on. Reads take no lock but that
// of one of 16 counter shards; so do writes to blocks with a known owner. A write to an unowned block takes one small lock more;
// writes to metadata and journal take the tracker's lock. A commit is followed within Written, and a rebuild holds up writes to
// metadata and the journal, never reads and data.
type Tracker struct {
	o    Options
	r    io.ReaderAt
	at   Filesystem
	bs   int64
	fsAt atomic.Pointer[geometry]

	index   atomic.Pointer[index]
	watched atomic.Pointer[watchSet]
	stale   atomic.Bool
	torn    atomic.Bool // no journal, and some map or directory was not whole: its blocks may come yet
	counts  counter
	pending pending

	mu      sync.Mutex
	fs      *FS
	overlay map[uint64]logged // committed, but not yet written to its place
	holds   map[uint32]uint64 // the inverse: which block a journal block holds
	data    atomic.Int64      // entries of overlay that are file data (data=journal)
	parents *parents
	watch   *watcher
	fast    fastLog
	differs bool // something was written to its place that the journal has otherwise
	stats   Stats
	gone    []Count // of deleted files, since the last Counts
	rest    Count   // of more of them
	timer   *time.Timer
	quiet   bool // while the index is being built nothing is reported
	tries   int  // rebuilds that failed in a row
	closed  bool
}

// geometry is what the hot path needs to know.
type geometry struct {
	off, end int64
	shift    uint
}

// NewTracker opens the file system and builds the index. It returns the errors of [Open].
//
// r must give the volume as the guest sees it, and must not report the tracker's own reads back to it.
func NewTracker(r io.ReaderAt, at Filesystem, o Options) (*Tracker, error) {
	if o.MaxBytes <= 0 {
		o.MaxBytes = 16 << 20
	}
	if o.TopN <= 0 {
		o.TopN = 64
	}
	if o.RebuildDelay <= 0 {
		o.RebuildDelay = 100 * time.Millisecond
	}
	t := &Tracker{o: o, r: r, at: at}
	t.counts.init()
	w, err := newWatcher(o.Watch)
	if err != nil {
		return nil, err
	}
	t.watch = w
	t.mu.Lock()
	defer t.mu.Unlock()
	if err := t.rebuild(""); err != nil {
		return nil, err
	}
	return t, nil
}

// Close ends background work. The tracker must not be used any more.
func (t *Tracker) Close() {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.closed = true
	if t.timer != nil {
		t.timer.Stop()
	}
}

// Stats is the state of a tracker.
type Stats struct {
	State      string // current, stale (a rebuild is due) or lost (no file system to follow)
	Reason     string // why it was last rebuilt, is stale or lost
	Kind       string // ext2, ext3 or ext4
	Journal    string // journal, fast_commit, none or external
	Degraded   string // what is left out and why; empty where all is named
	Inodes     int    // at the last build
	Skipped    int    // inodes with a broken map or directory
	Runs       int
	Bytes      int64 // memory of index and parents
	Watched    int   // files under a watched path
	Commits    uint64
	Fast       uint64 // fast commits
	Rebuilds   uint64
	LastBuild  time.Duration
	Overlay    int           // blocks that the journal holds and their places do not yet
	Unbound    uint64        // written blocks that no commit gave an owner in time
	CommitTime time.Duration // spent in following all commits
}

// Stats returns the present state.
func (t *Tracker) Stats() Stats {
	t.mu.Lock()
	defer t.mu.Unlock()
	s := t.stats
	if x := t.index.Load(); x != nil {
		s.Runs, s.Bytes = x.runs, x.bytes()+t.parents.bytes()
		s.Degraded = t.degraded(x)
	}
	if w := t.watched.Load(); w != nil {
		s.Watched = len(w.files)
	}
	s.Overlay, s.Unbound = len(t.overlay), t.pending.lost()
	if s.State != "lost" {
		s.State = "current"
		if t.stale.Load() {
			s.State = "stale"
		}
	}
	return s
}

func (t *Tracker) degraded(x *index) string {
	switch {
	case x.full || t.parents.full:
		return fmt.Sprintf("the index is full at %d bytes: some files are not named", t.o.MaxBytes)
	case t.watch.full:
		return fmt.Sprintf("more than %d watched files: the rest is not watched", maxWatched)
	case t.fs != nil && len(t.fs.notes) > 0:
		return t.fs.notes[0]
	}
	return ""
}

// blocks cuts a request to the file system's blocks.
func (g *geometry) blocks(off, n int64) (first, end uint64, ok bool) {
	if n <= 0 || off >= g.end || off+n <= g.off {
		return 0, 0, false
	}
	from, to := max(off, g.off)-g.off, min(off+n, g.end)-g.off
	return uint64(from) >> g.shift, (uint64(to) + 1<<g.shift - 1) >> g.shift, true
}

// bytes is how much of blocks b..end the request off+n covers.
func (g *geometry) bytes(b, end uint64, off, n int64) int64 {
	from, to := g.off+int64(b)<<g.shift, g.off+int64(end)<<g.shift
	return min(to, off+n) - max(from, off)
}

// Read is told of a read of n bytes at off.
func (t *Tracker) Read(off, n int64) {
	g := t.fsAt.Load()
	b, end, ok := g.blocks(off, n)
	if !ok {
		return
	}
	x, w := t.index.Load(), t.watched.Load()
	for b < end {
		o, next := x.at(b)
		next = min(next, end)
		bytes := g.bytes(b, next, off, n)
		t.counts.add(o, OpRead, bytes)
		if len(w.files) != 0 {
			t.readWatched(w, o, b, next, bytes)
		}
		b = next
	}
}

func (t *Tracker) readWatched(w *watchSet, o owner, b, next uint64, bytes int64) {
	switch {
	case o.kind() == ownData && o != unowned:
		if f, ok := w.files[o.inode()]; ok {
			t.access(f, Access{Op: OpRead, Kind: KindData, Bytes: bytes})
		}
	case o == specialInodes && len(w.inline) > 0:
		for ; b < next; b++ {
			for _, number := range w.inline[b] {
				f := w.files[number]
				t.access(f, Access{Op: OpRead, Kind: KindInodes, Bytes: f.size, Inline: true})
			}
		}
	}
}

func (t *Tracker) access(f *watchedFile, a Access) {
	if t.o.Access == nil {
		return
	}
	a.Inode, a.Path, a.Stale = f.number, f.paths[0], t.stale.Load()
	if len(f.paths) > 1 {
		a.Paths = slices.Clone(f.paths)
	}
	t.o.Access(a)
}

// Written is told that data was written at off.
func (t *Tracker) Written(off int64, data []byte) { t.written(off, int64(len(data)), data) }

// Zeroed is told that n bytes at off were written as zeros.
func (t *Tracker) Zeroed(off, n int64) { t.written(off, n, nil) }

// Trimmed is told that n bytes at off were discarded. Discarding a file's blocks does not count as writing to it.
func (t *Tracker) Trimmed(off, n int64) {
	g := t.fsAt.Load()
	b, end, ok := g.blocks(off, n)
	if !ok {
		return
	}
	x := t.index.Load()
	for b < end {
		o, next := x.at(b)
		next = min(next, end)
		if o.kind() != ownData && o != specialBitmap {
			t.metadata(o, b, next, off, n, nil)
		}
		b = next
	}
}

func (t *Tracker) written(off, n int64, data []byte) {
	g := t.fsAt.Load()
	b, end, ok := g.blocks(off, n)
	if !ok {
		return
	}
	x := t.index.Load()
	journal := t.journalOwner()
	for b < end {
		o, next := x.at(b)
		next = min(next, end)
		bytes := g.bytes(b, next, off, n)
		switch {
		case o == journal:
			t.counts.add(o, OpWrite, bytes)
			t.journalWritten(b, next, off, data)
		case o.kind() != ownData:
			t.counts.add(o, OpWrite, bytes)
			t.metadata(o, b, next, off, n, data)
		case o == unowned:
			t.pending.add(b, next)
			if t.torn.Load() {
				t.mend()
			}
		case t.data.Load() > 0:
			t.writtenBack(o, b, next, off, n)
		default:
			t.wrote(o, bytes, false)
		}
		b = next
	}
}

func (t *Tracker) wrote(o owner, bytes int64, pending bool) {
	t.counts.add(o, OpWrite, bytes)
	if f, ok := t.watched.Load().files[o.inode()]; ok {
		t.access(f, Access{Op: OpWrite, Kind: KindData, Bytes: bytes, Pending: pending})
	}
}

// journalInode is fixed but for file systems that are made anew.
func (t *Tracker) journalOwner() owner { return owner(t.counts.journal.Load()) }
