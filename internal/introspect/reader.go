package introspect

import (
	"errors"

	"vigia/internal/memory"
)

var errNoField = errors.New("the kernel has no such field")

// reader reads several values and keeps the first error, for where one failing is all failing.
type reader struct {
	s   *memory.Space
	err error
}

func (r *reader) u64(va uint64) uint64 {
	if r.err != nil {
		return 0
	}
	var v uint64
	v, r.err = r.s.U64(va)
	return v
}

func (r *reader) u32(va uint64) uint32 {
	if r.err != nil {
		return 0
	}
	var v uint32
	v, r.err = r.s.U32(va)
	return v
}

func (r *reader) u16(va uint64) uint16 {
	if r.err != nil {
		return 0
	}
	var v uint16
	v, r.err = r.s.U16(va)
	return v
}

func (r *reader) u8(va uint64) uint8 {
	if r.err != nil {
		return 0
	}
	var v uint8
	v, r.err = r.s.U8(va)
	return v
}

func (r *reader) bytes(va uint64, b []byte) {
	if r.err == nil {
		r.err = r.s.Read(va, b)
	}
}

// field64 and field32 read a field that a kernel may lack: noField is an error then.
func (g *Guest) field64(at, field uint64) (uint64, error) {
	if field == noField {
		return 0, errNoField
	}
	return g.space.U64(at + field)
}

func (g *Guest) field32(at, field uint64) (uint32, error) {
	if field == noField {
		return 0, errNoField
	}
	return g.space.U32(at + field)
}
