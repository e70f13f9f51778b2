package kernel

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"io"
	"os"
	"sort"
	"strings"

	"golang.org/x/sys/unix"
)

// Profile answers questions about one kernel. It is safe for concurrent use. Addresses are link addresses: what a
// kernel without KASLR would have.
type Profile struct {
	data   []byte
	s      *sections
	mapped bool
}

// FieldKind is what sort of thing a field holds.
type FieldKind uint8

// The kinds of fields.
const (
	KindOther   FieldKind = iota // functions, forward declarations
	KindInt                      // integers, booleans, characters, enumerations, floats
	KindPointer                  // to anything
	KindStruct                   // a struct or union by value
)

// Field is a place within a struct.
type Field struct {
	Offset   uint64 // bytes from the start of the struct that was asked about
	BitShift uint8  // of a bit field: its lowest bit, counted from Offset
	BitSize  uint8  // of a bit field: its width; else 0
	Size     uint64 // bytes; of an array, one element
	Count    uint64 // elements of an array, else 1
	Kind     FieldKind
	typ      uint32 // the struct it is or points to
}

const noType = 0xffffffff

// maxAliases bounds how many types of one name are looked through.
const maxAliases = 64

// Load makes a profile of the bytes that Encode wrote. It keeps b, and checks its header; Verify checks the rest.
// Damage that neither has seen yields wrong answers or errors, never a panic.
func Load(b []byte) (*Profile, error) {
	s, err := unpackSections(b)
	if err != nil {
		return nil, err
	}
	return &Profile{data: b, s: s}, nil
}

// Open maps the profile in f, which may be closed afterwards, and verifies it. After a round of look-ups, Trim.
func Open(f *os.File) (*Profile, error) {
	st, err := f.Stat()
	if err != nil {
		return nil, fmt.Errorf("open profile: %w", err)
	}
	if st.Size() < headerSize || st.Size() > maxProfile {
		return nil, fmt.Errorf("%w: %d bytes", ErrProfile, st.Size())
	}
	b, err := unix.Mmap(int(f.Fd()), 0, int(st.Size()), unix.PROT_READ, unix.MAP_SHARED)
	if err != nil {
		return nil, fmt.Errorf("open profile: %w", err)
	}
	p, err := Load(b)
	if err == nil {
		p.mapped = true
		err = p.Verify()
	}
	if err != nil {
		_ = unix.Munmap(b)
		return nil, err
	}
	// Look-ups are scattered: read-ahead would make most of the file resident.
	_ = unix.Madvise(b, unix.MADV_RANDOM)
	return p, nil
}

// Close ends the mapping of an opened profile. No look-up may be under way.
func (p *Profile) Close() error {
	if !p.mapped {
		return nil
	}
	p.mapped = false
	data := p.data
	p.data, p.s = nil, new(sections)
	return unix.Munmap(data)
}

// Encode writes the profile in its flat format.
func (p *Profile) Encode(w io.Writer) error {
	_, err := w.Write(p.data)
	return err
}

// Verify checks the checksum of the whole profile. It reads all of it, and gives the pages back where it is mapped.
func (p *Profile) Verify() error {
	got, want := bodySum(p.data)
	p.Trim()
	if got != want {
		return fmt.Errorf("%w: checksum differs", ErrProfile)
	}
	return nil
}

// Trim gives the pages of an opened profile back to the host; what is looked up later comes in again. The kernel maps
// 64 KiB around each page touched, so that a few dozen look-ups make all of it resident.
func (p *Profile) Trim() {
	if p.mapped {
		_ = unix.Madvise(p.data, unix.MADV_DONTNEED)
	}
}

// Banner is the kernel's own "Linux version …" line, with its newline.
func (p *Profile) Banner() []byte { return p.s[secBanner] }

// Version is the release, "6.1.0-56-cloud-amd64"; empty where the kernel has no banner.
func (p *Profile) Version() string {
	rest, ok := bytes.CutPrefix(p.Banner(), []byte("Linux version "))
	if !ok {
		return ""
	}
	release, _, _ := bytes.Cut(rest, []byte(" "))
	return string(release)
}

// text returns the name at an offset.
func (p *Profile) text(off uint32) []byte {
	t := p.s[secText]
	if int64(off) >= int64(len(t)) {
		return nil
	}
	t = t[off:]
	t = t[:min(len(t), maxNameLength)]
	if i := bytes.IndexByte(t, 0); i >= 0 {
		t = t[:i]
	}
	return t
}

// search finds the first of n records whose name is not before name.
func (p *Profile) search(n int, name string, at func(i int) uint32) int {
	return sort.Search(n, func(i int) bool { return string(p.text(at(i))) >= name })
}

