package ext4

import (
	"bytes"
	"testing"
)

// scribe writes transactions as a kernel would.
type scribe struct {
	d        *disk
	j        *journal
	features uint32
	seq, pos uint32
	told     *Tracker // where it is not nil, every write is told to it
}

func newScribe(t *testing.T, d *disk, size int64, features uint32) *scribe {
	t.Helper()
	f, err := Open(d, 0, size)
	if err != nil || f.log == nil {
		t.Fatal(err)
	}
	s := &scribe{d: d, j: f.log, features: features, seq: 7, pos: f.log.first}
	b := s.block(0)
	be.PutUint32(b[0x28:], features)
	be.PutUint32(b[24:], s.seq)
	be.PutUint32(b[28:], s.pos)
	s.j.incompat = features
	s.write(0, b)
	return s
}

func (s *scribe) block(i uint32) []byte {
	b := make([]byte, s.j.v.bs)
	if err := s.j.read(i, b); err != nil {
		panic(err)
	}
	return b
}

func (s *scribe) write(i uint32, b []byte) {
	place, err := s.j.place(i)
	if err != nil {
		panic(err)
	}
	s.at(place, b)
}

func (s *scribe) at(block uint64, b []byte) {
	r := record{op: 'W', off: int64(block) * s.j.v.bs, data: b}
	if s.told != nil {
		s.d.play(s.told, r)
	} else {
		s.d.apply(r)
	}
}

func (s *scribe) next(b []byte) {
	s.write(s.pos, b)
	s.pos = s.j.wrap(s.pos + 1)
}

func (s *scribe) header(kind uint32) []byte {
	b := make([]byte, s.j.v.bs)
	be.PutUint32(b, journalMagic)
	be.PutUint32(b[4:], kind)
	be.PutUint32(b[8:], s.seq)
	return b
}

func (s *scribe) seal(b []byte) []byte {
	if s.j.summed() {
		be.PutUint32(b[len(b)-4:], 0)
		be.PutUint32(b[len(b)-4:], crc32c(s.j.seed, b))
	}
	return b
}

type copyOf struct {
	block uint64
	data  []byte
}

func (s *scribe) transaction(blocks []copyOf, revoked ...uint64) {
	d, at, size := s.header(blockDescriptor), 12, s.j.tagSize()
	var logged [][]byte
	for i, c := range blocks {
		data, flags := bytes.Clone(c.data), uint32(tagSameUUID)
		if i == 0 {
			flags = 0
		}
		if be.Uint32(data) == journalMagic {
			clear(data[:4])
			flags |= tagEscape
		}
		if i == len(blocks)-1 {
			flags |= tagLast
		}
		be.PutUint32(d[at:], uint32(c.block))
		if s.features&journalCsumV3 != 0 {
			be.PutUint32(d[at+4:], flags)
			be.PutUint32(d[at+12:], crc32c(crc32c(s.j.seed, be.AppendUint32(nil, s.seq)), data))
		} else {
			be.PutUint16(d[at+6:], uint16(flags))
		}
		if at += size; flags&tagSameUUID == 0 {
			at += 16
		}
		logged = append(logged, data)
	}
	if len(blocks) > 0 {
		s.next(s.seal(d))
	}
	for _, b := range logged {
		s.next(b)
	}
	if len(revoked) > 0 {
		r, at := s.header(blockRevoke), 16
		for _, b := range revoked {
			if s.features&journal64Bit != 0 {
				be.PutUint64(r[at:], b)
				at += 8
			} else {
				be.PutUint32(r[at:], uint32(b))
				at += 4
			}
		}
		be.PutUint32(r[12:], uint32(at))
		s.next(s.seal(r))
	}
	c := s.header(blockCommit)
	if s.j.summed() {
		be.PutUint32(c[16:], crc32c(s.j.seed, c))
	}
	s.next(c)
	s.seq++
}

// first is the first block of a file, with its contents.
func first(t *testing.T, d *disk, size int64, name string) (uint64, []byte) {
	t.Helper()
	f, err := Open(d, 0, size)
	if err != nil {
		t.Fatal(err)
	}
	file, err := f.Open(name)
	if err != nil {
		t.Fatal(err)
	}
	b := make([]byte, f.v.bs)
	if err := f.v.block(file.spans[0].start, b); err != nil {
		t.Fatal(err)
	}
	return file.spans[0].start, b
}

