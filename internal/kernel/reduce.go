package kernel

import (
	"cmp"
	"encoding/binary"
	"slices"
)

// Reduce returns a profile of the symbols and types named alone, with the banner: what recorded memory is tested with,
// in some kilobytes. Structs held by value within a named type come along. Enumerators are named among the symbols.
func (p *Profile) Reduce(symbols, types []string) (*Profile, error) {
	b := &builder{text: []byte{0}, seen: make(map[string]uint32)}
	var syms []symbol
	var enums []enumerator
	for _, name := range symbols {
		for _, s := range p.SymbolsNamed(name) {
			syms = append(syms, symbol{s.Addr, s.Kind, []byte(s.Name)})
		}
		if v, err := p.Enum(name); err == nil {
			enums = append(enums, enumerator{[]byte(name), v})
		}
	}
	slices.SortStableFunc(syms, func(x, y symbol) int { return cmp.Compare(x.addr, y.addr) })
	b.symbols(syms)
	b.enumerators(enums)
	b.out[secBanner] = p.Banner()
	b.copyTypes(p, p.closure(types))
	b.out[secText] = b.text
	return Load(pack(&b.out))
}

// closure returns the rows of the named types and of all they hold by value, in order.
func (p *Profile) closure(types []string) []uint32 {
	var rows []uint32
	for _, name := range types {
		rows = append(rows, p.named(name)...)
	}
	seen := make(map[uint32]bool)
	for i := 0; i < len(rows); i++ {
		if seen[rows[i]] {
			continue
		}
		seen[rows[i]] = true
		fields := p.fieldsOf(rows[i])
		for ; len(fields) > 0; fields = fields[fieldRecord:] {
			if to := binary.LittleEndian.Uint32(fields[16:]); FieldKind(fields[20]) == KindStruct && to != noType {
				rows = append(rows, to)
			}
		}
	}
	slices.Sort(rows)
	return slices.Compact(rows)
}

func (p *Profile) fieldsOf(row uint32) []byte {
	r, _ := p.record(row)
	fields, _ := within(p.s[secFields], uint64(r.first)*fieldRecord, uint64(r.count)*fieldRecord)
	return fields
}

// copyTypes writes rows of p, renumbered: they stay in the order of their names.
func (b *builder) copyTypes(p *Profile, rows []uint32) {
	le := binary.LittleEndian
	place := make(map[uint32]uint32, len(rows))
	for i, row := range rows {
		place[row] = uint32(i)
	}
	var recs, fields []byte
	for _, row := range rows {
		r, _ := p.record(row)
		first := len(fields) / fieldRecord
		for src := p.fieldsOf(row); len(src) > 0; src = src[fieldRecord:] {
			rec := slices.Clone(src[:fieldRecord])
			le.PutUint32(rec, b.name(p.text(le.Uint32(rec))))
			to, ok := place[le.Uint32(rec[16:])]
			if !ok {
				to = noType
			}
			le.PutUint32(rec[16:], to)
			fields = append(fields, rec...)
		}
		recs = le.AppendUint32(recs, b.name(p.text(r.name)))
		recs = le.AppendUint32(recs, r.size)
		recs = le.AppendUint32(recs, uint32(first))
		recs = le.AppendUint32(recs, uint32(len(fields)/fieldRecord-first))
	}
	b.out[secTypes], b.out[secFields] = recs, fields
}
