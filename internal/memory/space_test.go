package memory

import (
	"bytes"
	"encoding/binary"
	"errors"
	"slices"
	"testing"
)

// flat is physical memory that starts at 0. It counts reads.
type flat struct {
	b     []byte
	reads int
}

func (f *flat) ReadPhys(pa uint64, b []byte) error {
	f.reads++
	if pa > uint64(len(f.b)) || uint64(len(b)) > uint64(len(f.b))-pa {
		return ErrNoRAM
	}
	copy(b, f.b[pa:])
	return nil
}

func (f *flat) entry(table uint64, index int, e uint64) {
	binary.LittleEndian.PutUint64(f.b[table+uint64(index)*8:], e)
}

// index returns the place of va in the table of a level, 1 the last.
func index(va uint64, level int) int { return int(va >> (12 + 9*(level-1)) & 511) }

// mapped makes tables with one page of each size: 4 KiB at small, 2 MiB at medium, 1 GiB at big.
const (
	small  = 0x00007f1234567000
	medium = 0xffff888040000000
	big    = 0xffffc90000000000
)

func mapped(levels int) *flat {
	f := &flat{b: make([]byte, 4<<20)}
	next := uint64(0x2000)
	table := func(parent uint64, i int, bits uint64) uint64 {
		if e := binary.LittleEndian.Uint64(f.b[parent+uint64(i)*8:]); e != 0 {
			return e & pteAddr
		}
		next += 0x1000
		f.entry(parent, i, next|bits)
		return next
	}
	root := uint64(0x1000)
	for _, m := range []struct {
		va    uint64
		level int
		e     uint64
	}{
		{small, 1, 0x300000 | ptePresent | pteUser | pteNX},
		{medium, 2, 0x200000 | ptePresent | pteWrite | pteLarge | 1<<12}, // bit 12 is PAT here, not address
		{big, 3, 0 | ptePresent | pteWrite | pteLarge},
	} {
		at := root
		for level := levels; level > m.level; level-- {
			at = table(at, index(m.va, level), ptePresent|pteWrite|pteUser)
		}
		f.entry(at, index(m.va, m.level), m.e)
	}
	copy(f.b[0x300ff8:], "the 4 KiB page")
	copy(f.b[0x200123:], "the 2 MiB page\x00")
	copy(f.b[0x345678:], "the 1 GiB page\x00")
	return f
}

func TestWalk(t *testing.T) {
	for _, levels := range []int{4, 5} {
		s := NewSpace(mapped(levels), 0x1fff, levels) // the low bits of CR3 do not matter
		for _, c := range []struct {
			va   uint64
			want Page
		}{
			{small + 0x18, Page{Phys: 0x300000, Size: 4 << 10, User: true, NoExec: true}},
			{medium + 0x123, Page{Phys: 0x200000, Size: 2 << 20, Writable: true}},
			{big + 0x345678, Page{Phys: 0, Size: 1 << 30, Writable: true}},
		} {
			if got, err := s.Walk(c.va); err != nil || got != c.want {
				t.Errorf("%d levels: Walk(%#x) = %+v, %v; want %+v", levels, c.va, got, err, c.want)
			}
		}
		for va, want := range map[uint64]error{small + 0x1000: ErrAbsent, 0: ErrAbsent, 1 << 60: ErrBadAddress, 0xfff0 << 44: ErrBadAddress} {
			if _, err := s.Walk(va); !errors.Is(err, want) {
				t.Errorf("%d levels: Walk(%#x): %v, want %v", levels, va, err, want)
			}
		}
	}
	four, five := NewSpace(mapped(4), 0x1000, 4), NewSpace(mapped(5), 0x1000, 5)
	const between = uint64(1) << 50 // canonical with five levels only
	if _, err := four.Walk(between); !errors.Is(err, ErrBadAddress) {
		t.Errorf("4 levels: %v", err)
	}
	if _, err := five.Walk(between); !errors.Is(err, ErrAbsent) {
		t.Errorf("5 levels: %v", err)
	}
}

