package kernel

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
)

// BTF's kinds of types (Documentation/bpf/btf.rst).
const (
	btfInt = iota + 1
	btfPtr
	btfArray
	btfStruct
	btfUnion
	btfEnum
	btfFwd
	btfTypedef
	btfVolatile
	btfConst
	btfRestrict
	btfFunc
	btfFuncProto
	btfVar
	btfDatasec
	btfFloat
	btfDeclTag
	btfTypeTag
	btfEnum64
)

// btfTail is how many bytes follow a type's own 12: fixed, and for each of its vlen elements.
var btfTail = [...]struct{ fixed, each int }{
	btfInt: {4, 0}, btfPtr: {}, btfArray: {12, 0}, btfStruct: {0, 12}, btfUnion: {0, 12}, btfEnum: {0, 8}, btfFwd: {},
	btfTypedef: {}, btfVolatile: {}, btfConst: {}, btfRestrict: {}, btfFunc: {}, btfFuncProto: {0, 8}, btfVar: {4, 0},
	btfDatasec: {0, 12}, btfFloat: {}, btfDeclTag: {4, 0}, btfTypeTag: {}, btfEnum64: {0, 12},
}

var errBTF = errors.New("malformed BTF")

// btfTable is BTF with the place of each type known. Types are read in place and links followed one at a time, with
// a bound: the general readers build a graph by recursion, which a chain of a million pointers takes to the end of
// the stack, and they build all of it where a profile needs structs and enums (doc/decisions/041).
type btfTable struct {
	types   []byte
	strings []byte
	at      []uint32 // offset of each type in types; 0 is void
}

// btfType is one type's header. link is its size or the type it refers to, by kind.
type btfType struct {
	name uint32
	kind int
	vlen int
	flag bool
	link uint32
	tail []byte
}

// readBTF checks the header and finds all types.
func readBTF(b []byte) (*btfTable, error) {
	if len(b) == 0 {
		return nil, missing("table", "BTF")
	}
	if len(b) > maxBTF {
		return nil, fmt.Errorf("%w: BTF of %d bytes", ErrTooLarge, len(b))
	}
	le := binary.LittleEndian
	if len(b) < 24 || le.Uint16(b) != 0xeb9f || b[2] != 1 {
		return nil, fmt.Errorf("%w: %w: bad header", ErrUnsupported, errBTF)
	}
	body, ok := within(b, uint64(le.Uint32(b[4:])), uint64(len(b))-min(uint64(len(b)), uint64(le.Uint32(b[4:]))))
	if !ok {
		return nil, fmt.Errorf("%w: %w: bad header", ErrUnsupported, errBTF)
	}
	types, ok1 := within(body, uint64(le.Uint32(b[8:])), uint64(le.Uint32(b[12:])))
	strings, ok2 := within(body, uint64(le.Uint32(b[16:])), uint64(le.Uint32(b[20:])))
	if !ok1 || !ok2 {
		return nil, fmt.Errorf("%w: %w: sections out of bounds", ErrUnsupported, errBTF)
	}
	t := &btfTable{types: types, strings: strings, at: make([]uint32, 1, 1+len(types)/20)}
	for off := 0; off < len(types); {
		n, err := typeLength(types[off:])
		if err != nil {
			return nil, fmt.Errorf("%w: type %d: %w", ErrUnsupported, len(t.at), err)
		}
		if len(t.at) > maxTypes {
			return nil, fmt.Errorf("%w: more than %d types", ErrTooLarge, maxTypes)
		}
		t.at = append(t.at, uint32(off))
		off += n
	}
	return t, nil
}

