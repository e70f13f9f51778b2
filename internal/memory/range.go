package memory

import "encoding/binary"

// Range visits the pages that are mapped from one address up to another, in order, with what each allows. It reads only
// the tables that there are, each once, so that an empty gigabyte costs a few reads. visit ends it by returning false. An
// error is ErrTables, or about the top table; what hangs on a table that can't be read is left out.
func (s *Space) Range(from, to uint64, visit func(va uint64, p Page) bool) error {
	if from >= to || !s.Canonical(from) || !s.Canonical(to-1) {
		return ErrBadAddress
	}
	w := rangeWalk{s: s, from: from, last: to - 1, visit: visit}
	goOn, err := w.table(s.root, s.levels, from&^(1<<s.width()-1), Page{Writable: true, User: true})
	if !goOn && w.tables > maxTables {
		return ErrTables
	}
	return err
}

// width is how many bits of an address the tables translate.
func (s *Space) width() uint { return uint(12 + 9*s.levels) }

type rangeWalk struct {
	s          *Space
	from, last uint64
	visit      func(uint64, Page) bool
	tables     int // read so far
}

// maxTables bounds the tables of a Range: 128 GiB in pages of 4 KiB. Tables that lead to each other would have no end.
const maxTables = 1 << 16

// table visits what one table maps; base is the address that its first entry is for. It reports whether to go on.
func (w *rangeWalk) table(pa uint64, level int, base uint64, above Page) (bool, error) {
	if w.tables++; w.tables > maxTables {
		return false, nil
	}
	shift := uint(12 + 9*(level-1))
	size := uint64(1) << shift
	first, end := uint64(0), uint64(511)
	if w.from > base {
		first = (w.from - base) >> shift
	}
	if span := (w.last - base) >> shift; span < end {
		end = span
	}
	var buf [4096]byte
	b := buf[:8*(end-first+1)]
	if err := w.s.phys.ReadPhys(pa+8*first, b); err != nil {
		return true, err
	}
	for i := first; i <= end; i++ {
		e := binary.LittleEndian.Uint64(b[8*(i-first):])
		if e&ptePresent == 0 {
			continue
		}
		va := base + i*size
		p := Page{Writable: above.Writable && e&pteWrite != 0, User: above.User && e&pteUser != 0, NoExec: above.NoExec || e&pteNX != 0}
		goOn := true
		if level == 1 || (level == 2 || level == 3) && e&pteLarge != 0 {
			p.Size, p.Phys = size, e&pteAddr&^(size-1)
			goOn = w.visit(va, p)
		} else {
			goOn, _ = w.table(e&pteAddr, level-1, va, p)
		}
		if !goOn {
			return false, nil
		}
	}
	return true, nil
}