func TestJournalBlocks(t *testing.T) {
	for name, features := range map[string]uint32{"old": 1, "64bit": 1 | journal64Bit, "checksums": 1 | journal64Bit | journalCsumV3, "v3, 32bit": 1 | journalCsumV3} {
		t.Run(name, func(t *testing.T) {
			tr := loadTrace(t, "plain")
			read := func(d *disk) string {
				f, err := Open(d, 0, tr.size)
				if err != nil {
					t.Fatal(err)
				}
				b, err := f.ReadFile("/etc/shadow", 1000)
				if err != nil {
					t.Fatal(err)
				}
				return string(b[:4])
			}
			d := tr.disk()
			block, old := first(t, d, tr.size, "/etc/shadow")
			s := newScribe(t, d, tr.size, features)
			// The magic of the journal at the start of a block is escaped.
			magic := be.AppendUint32(nil, journalMagic)
			escaped := append(magic, old[4:]...)
			s.transaction([]copyOf{{block, escaped}})
			if got := read(d); got != string(magic) {
				t.Errorf("an escaped block reads %x", got)
			}
			// The last of several copies counts, in one transaction and in several.
			s.transaction([]copyOf{{block, old}, {block, append([]byte("new1"), old[4:]...)}})
			if got := read(d); got != "new1" {
				t.Errorf("the newer copy reads %q", got)
			}
			// A revoked copy must not come back.
			s.transaction(nil, block)
			if got := read(d); got != "root" {
				t.Errorf("a revoked block reads %q", got)
			}
			// But a later one counts again.
			s.transaction([]copyOf{{block, append([]byte("new2"), old[4:]...)}})
			if got := read(d); got != "new2" {
				t.Errorf("a block logged after its revocation reads %q", got)
			}
			// A transaction without its commit block does not count, nor one with a broken block.
			pos := s.pos
			s.transaction([]copyOf{{block, append([]byte("torn"), old[4:]...)}})
			if s.j.summed() {
				b := s.block(pos + 1)
				b[100] ^= 1
				s.write(pos+1, b)
			} else {
				s.write(pos+2, make([]byte, s.j.v.bs))
			}
			if got := read(d); got != "new2" {
				t.Errorf("a torn transaction reads %q", got)
			}
		})
	}
}

// The tracker must forget a journal's copy when it is revoked, written to its place, or overwritten in the log.
func TestForgetsCopies(t *testing.T) {
	tr := loadTrace(t, "plain")
	d := tr.disk()
	s := newScribe(t, d, tr.size, 1|journal64Bit|journalCsumV3)
	w := newTracker(t, d, tr.size, Options{})
	s.told = w
	etc, err := w.fs.resolve("/etc", true)
	if err != nil {
		t.Fatal(err)
	}
	var dir uint64
	m := mapper{v: w.fs.v, budget: 9, visit: func(sp span) error { dir = sp.start; return nil }}
	if err := m.inode(etc); err != nil {
		t.Fatal(err)
	}
	b := make([]byte, w.fs.v.bs)
	if err := w.fs.v.raw(dir, b); err != nil {
		t.Fatal(err)
	}
	held := func() bool { _, ok := w.overlay[dir]; return ok }
	s.transaction([]copyOf{{dir, b}})
	if !held() {
		t.Fatal("a committed block is not remembered")
	}
	s.transaction(nil, dir)
	if held() {
		t.Error("a revoked block is remembered")
	}
	s.transaction([]copyOf{{dir, b}})
	s.at(dir, b)
	if held() || w.Stats().State != "current" {
		t.Errorf("a block in its place is remembered, or taken for a contradiction: %+v", w.Stats())
	}
	at := s.pos
	s.transaction([]copyOf{{dir, b}})
	s.write(at+1, make([]byte, len(b)))
	if held() {
		t.Error("a block overwritten in the log is remembered")
	}
	s.transaction([]copyOf{{dir, b}})
	c := bytes.Replace(b, []byte("shadow"), []byte("wodahs"), 1)
	s.at(dir, c)
	if w.Stats().State != "stale" {
		t.Error("a block that differs from what was committed is no contradiction")
	}
}
