package memory

import (
	"encoding/binary"
	"errors"
	"testing"
)

func piece(b []byte, va uint64, text string) []byte {
	b = binary.LittleEndian.AppendUint64(b, va)
	b = binary.LittleEndian.AppendUint64(b, uint64(len(text)))
	b = append(b, text...)
	for len(b)%8 != 0 {
		b = append(b, 0)
	}
	return b
}

func TestCopied(t *testing.T) {
	raw := piece(piece(piece(nil, 0xffff888000001000, "12345678abcd"), 0x1000, "one "), 0x1004, "text")
	c, err := ParseCopied(raw)
	if err != nil {
		t.Fatal(err)
	}
	s := NewSpace(nil, 0, 4) // whatever is read but the copy panics
	s.From(c)
	if v, err := s.U32(0xffff888000001008); err != nil || v != 0x64636261 {
		t.Errorf("%#x, %v", v, err)
	}
	var b [8]byte
	if err := s.Read(0x1000, b[:]); err != nil || string(b[:]) != "one text" {
		t.Errorf("two pieces: %q, %v", b, err)
	}
	if v, err := s.U64(0x1000); err != nil || v != binary.LittleEndian.Uint64([]byte("one text")) {
		t.Errorf("a word in two pieces: %#x, %v", v, err)
	}
	if n, err := s.ReadSome(0x1002, b[:]); n != 6 || !errors.Is(err, ErrAbsent) {
		t.Errorf("%d, %v", n, err)
	}
	for _, va := range []uint64{0xfff, 0x1005, 0x2000, 0xffff888000001009, ^uint64(0)} {
		if _, err := s.U64(va); !errors.Is(err, ErrAbsent) {
			t.Errorf("%#x was not copied: %v", va, err)
		}
	}
	for name, bad := range map[string][]byte{
		"cut short":       raw[:len(raw)-4],
		"half a head":     raw[:12],
		"too long":        make([]byte, MaxCopy+8),
		"beyond its end":  piece(nil, 1, "x")[:16],
		"around the last": piece(nil, ^uint64(3), "12345678"),
	} {
		if _, err := ParseCopied(bad); !errors.Is(err, ErrCopy) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func FuzzCopied(f *testing.F) {
	f.Add(piece(piece(nil, 0xffff888000001000, "12345678"), 0x1000, "text"), uint64(0x1001), uint8(3))
	f.Fuzz(func(t *testing.T, b []byte, va uint64, n uint8) {
		c, err := ParseCopied(b)
		if (err == nil) == (c == nil) {
			t.Fatal("an error and a copy, or neither")
		}
		if err != nil {
			return
		}
		s := NewSpace(nil, 0, 4)
		s.From(c)
		buf := make([]byte, n)
		_, _ = s.ReadSome(va, buf)
		_, _ = s.U64(va)
		_, _ = s.CString(va, 100)
	})
}