// Enum returns the value of an enumerator, PIDTYPE_PID for one. Of several that share the name and differ, none.
func (p *Profile) Enum(name string) (int64, error) {
	t := p.s[secEnums]
	n := len(t) / enumRecord
	at := func(i int) uint32 { return binary.LittleEndian.Uint32(t[i*enumRecord:]) }
	i := p.search(n, name, at)
	if i == n || string(p.text(at(i))) != name {
		return 0, missing("enumerator", name)
	}
	if i+1 < n && string(p.text(at(i+1))) == name {
		return 0, missing("unambiguous enumerator", name)
	}
	return int64(binary.LittleEndian.Uint64(t[i*enumRecord+8:])), nil
}

// record is one row of the table of types.
type record struct{ name, size, first, count uint32 }

func (p *Profile) record(i uint32) (record, bool) {
	t := p.s[secTypes]
	if int64(i) >= int64(len(t)/typeRecord) {
		return record{}, false
	}
	le, b := binary.LittleEndian, t[i*typeRecord:]
	return record{le.Uint32(b), le.Uint32(b[4:]), le.Uint32(b[8:]), le.Uint32(b[12:])}, true
}

// named returns the rows of the types with a name.
func (p *Profile) named(name string) []uint32 {
	t := p.s[secTypes]
	n := len(t) / typeRecord
	at := func(i int) uint32 { return binary.LittleEndian.Uint32(t[i*typeRecord:]) }
	var rows []uint32
	for i := p.search(n, name, at); i < n && string(p.text(at(i))) == name && len(rows) < maxAliases; i++ {
		rows = append(rows, uint32(i))
	}
	return rows
}

// Size returns the size of a struct, union, or typedef of an anonymous one. name has no "struct " before it.
func (p *Profile) Size(name string) (uint64, error) {
	rows := p.named(name)
	if len(rows) == 0 || name == "" {
		return 0, missing("type", name)
	}
	first, _ := p.record(rows[0])
	for _, row := range rows[1:] {
		if r, _ := p.record(row); r.size != first.size {
			return 0, missing("unambiguous type", name)
		}
	}
	return uint64(first.size), nil
}

// Field finds a field by path: "se.sum_exec_runtime" in "task_struct". Members of anonymous structs and unions are
// named as in C, without them. A path goes through structs held by value, not through pointers; through an array it
// goes to its first element. Where several types have the name, those with the field must agree about it.
func (p *Profile) Field(typ, path string) (Field, error) {
	rows := p.named(typ)
	if len(rows) == 0 || typ == "" {
		return Field{}, missing("type", typ)
	}
	var found Field
	var ok bool
	for _, row := range rows {
		f, has := p.follow(row, path)
		if !has {
			continue
		}
		f2, found2 := f, found
		f2.typ, found2.typ = 0, 0
		if ok && f2 != found2 {
			return Field{}, missing("unambiguous field", typ+"."+path)
		}
		found, ok = f, true
	}
	if !ok {
		return Field{}, missing("field", typ+"."+path)
	}
	return found, nil
}

// Offset is Field for those who need no more than that.
func (p *Profile) Offset(typ, path string) (uint64, error) {
	f, err := p.Field(typ, path)
	return f.Offset, err
}

// Has reports whether the struct has the field: kernels differ.
func (p *Profile) Has(typ, path string) bool {
	_, err := p.Field(typ, path)
	return err == nil
}

// TypeOf returns the name of the struct that a field is or points to: empty where it has none.
func (p *Profile) TypeOf(f Field) string {
	r, ok := p.record(f.typ)
	if !ok {
		return ""
	}
	return string(p.text(r.name))
}

// follow looks a path up in one row of the table of types.
func (p *Profile) follow(row uint32, path string) (Field, bool) {
	var base uint64
	for {
		name, rest, more := strings.Cut(path, ".")
		f, ok := p.member(row, name)
		if !ok {
			return Field{}, false
		}
		f.Offset += base
		if !more {
			return f, true
		}
		if f.Kind != KindStruct {
			return Field{}, false
		}
		base, row, path = f.Offset, f.typ, rest
	}
}

// member finds one name among a type's fields, which are in the order of their declaration.
func (p *Profile) member(row uint32, name string) (Field, bool) {
	r, ok := p.record(row)
	if !ok || name == "" {
		return Field{}, false
	}
	fields, ok := within(p.s[secFields], uint64(r.first)*fieldRecord, uint64(r.count)*fieldRecord)
	if !ok {
		return Field{}, false
	}
	le := binary.LittleEndian
	for ; len(fields) > 0; fields = fields[fieldRecord:] {
		if string(p.text(le.Uint32(fields))) != name {
			continue
		}
		bit := le.Uint32(fields[4:])
		f := Field{
			Offset: uint64(bit / 8), Size: uint64(le.Uint32(fields[8:])), Count: uint64(le.Uint32(fields[12:])),
			typ: le.Uint32(fields[16:]), Kind: FieldKind(fields[20]), BitSize: fields[21],
		}
		f.BitShift = uint8(bit % 8)
		return f, true
	}
	return Field{}, false
}
