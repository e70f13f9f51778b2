package kernel

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"hash/crc32"
)

// The flat profile: a header, a table of sections, the sections. doc/profile-format.md has it byte by byte.
const (
	profileMagic   = "vigiaprf"
	profileVersion = 1

	headerSize     = 32
	sectionSize    = 24
	maxSectionsPrf = 64
)

// The sections' ids.
const (
	secText        = iota + 1 // names, each ended by a zero byte
	secBanner                 // linux_banner
	secSymbols                // by address
	secSymbolNames            // index into secSymbols, by name
	secTypes                  // structs and unions, by name
	secFields                 // their fields
	secEnums                  // enumerators, by name
	secCount
)

// Sizes of the records.
const (
	symbolRecord = 16
	indexRecord  = 4
	typeRecord   = 16
	fieldRecord  = 24
	enumRecord   = 16
)

var recordSize = [secCount]int{secText: 1, secBanner: 1, secSymbols: symbolRecord, secSymbolNames: indexRecord, secTypes: typeRecord, secFields: fieldRecord, secEnums: enumRecord}

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// sections are a profile's tables, as slices of its one block of bytes.
type sections [secCount][]byte

// flat is one format of this family: a header, a table of sections, the sections. The profile is one, the reference
// of a kernel's code another.
type flat struct {
	magic   string
	version uint32
	records []int // size of a record by section
	limit   int
	err     error
}

var (
	profileFormat = &flat{profileMagic, profileVersion, recordSize[:], maxProfile, ErrProfile}
	refFormat     = &flat{refMagic, refVersion, refRecordSize[:], maxRef, ErrReference}
)

// pack lays sections out behind a header.
func pack(s *sections) []byte { return profileFormat.pack(s[:]) }

// unpackSections checks header and section table of a profile, and slices b. It touches no section.
func unpackSections(b []byte) (*sections, error) {
	var s sections
	list, err := profileFormat.unpack(b)
	if err != nil {
		return nil, err
	}
	copy(s[:], list)
	return &s, nil
}

func (f *flat) pack(s [][]byte) []byte {
	count := len(s) - 1
	n := headerSize + count*sectionSize
	offsets := make([]int, len(s))
	for id := 1; id <= count; id++ {
		n = (n + 7) &^ 7
		offsets[id] = n
		n += len(s[id])
	}
	out := make([]byte, n)
	le := binary.LittleEndian
	copy(out, f.magic)
	le.PutUint32(out[8:], f.version)
	le.PutUint64(out[16:], uint64(n))
	le.PutUint32(out[28:], uint32(count))
	for id := 1; id <= count; id++ {
		rec := out[headerSize+(id-1)*sectionSize:]
		le.PutUint32(rec, uint32(id))
		le.PutUint64(rec[8:], uint64(offsets[id]))
		le.PutUint64(rec[16:], uint64(len(s[id])))
		copy(out[offsets[id]:], s[id])
	}
	body := headerSize + count*sectionSize
	le.PutUint32(out[24:], crc32.Checksum(out[body:], castagnoli))
	le.PutUint32(out[12:], headerSum(out[:body]))
	return out
}

// headerSum is the checksum of header and section table, its own field taken as zero.
func headerSum(head []byte) uint32 {
	sum := crc32.Update(0, castagnoli, head[:12])
	sum = crc32.Update(sum, castagnoli, make([]byte, 4))
	return crc32.Update(sum, castagnoli, head[16:])
}

// unpack checks header and section table, and slices b. It touches no section.
func (f *flat) unpack(b []byte) ([][]byte, error) {
	le := binary.LittleEndian
	if len(b) < headerSize || !bytes.HasPrefix(b, []byte(f.magic)) {
		return nil, fmt.Errorf("%w: no header", f.err)
	}
	if v := le.Uint32(b[8:]); v != f.version {
		return nil, fmt.Errorf("%w: version %d, want %d: build it anew", f.err, v, f.version)
	}
	if n := le.Uint64(b[16:]); n != uint64(len(b)) || n > uint64(f.limit) {
		return nil, fmt.Errorf("%w: it says %d bytes and has %d", f.err, n, len(b))
	}
	count := le.Uint32(b[28:])
	if count > maxSectionsPrf || headerSize+int(count)*sectionSize > len(b) {
		return nil, fmt.Errorf("%w: %d sections", f.err, count)
	}
	head := b[:headerSize+int(count)*sectionSize]
	if headerSum(head) != le.Uint32(b[12:]) {
		return nil, fmt.Errorf("%w: header checksum differs", f.err)
	}
	s := make([][]byte, len(f.records))
	for rec := head[headerSize:]; len(rec) > 0; rec = rec[sectionSize:] {
		id := le.Uint32(rec)
		data, ok := within(b, le.Uint64(rec[8:]), le.Uint64(rec[16:]))
		if !ok {
			return nil, fmt.Errorf("%w: section %d out of bounds", f.err, id)
		}
		if id == 0 || int(id) >= len(s) {
			continue // of a later minor addition
		}
		if len(data)%f.records[id] != 0 || s[id] != nil {
			return nil, fmt.Errorf("%w: section %d has %d bytes", f.err, id, len(data))
		}
		s[id] = data
	}
	return s, nil
}

// bodySum computes the checksum of all that follows the section table.
func bodySum(b []byte) (got, want uint32) {
	body := headerSize + int(binary.LittleEndian.Uint32(b[28:]))*sectionSize
	return crc32.Checksum(b[body:], castagnoli), binary.LittleEndian.Uint32(b[24:])
}
