package kernel

import (
	"bytes"
	"cmp"
	"encoding/binary"
	"fmt"
	"io"
	"slices"
)

// Build reads a kernel file, bzImage or ELF vmlinux, of size bytes. A kernel without BTF gives a profile that has its
// symbols, and ErrUnsupported from every question about types; one without kallsyms gives ErrUnsupported.
func Build(r io.ReaderAt, size int64) (*Profile, error) {
	v, err := readVmlinux(r, size)
	if err != nil {
		return nil, err
	}
	return v.profile()
}

// BuildAll unpacks a kernel file once for both: its profile, and the reference of its code. Without a reference, err2 says
// why there can be none.
func BuildAll(r io.ReaderAt, size int64) (p *Profile, ref *Reference, err2, err error) {
	v, err := readVmlinux(r, size)
	if err != nil {
		return nil, nil, nil, err
	}
	if p, err = v.profile(); err != nil {
		return nil, nil, nil, err
	}
	ref, err2 = v.reference(p)
	return p, ref, err2, nil
}

// readVmlinux unpacks a kernel file and reads its ELF headers.
func readVmlinux(r io.ReaderAt, size int64) (*vmlinux, error) {
	image, err := vmlinuxOf(r, size)
	if err != nil {
		return nil, err
	}
	return openVmlinux(image)
}

func (v *vmlinux) profile() (*Profile, error) {
	syms, err := readKallsyms(v.image)
	if err != nil {
		return nil, err
	}
	b := &builder{text: []byte{0}, seen: make(map[string]uint32, 2*len(syms))}
	b.symbols(syms)
	b.banner(v, syms)
	raw := v.btf
	if len(raw) == 0 {
		raw = v.between(syms, "__start_BTF", "__stop_BTF")
	}
	if len(raw) > 0 {
		t, err := readBTF(raw)
		if err != nil {
			return nil, err
		}
		if err := b.types(t); err != nil {
			return nil, err
		}
	}
	if b.full {
		return nil, fmt.Errorf("%w: more than %d bytes of names", ErrTooLarge, maxNames)
	}
	b.out[secText] = b.text
	return Load(pack(&b.out))
}

// between returns the image's bytes between two symbols.
func (v *vmlinux) between(syms []symbol, start, stop string) []byte {
	from, ok1 := find(syms, start)
	to, ok2 := find(syms, stop)
	data, ok3 := v.at(from)
	if !ok1 || !ok2 || !ok3 || to < from || to-from > uint64(len(data)) {
		return nil
	}
	return data[:to-from]
}

func find(syms []symbol, name string) (uint64, bool) {
	i := slices.IndexFunc(syms, func(s symbol) bool { return string(s.name) == name })
	if i < 0 {
		return 0, false
	}
	return syms[i].addr, true
}

// builder gathers the sections of a profile.
type builder struct {
	out   sections
	text  []byte
	seen  map[string]uint32 // offset of each name in text
	count int               // fields so far
	work  int               // members looked at so far: anonymous structs can multiply without giving a field
	full  bool              // the names did not fit
}

// name puts text into the table once and returns its offset.
func (b *builder) name(s []byte) uint32 {
	if len(s) == 0 {
		return 0
	}
	if off, ok := b.seen[string(s)]; ok {
		return off
	}
	if len(b.text)+len(s) >= maxNames {
		b.full = true
		return 0
	}
	off := uint32(len(b.text))
	b.text = append(append(b.text, s...), 0)
	b.seen[string(s)] = off
	return off
}

func (b *builder) symbols(syms []symbol) {
	rec := make([]byte, 0, len(syms)*symbolRecord)
	order := make([]uint32, len(syms))
	for i, s := range syms { // in order of address, as kallsyms is
		order[i] = uint32(i)
		rec = binary.LittleEndian.AppendUint64(rec, s.addr)
		rec = binary.LittleEndian.AppendUint32(rec, b.name(s.name))
		rec = binary.LittleEndian.AppendUint32(rec, uint32(s.kind))
	}
	slices.SortFunc(order, func(i, j uint32) int {
		return cmp.Or(bytes.Compare(syms[i].name, syms[j].name), cmp.Compare(i, j))
	})
	index := make([]byte, 0, len(order)*indexRecord)
	for _, i := range order {
		index = binary.LittleEndian.AppendUint32(index, i)
	}
	b.out[secSymbols], b.out[secSymbolNames] = rec, index
}

// banner keeps "Linux version …" as the image has it.
func (b *builder) banner(v *vmlinux, syms []symbol) {
	addr, _ := find(syms, "linux_banner")
	text, _ := v.at(addr)
	text = text[:min(len(text), maxBanner)]
	if i := bytes.IndexByte(text, 0); i >= 0 {
		b.out[secBanner] = text[:i]
	}
}

// composite is a struct or union on its way into the table: its type id, and the name it goes by.
type composite struct {
	id   uint32
	name []byte
}

