package memory

import (
	"bytes"
	"encoding/binary"
	"fmt"
)

// fixed reads n ≤ 8 bytes at va into s.buf.
func (s *Space) fixed(va uint64, n int) error {
	if s.copied != nil || va&(pageSize-1)+uint64(n) > pageSize {
		return s.Read(va, s.buf[:n])
	}
	pa, err := s.Translate(va)
	if err != nil {
		return err
	}
	return s.phys.ReadPhys(pa, s.buf[:n])
}

// place returns the n bytes at va where they lie, if a window has their page; nil if not, and then fixed knows why.
func (s *Space) place(va uint64, n uint64) []byte {
	if s.copied != nil {
		return s.copied.whole(va, n)
	}
	off := va % PageSize
	if s.pager == nil || off+n > PageSize {
		return nil
	}
	pa, err := s.Translate(va)
	if err != nil {
		return nil
	}
	page := s.pager.Page(pa)
	if page == nil {
		return nil
	}
	return page[off : off+n]
}

// Fresh reads the 8 bytes at va as they are now, whatever a window has kept of them: for what tells whether a thing has changed
// since it was read.
func (s *Space) Fresh(va uint64) (uint64, error) {
	if err := s.fixed(va, 8); err != nil {
		return 0, err
	}
	return binary.LittleEndian.Uint64(s.buf[:]), nil
}

// U64 reads 8 bytes at va.
func (s *Space) U64(va uint64) (uint64, error) {
	if b := s.place(va, 8); b != nil {
		return binary.LittleEndian.Uint64(b), nil
	}
	if err := s.fixed(va, 8); err != nil {
		return 0, err
	}
	return binary.LittleEndian.Uint64(s.buf[:]), nil
}

// U32 reads 4 bytes at va.
func (s *Space) U32(va uint64) (uint32, error) {
	if b := s.place(va, 4); b != nil {
		return binary.LittleEndian.Uint32(b), nil
	}
	if err := s.fixed(va, 4); err != nil {
		return 0, err
	}
	return binary.LittleEndian.Uint32(s.buf[:]), nil
}

// U16 reads 2 bytes at va.
func (s *Space) U16(va uint64) (uint16, error) {
	if b := s.place(va, 2); b != nil {
		return binary.LittleEndian.Uint16(b), nil
	}
	if err := s.fixed(va, 2); err != nil {
		return 0, err
	}
	return binary.LittleEndian.Uint16(s.buf[:]), nil
}

// U8 reads the byte at va.
func (s *Space) U8(va uint64) (uint8, error) {
	if b := s.place(va, 1); b != nil {
		return b[0], nil
	}
	if err := s.fixed(va, 1); err != nil {
		return 0, err
	}
	return s.buf[0], nil
}

// CString reads the text at va up to its NUL, at most limit bytes. Without a NUL in reach it returns what it read, and
// ErrTooLong or why the next page could not be read.
func (s *Space) CString(va uint64, limit int) ([]byte, error) {
	var out []byte
	var chunk [256]byte
	for len(out) < limit {
		n := min(len(chunk), limit-len(out))
		got, err := s.ReadSome(va+uint64(len(out)), chunk[:n])
		if i := bytes.IndexByte(chunk[:got], 0); i >= 0 {
			return append(out, chunk[:i]...), nil
		}
		out = append(out, chunk[:got]...)
		if err != nil {
			return out, err
		}
	}
	return out, fmt.Errorf("text at %#x: %w within %d bytes", va, ErrTooLong, limit)
}

// Chase reads the pointer at va, then at that pointer plus the next offset, and so on: Chase(task, mm, exeFile) is
// task->mm->exe_file. A null pointer on the way ends it with 0 and no error.
func (s *Space) Chase(va uint64, offsets ...uint64) (uint64, error) {
	for _, off := range offsets {
		next, err := s.U64(va + off)
		if err != nil || next == 0 {
			return 0, err
		}
		va = next
	}
	return va, nil
}