func typeLength(b []byte) (int, error) {
	if len(b) < 12 {
		return 0, fmt.Errorf("%w: cut short", errBTF)
	}
	info := binary.LittleEndian.Uint32(b[4:])
	kind, vlen := int(info>>24&31), int(info&0xffff)
	if kind == 0 || kind >= len(btfTail) {
		return 0, fmt.Errorf("%w: unknown kind %d", errBTF, kind)
	}
	n := 12 + btfTail[kind].fixed + btfTail[kind].each*vlen
	if n > len(b) {
		return 0, fmt.Errorf("%w: cut short", errBTF)
	}
	return n, nil
}

// get reads a type's header; ids out of range read as void (kind 0).
func (t *btfTable) get(id uint32) btfType {
	if id == 0 || int64(id) >= int64(len(t.at)) {
		return btfType{}
	}
	b := t.types[t.at[id]:]
	info := binary.LittleEndian.Uint32(b[4:])
	return btfType{
		name: binary.LittleEndian.Uint32(b),
		kind: int(info >> 24 & 31),
		vlen: int(info & 0xffff),
		flag: info>>31 != 0,
		link: binary.LittleEndian.Uint32(b[8:]),
		tail: b[12:],
	}
}

// resolve follows typedefs and qualifiers to the type meant.
func (t *btfTable) resolve(id uint32) (uint32, btfType) {
	for range maxNesting {
		typ := t.get(id)
		switch typ.kind {
		case btfTypedef, btfVolatile, btfConst, btfRestrict, btfTypeTag:
			id = typ.link
		default:
			return id, typ
		}
	}
	return 0, btfType{}
}

// text returns the string at an offset, cut to maxNameLength.
func (t *btfTable) text(off uint32) []byte {
	if int64(off) >= int64(len(t.strings)) {
		return nil
	}
	b := t.strings[off:min(len(t.strings), int(off)+maxNameLength)]
	if i := bytes.IndexByte(b, 0); i >= 0 {
		b = b[:i]
	}
	return b
}

// member is one member of a struct or union as BTF has it.
type member struct {
	name uint32
	typ  uint32
	bit  uint32 // offset in bits
	bits uint32 // width of a bit field, else 0
}

// member decodes the i-th member.
func (typ *btfType) member(t *btfTable, i int) member {
	b := typ.tail[12*i:]
	m := member{name: binary.LittleEndian.Uint32(b), typ: binary.LittleEndian.Uint32(b[4:]), bit: binary.LittleEndian.Uint32(b[8:])}
	if typ.flag {
		m.bits, m.bit = m.bit>>24, m.bit&0xffffff
		return m
	}
	// Before kind_flag a bit field was a member of an integer type narrower than its storage.
	if _, target := t.resolve(m.typ); target.kind == btfInt {
		enc := binary.LittleEndian.Uint32(target.tail)
		if width := enc & 0xff; width != target.link*8 {
			m.bits, m.bit = width, m.bit+(enc>>16&0xff)
		}
	}
	return m
}

// shape is what a field's type comes down to.
type shape struct {
	kind   FieldKind
	size   uint32 // bytes, of one element
	count  uint32 // elements of an array, else 1
	target uint32 // the struct it is, holds or points to: a type id, 0 if none
}

// shapeOf resolves a field's type.
func (t *btfTable) shapeOf(id uint32) shape {
	s := shape{count: 1}
	for range maxNesting {
		var typ btfType
		id, typ = t.resolve(id)
		switch typ.kind {
		case btfArray:
			n := binary.LittleEndian.Uint32(typ.tail[8:])
			if total := uint64(s.count) * uint64(n); total < 1<<31 {
				s.count = uint32(total)
			}
			id = binary.LittleEndian.Uint32(typ.tail)
			continue
		case btfInt, btfEnum, btfEnum64, btfFloat:
			s.kind, s.size = KindInt, typ.link
		case btfPtr:
			s.kind, s.size = KindPointer, 8
			if to, target := t.resolve(typ.link); target.kind == btfStruct || target.kind == btfUnion {
				s.target = to
			}
		case btfStruct, btfUnion:
			s.kind, s.size, s.target = KindStruct, typ.link, id
		}
		break
	}
	return s
}