// types writes structs, unions and enumerators.
func (b *builder) types(t *btfTable) error {
	var all []composite
	named := make(map[uint32]bool)
	var enums []enumerator
	for id := uint32(1); int(id) < len(t.at); id++ {
		typ := t.get(id)
		switch typ.kind {
		case btfStruct, btfUnion:
			all = append(all, composite{id, t.text(typ.name)})
		case btfEnum, btfEnum64:
			enums = appendEnums(enums, t, typ)
		case btfTypedef: // of an anonymous struct: its only name
			if to, target := t.resolve(id); (target.kind == btfStruct || target.kind == btfUnion) && target.name == 0 && !named[to] {
				named[to] = true
				all = append(all, composite{to, t.text(typ.name)})
			}
		}
	}
	slices.SortFunc(all, func(x, y composite) int {
		return cmp.Or(bytes.Compare(x.name, y.name), cmp.Compare(x.id, y.id))
	})
	place := make(map[uint32]uint32, len(all)) // of a type id in the table
	for i, c := range all {
		place[c.id] = uint32(i)
	}
	var recs, fields []byte
	for _, c := range all {
		typ := t.get(c.id)
		first := b.count
		var err error
		if fields, err = b.fields(fields, t, typ, 0, 0, place); err != nil {
			return err
		}
		recs = binary.LittleEndian.AppendUint32(recs, b.name(c.name))
		recs = binary.LittleEndian.AppendUint32(recs, typ.link)
		recs = binary.LittleEndian.AppendUint32(recs, uint32(first))
		recs = binary.LittleEndian.AppendUint32(recs, uint32(b.count-first))
	}
	b.out[secTypes], b.out[secFields] = recs, fields
	b.enumerators(enums)
	return nil
}

// fields appends the members of a struct that begins at bit base, those of anonymous members in their place.
func (b *builder) fields(out []byte, t *btfTable, typ btfType, base uint32, depth int, place map[uint32]uint32) ([]byte, error) {
	for i := range typ.vlen {
		if b.work++; b.work > maxWork {
			return nil, fmt.Errorf("%w: more than %d members of structs", ErrTooLarge, maxWork)
		}
		m := typ.member(t, i)
		bit := base + m.bit
		if m.name != 0 {
			if b.count++; b.count > maxFields {
				return nil, fmt.Errorf("%w: more than %d fields", ErrTooLarge, maxFields)
			}
			out = b.field(out, t, m, bit, place)
			continue
		}
		_, inner := t.resolve(m.typ)
		if inner.kind != btfStruct && inner.kind != btfUnion {
			continue // padding
		}
		if depth == maxNesting {
			return nil, fmt.Errorf("%w: %w: structs nested more than %d deep", ErrUnsupported, errBTF, maxNesting)
		}
		var err error
		if out, err = b.fields(out, t, inner, bit, depth+1, place); err != nil {
			return nil, err
		}
	}
	return out, nil
}

func (b *builder) field(out []byte, t *btfTable, m member, bit uint32, place map[uint32]uint32) []byte {
	s := t.shapeOf(m.typ)
	target := uint32(noType)
	if s.target != 0 {
		if i, ok := place[s.target]; ok {
			target = i
		}
	}
	out = binary.LittleEndian.AppendUint32(out, b.name(t.text(m.name)))
	out = binary.LittleEndian.AppendUint32(out, bit)
	out = binary.LittleEndian.AppendUint32(out, s.size)
	out = binary.LittleEndian.AppendUint32(out, s.count)
	out = binary.LittleEndian.AppendUint32(out, target)
	out = append(out, byte(s.kind), byte(m.bits), 0, 0)
	return out
}

type enumerator struct {
	name  []byte
	value int64
}

func appendEnums(out []enumerator, t *btfTable, typ btfType) []enumerator {
	le := binary.LittleEndian
	each := btfTail[typ.kind].each
	for i := range typ.vlen {
		b := typ.tail[each*i:]
		value := int64(int32(le.Uint32(b[4:])))
		switch {
		case typ.kind == btfEnum64:
			value = int64(uint64(le.Uint32(b[4:])) | uint64(le.Uint32(b[8:]))<<32)
		case !typ.flag:
			value = int64(le.Uint32(b[4:])) // unsigned
		}
		out = append(out, enumerator{t.text(le.Uint32(b)), value})
	}
	return out
}

func (b *builder) enumerators(enums []enumerator) {
	slices.SortFunc(enums, func(x, y enumerator) int {
		return cmp.Or(bytes.Compare(x.name, y.name), cmp.Compare(x.value, y.value))
	})
	enums = slices.CompactFunc(enums, func(x, y enumerator) bool { return bytes.Equal(x.name, y.name) && x.value == y.value })
	for _, e := range enums {
		rec := binary.LittleEndian.AppendUint32(b.out[secEnums], b.name(e.name))
		rec = binary.LittleEndian.AppendUint32(rec, 0)
		b.out[secEnums] = binary.LittleEndian.AppendUint64(rec, uint64(e.value))
	}
}
