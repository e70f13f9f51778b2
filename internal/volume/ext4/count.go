package ext4

import (
	"cmp"
	"slices"
	"sync"
	"sync/atomic"
)

// Count is what happened to one unwatched or watched file since the last Counts. An empty path with kind data sums up the
// files that did not make the list, and those that nothing names.
type Count struct {
	Path                  string
	Inode                 uint32
	Kind                  Kind
	Reads, Writes         uint64 // requests
	ReadBytes, WriteBytes uint64
}

func (c *Count) bytes() uint64 { return c.ReadBytes + c.WriteBytes }

func (c *Count) take(t tally) {
	c.Reads += t.reads
	c.Writes += t.writes
	c.ReadBytes += t.readBytes
	c.WriteBytes += t.writeBytes
}

type tally struct{ reads, writes, readBytes, writeBytes uint64 }

const (
	countShards = 16
	perShard    = 256 // inodes; what is beyond is summed up
)

// counter adds up requests by inode, in shards so that connections seldom meet.
type counter struct {
	journal atomic.Uint32 // the journal's inode
	shards  [countShards]struct {
		sync.Mutex
		last  *tally // of inode at
		at    owner
		files map[owner]*tally
		other tally
		_     [64]byte
	}
}

func (c *counter) init() {
	for i := range c.shards {
		c.shards[i].files = map[owner]*tally{}
	}
}

func (c *counter) add(o owner, op Op, bytes int64) {
	if o.kind() == ownDir || o.kind() == ownTree {
		o = o.kind() // by kind, not one by one
	}
	s := &c.shards[uint32(o)%countShards]
	s.Lock()
	t := s.last
	if t == nil || s.at != o {
		if t = s.files[o]; t == nil {
			if len(s.files) < perShard {
				t = new(tally)
				s.files[o] = t
			} else {
				t = &s.other
			}
		}
		if t != &s.other {
			s.last, s.at = t, o
		}
	}
	if op == OpRead {
		t.reads++
		t.readBytes += uint64(bytes)
	} else {
		t.writes++
		t.writeBytes += uint64(bytes)
	}
	s.Unlock()
}

// close returns an inode's tally and forgets it.
func (c *counter) close(o owner) (tally, bool) {
	s := &c.shards[uint32(o)%countShards]
	s.Lock()
	defer s.Unlock()
	t := s.files[o]
	if t == nil {
		return tally{}, false
	}
	delete(s.files, o)
	s.last = nil
	return *t, true
}

// take returns all tallies and begins anew. The zero owner holds what belongs to nobody.
func (c *counter) take() (map[owner]tally, tally) {
	all, other := map[owner]tally{}, tally{}
	for i := range c.shards {
		s := &c.shards[i]
		s.Lock()
		for o, t := range s.files {
			all[o] = *t
		}
		o := s.other
		s.files, s.last, s.other = map[owner]*tally{}, nil, tally{}
		s.Unlock()
		other.reads += o.reads
		other.writes += o.writes
		other.readBytes += o.readBytes
		other.writeBytes += o.writeBytes
	}
	return all, other
}

// Counts returns and resets what was read and written: the files with the most bytes by name, the rest summed up, and
// one entry for each kind of metadata.
func (t *Tracker) Counts() []Count {
	all, other := t.counts.take()
	kinds := map[Kind]*Count{}
	var files []Count
	for o, tl := range all {
		kind := t.kindOf(o)
		if kind == KindData {
			c := Count{Inode: o.inode(), Kind: KindData}
			c.take(tl)
			files = append(files, c)
			continue
		}
		if kinds[kind] == nil {
			kinds[kind] = &Count{Kind: kind}
		}
		kinds[kind].take(tl)
	}
	files = t.nameCounts(files, other)
	for _, k := range []Kind{KindDir, KindInodes, KindJournal, KindMetadata, KindUnowned} {
		if kinds[k] != nil {
			files = append(files, *kinds[k])
		}
	}
	return files
}

func (t *Tracker) nameCounts(files []Count, other tally) []Count {
	t.mu.Lock()
	defer t.mu.Unlock()
	defer t.sparing()()
	files = append(files, t.gone...)
	rest := t.rest
	rest.Kind = KindData
	rest.take(other)
	t.gone, t.rest = nil, Count{}
	slices.SortFunc(files, func(a, b Count) int {
		return cmp.Or(cmp.Compare(b.bytes(), a.bytes()), cmp.Compare(a.Inode, b.Inode), cmp.Compare(a.Path, b.Path))
	})
	named := files[:0]
	for _, c := range files {
		full := len(named) >= t.o.TopN
		if c.Path == "" && !full {
			c.Path = t.pathOf(c.Inode)
		}
		if c.Path != "" && !full {
			named = append(named, c)
			continue
		}
		rest.take(tally{c.Reads, c.Writes, c.ReadBytes, c.WriteBytes})
	}
	if rest.Reads+rest.Writes > 0 {
		named = append(named, rest)
	}
	return named
}

func (t *Tracker) kindOf(o owner) Kind {
	switch {
	case o == unowned:
		return KindUnowned
	case o == t.journalOwner():
		return KindJournal
	case o == specialInodes:
		return KindInodes
	case o.kind() == ownDir:
		return KindDir
	case o.kind() == ownData:
		return KindData
	}
	return KindMetadata
}

// sparing bounds how much of directories is read to make names, while the guest's next commit waits.
func (t *Tracker) sparing() (done func()) {
	f, blocks := t.fs, 4096
	if f == nil {
		return func() {}
	}
	f.spare = &blocks
	return func() { f.spare = nil }
}

// pathOf is the path of an inode now.
func (t *Tracker) pathOf(number uint32) string {
	if t.fs != nil {
		if p := t.fs.paths(t.view(), t.parents, number); len(p) > 0 {
			return p[0]
		}
		if p := t.fast.path(t, number); p != "" {
			return p
		}
	}
	return ""
}

// Paths returns all paths of an inode as of the last commit.
func (t *Tracker) Paths(number uint32) []string {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.fs == nil {
		return nil
	}
	defer t.sparing()()
	return t.fs.paths(t.view(), t.parents, number)
}

// Owner tells which inode the byte of the volume at off belongs to, with its paths.
func (t *Tracker) Owner(off int64) (inode uint32, kind Kind, paths []string) {
	g := t.fsAt.Load()
	b, _, ok := g.blocks(off, 1)
	if !ok {
		return 0, KindUnowned, nil
	}
	o, _ := t.index.Load().at(b)
	kind = t.kindOf(o)
	if o == unowned || o.kind() == ownSpecial || kind == KindJournal {
		return 0, kind, nil
	}
	return o.inode(), kind, t.Paths(o.inode())
}
