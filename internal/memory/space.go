package memory

import (
	"encoding/binary"
	"fmt"
)

// Page is where a virtual address leads.
type Page struct {
	Phys     uint64 // physical address of the page's first byte
	Size     uint64 // 4 KiB, 2 MiB or 1 GiB
	Writable bool   // on every level
	User     bool   // on every level
	NoExec   bool   // on any level
}

// Bits of a page-table entry.
const (
	ptePresent = 1 << 0
	pteWrite   = 1 << 1
	pteUser    = 1 << 2
	pteLarge   = 1 << 7
	pteNX      = 1 << 63
	pteAddr    = 0x000f_ffff_ffff_f000

	pageSize = 4096
)

// Space is one address space: page tables in guest-physical memory. It keeps translations, so it is for one goroutine;
// make one each.
type Space struct {
	phys   Physical
	pager  Pager   // while there is one
	copied *Copied // while there is one, and then nothing else is read
	root   uint64
	levels int
	small  [64]translation // by 4 KiB page
	large  [64]translation // by 2 MiB: where a larger page maps
	tables [4]tableLine    // last entry used at each level above the last
	buf    [8]byte         // for the fixed-size reads, so that they do not allocate
}

// translation maps the page or 2 MiB whose number is key-1; key 0 is an empty slot.
type translation struct{ key, phys uint64 }

// tableLine remembers one upper page-table entry by its own physical address: key-1.
type tableLine struct{ key, entry uint64 }

// NewSpace reads through the tables at root (a physical address; its low 12 bits are ignored, as in CR3). levels is 4
// or 5; anything else is taken as 4.
func NewSpace(phys Physical, root uint64, levels int) *Space {
	s := &Space{phys: phys}
	s.Reset(root, levels)
	return s
}

// Reset turns s to other tables and forgets all translations.
func (s *Space) Reset(root uint64, levels int) {
	if levels != 5 {
		levels = 4
	}
	s.root, s.levels = root&pteAddr, levels
	s.Flush()
}

// Through makes reads go by the pages of a window, until Through(nil).
func (s *Space) Through(p Pager) { s.pager = p }

// Flush forgets all translations: to be called before each view, because the guest changes its tables as it runs.
func (s *Space) Flush() {
	clear(s.small[:])
	clear(s.large[:])
	clear(s.tables[:])
}

// Root returns the physical address of the top table, Levels its depth.
func (s *Space) Root() uint64 { return s.root }

// Levels returns 4 or 5.
func (s *Space) Levels() int { return s.levels }

// Canonical reports whether va can be an address under this many levels.
func (s *Space) Canonical(va uint64) bool {
	shift := 64 - (12 + 9*s.levels)
	return uint64(int64(va<<shift)>>shift) == va
}

// Walk translates va and says what its page allows.
func (s *Space) Walk(va uint64) (Page, error) {
	if !s.Canonical(va) {
		return Page{}, ErrBadAddress
	}
	p := Page{Writable: true, User: true}
	table := s.root
	for level := s.levels; ; level-- {
		shift := uint(12 + 9*(level-1))
		e, err := s.entry(table+(va>>shift&511)*8, level)
		if err != nil {
			return Page{}, err
		}
		if e&ptePresent == 0 {
			return Page{}, ErrAbsent
		}
		p.Writable = p.Writable && e&pteWrite != 0
		p.User = p.User && e&pteUser != 0
		p.NoExec = p.NoExec || e&pteNX != 0
		large := (level == 2 || level == 3) && e&pteLarge != 0
		if level == 1 || large {
			p.Size = 1 << shift
			p.Phys = e & pteAddr &^ (p.Size - 1)
			return p, nil
		}
		table = e & pteAddr
	}
}

// entry reads a table entry; upper levels are remembered, since neighbours share them.
func (s *Space) entry(pa uint64, level int) (uint64, error) {
	if level > 1 {
		if l := &s.tables[level-2]; l.key == pa+1 {
			return l.entry, nil
		}
	}
	e, err := s.word(pa)
	if err != nil {
		return 0, err
	}
	if level > 1 {
		s.tables[level-2] = tableLine{pa + 1, e}
	}
	return e, nil
}

// word reads 8 aligned bytes.
func (s *Space) word(pa uint64) (uint64, error) {
	if s.pager != nil {
		if page := s.pager.Page(pa); page != nil {
			return binary.LittleEndian.Uint64(page[pa%PageSize&^7:]), nil
		}
	}
	if err := s.phys.ReadPhys(pa, s.buf[:]); err != nil {
		return 0, err
	}
	return binary.LittleEndian.Uint64(s.buf[:]), nil
}

// Translate returns the physical address of va.
func (s *Space) Translate(va uint64) (uint64, error) {
	if s.copied != nil {
		return 0, ErrAbsent
	}
	big, page := va>>21, va>>12
	if t := &s.large[big%64]; t.key == big+1 {
		return t.phys + va&(1<<21-1), nil
	}
	if t := &s.small[page%64]; t.key == page+1 {
		return t.phys + va&(pageSize-1), nil
	}
	p, err := s.Walk(va)
	if err != nil {
		return 0, err
	}
	pa := p.Phys + va&(p.Size-1)
	if p.Size > pageSize {
		s.large[big%64] = translation{big + 1, pa &^ (1<<21 - 1)}
	} else {
		s.small[page%64] = translation{page + 1, p.Phys}
	}
	return pa, nil
}

// Read fills b from va. It crosses pages; the first page that cannot be read fails it all.
func (s *Space) Read(va uint64, b []byte) error {
	if n, err := s.ReadSome(va, b); n < len(b) {
		return err
	}
	return nil
}

// ReadSome fills as much of b as lies in present pages before the first absent one, and says how much that was. The
// error is nil only where all of b was read.
func (s *Space) ReadSome(va uint64, b []byte) (int, error) {
	done := 0
	if s.copied != nil {
		if done = s.copied.read(va, b); done < len(b) {
			return done, fmt.Errorf("read %#x of a copy: %w", va+uint64(done), ErrAbsent)
		}
		return done, nil
	}
	for done < len(b) {
		at := va + uint64(done)
		if at < va {
			return done, ErrBadAddress
		}
		n := min(len(b)-done, pageSize-int(at&(pageSize-1)))
		pa, err := s.Translate(at)
		if err == nil {
			err = s.copy(pa, b[done:done+n])
		}
		if err != nil {
			return done, fmt.Errorf("read %#x: %w", at, err)
		}
		done += n
	}
	return done, nil
}

// copy fills b from within one page. Whole pages are not worth keeping.
func (s *Space) copy(pa uint64, b []byte) error {
	if s.pager != nil && len(b) < PageSize {
		if page := s.pager.Page(pa); page != nil {
			copy(b, page[pa%PageSize:])
			return nil
		}
	}
	return s.phys.ReadPhys(pa, b)
}