func TestRead(t *testing.T) {
	f := mapped(4)
	s := NewSpace(f, 0x1000, 4)
	for range 2 { // from the tables, then from what is remembered
		for va, want := range map[uint64]string{medium + 0x123: "the 2 MiB page", big + 0x345678: "the 1 GiB page"} {
			if got, err := s.CString(va, 100); err != nil || string(got) != want {
				t.Errorf("CString(%#x) = %q, %v", va, got, err)
			}
		}
	}
	if got, err := s.CString(big+0x345678, 5); string(got) != "the 1" || !errors.Is(err, ErrTooLong) {
		t.Errorf("CString of 5 bytes = %q, %v", got, err)
	}
	if got, err := s.CString(small+0xff8, 100); string(got) != "the 4 Ki" || !errors.Is(err, ErrAbsent) {
		t.Errorf("CString up to an absent page = %q, %v", got, err)
	}
	b := make([]byte, 20)
	if n, err := s.ReadSome(small+0xff8, b); n != 8 || !errors.Is(err, ErrAbsent) || string(b[:8]) != "the 4 Ki" {
		t.Errorf("ReadSome over the end = %d %q, %v", n, b, err)
	}
	if err := s.Read(small+0xff8, b); !errors.Is(err, ErrAbsent) {
		t.Errorf("Read over the end: %v", err)
	}
	if err := s.Read(^uint64(0)-3, b); err == nil {
		t.Error("Read over the end of the address space is fine")
	}
	if _, err := s.U64(small + 0xffc); !errors.Is(err, ErrAbsent) {
		t.Errorf("U64 over the end: %v", err)
	}
	v, err := s.U64(medium + 0x123)
	if want := binary.LittleEndian.Uint64([]byte("the 2 Mi")); err != nil || v != want {
		t.Errorf("U64 = %#x, %v; want %#x", v, err, want)
	}
	v32, err32 := s.U32(medium + 0x123)
	v16, err16 := s.U16(medium + 0x123)
	v8, err8 := s.U8(medium + 0x123)
	if uint64(v32) != v&0xffffffff || uint64(v16) != v&0xffff || uint64(v8) != v&0xff || errors.Join(err32, err16, err8) != nil {
		t.Errorf("U32 %#x, U16 %#x, U8 %#x of %#x", v32, v16, v8, v)
	}
}

func TestFlushSeesNewTables(t *testing.T) {
	f := mapped(4)
	s := NewSpace(f, 0x1000, 4)
	if _, err := s.Translate(medium); err != nil {
		t.Fatal(err)
	}
	clear(f.b[0x1000:0x2000])
	if _, err := s.Translate(medium); err != nil {
		t.Errorf("within one view a translation is kept: %v", err)
	}
	s.Flush()
	if _, err := s.Translate(medium); !errors.Is(err, ErrAbsent) {
		t.Errorf("after Flush: %v", err)
	}
}

func TestChase(t *testing.T) {
	f := mapped(4)
	s := NewSpace(f, 0x1000, 4)
	binary.LittleEndian.PutUint64(f.b[0x200010:], medium+0x100)
	binary.LittleEndian.PutUint64(f.b[0x200108:], small)
	if got, err := s.Chase(medium, 0x10, 8); got != small || err != nil {
		t.Errorf("Chase = %#x, %v", got, err)
	}
	if got, err := s.Chase(medium, 0x18, 8); got != 0 || err != nil {
		t.Errorf("Chase over null = %#x, %v", got, err)
	}
}

// TestTablesOfTheirOwn: a table that points at itself at every level costs no more than the levels.
func TestTablesOfTheirOwn(t *testing.T) {
	f := &flat{b: bytes.Repeat([]byte{0x03, 0x10, 0, 0, 0, 0, 0, 0}, 0x2000/8)}
	s := NewSpace(f, 0x1000, 5)
	p, err := s.Walk(0x123456789000)
	if err != nil || p.Phys != 0x1000 || f.reads > 5 {
		t.Errorf("%+v, %v, %d reads", p, err, f.reads)
	}
}

// FuzzWalk fills eight tables with entries: of every 10 bytes, 2 say which and 8 what.
func FuzzWalk(f *testing.F) {
	var seed []byte
	m := mapped(5)
	for i := 0; i < 0x8000; i += 8 {
		if e := m.b[0x1000+i : 0x1008+i]; binary.LittleEndian.Uint64(e) != 0 {
			seed = append(binary.LittleEndian.AppendUint16(seed, uint16(i/8)), e...)
		}
	}
	f.Add(seed, uint64(small), true)
	f.Add(seed, uint64(big), true)
	f.Add([]byte{1, 0, 0x83, 0x10, 0, 0, 0, 0, 0, 0}, uint64(1)<<39, false)
	f.Fuzz(func(t *testing.T, entries []byte, va uint64, five bool) {
		mem := &flat{b: make([]byte, 0x9000)}
		for ; len(entries) >= 10; entries = entries[10:] {
			mem.entry(0x1000, int(binary.LittleEndian.Uint16(entries)%4096), binary.LittleEndian.Uint64(entries[2:]))
		}
		levels := 4
		if five {
			levels = 5
		}
		s := NewSpace(mem, 0x1000, levels)
		p, err := s.Walk(va)
		if mem.reads > levels {
			t.Errorf("%d reads", mem.reads)
		}
		if err == nil && (p.Phys%p.Size != 0 || p.Phys >= 1<<52) {
			t.Errorf("%+v", p)
		}
		pa, terr := s.Translate(va)
		if (err == nil) != (terr == nil) || err == nil && pa-p.Phys >= p.Size {
			t.Errorf("Walk %+v, %v; Translate %#x, %v", p, err, pa, terr)
		}
		mem.reads = 0
		_, _ = s.CString(va, 8192)
		if mem.reads > 100 {
			t.Errorf("a text of 8 KiB took %d reads", mem.reads)
		}
	})
}

func BenchmarkU64(b *testing.B) {
	s := NewSpace(mapped(4), 0x1000, 4)
	for b.Loop() {
		if _, err := s.U64(medium + 0x100); err != nil {
			b.Fatal(err)
		}
	}
}

func TestRange(t *testing.T) {
	for _, levels := range []int{4, 5} {
		f := mapped(levels)
		s := NewSpace(f, 0x1000, levels)
		for _, c := range []struct {
			from, to uint64
			want     []uint64
		}{
			{0, 1 << 47, []uint64{small &^ 0xfff}},
			{small &^ 0xfff, small&^0xfff + 1, []uint64{small &^ 0xfff}},
			{small + 0x1000, 1 << 47, nil},
			{0xffff800000000000, 0xffffffffffffffff, []uint64{medium, big}},
			{medium + 5<<20, 0xffffffffffffffff, []uint64{big}},
			{big + 123, big + 124, []uint64{big}},
		} {
			var got []uint64
			err := s.Range(c.from, c.to, func(va uint64, p Page) bool {
				want, err := s.Walk(va)
				if err != nil || p != want {
					t.Errorf("%#x: %+v, Walk says %+v, %v", va, p, want, err)
				}
				got = append(got, va)
				return true
			})
			if err != nil || !slices.Equal(got, c.want) {
				t.Errorf("%d levels, %#x to %#x: %#x, %v; want %#x", levels, c.from, c.to, got, err, c.want)
			}
		}
		f.reads = 0
		if err := s.Range(0, 1<<47, func(uint64, Page) bool { return false }); err != nil || f.reads != levels {
			t.Errorf("%d reads to the first page, %v", f.reads, err)
		}
		if err := s.Range(5, 5, nil); !errors.Is(err, ErrBadAddress) {
			t.Errorf("an empty range: %v", err)
		}
	}
}

// TestRangeEnds maps a table into all of its own entries.
func TestRangeEnds(t *testing.T) {
	f := &flat{b: make([]byte, 1<<20)}
	for i := range 512 {
		f.entry(0x1000, i, 0x1000|ptePresent)
	}
	pages := 0
	err := NewSpace(f, 0x1000, 4).Range(0, 1<<47, func(uint64, Page) bool { pages++; return true })
	if !errors.Is(err, ErrTables) || pages > maxTables*512 {
		t.Errorf("%d pages, %v", pages, err)
	}
}
