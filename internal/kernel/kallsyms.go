package kernel

import (
	"bytes"
	"encoding/binary"
	"fmt"
)

// symbol is one of the kernel's symbols at its link address. Per-CPU symbols have small addresses: their offset in the
// per-CPU area. kind is nm's letter.
type symbol struct {
	addr uint64
	kind byte
	name []byte
}

// The tables of kallsyms lie in .rodata one after another, each aligned to 8 bytes:
//
//	up to 6.4                     since
//	offsets    u32 × n            num_syms
//	relative_base  u64            names
//	num_syms   u32                markers
//	names      compressed         token_table
//	markers    u32 × ⌈n/256⌉      token_index
//	(seqs_of_names, 6.2 to 6.4)   offsets    u32 × n
//	token_table                   relative_base u64
//	token_index u16 × 256         seqs_of_names
//
// A name is a length (one byte, or two as ULEB128) and so many tokens; the first letter it expands to is its kind.
// markers hold where every 256th name starts. Nothing says where the tables are, so they are found by what they must
// contain, and each candidate is checked whole.
type kallsyms struct {
	image   []byte
	tokens  [256][]byte
	indexAt int // of token_index
	namesAt int
	num     int
	budget  int // steps of searching left: an image made for it could else keep the search busy for hours
}

// digits are the ten tokens of token_table that are always themselves and always in a row.
var digits = []byte("0\x001\x002\x003\x004\x005\x006\x007\x008\x009\x00")

const (
	indexSize     = 256 * 2
	maxTokenTable = 16 << 10
	maxSeqsGap    = 3*maxSymbols + 16
	maxNameLength = 1024
	maxTries      = 64 // candidates for the token table
	searchBudget  = 16 << 20
)

// readKallsyms finds and decodes the table of symbols.
func readKallsyms(image []byte) ([]symbol, error) {
	k := &kallsyms{image: image, budget: searchBudget}
	for at, tries := 0, 0; tries < maxTries && k.budget > 0; tries++ {
		i := bytes.Index(image[at:], digits)
		if i < 0 {
			break
		}
		at += i
		// Right before the token table are the markers, or the sequence numbers of 6.2 to 6.4 and then the markers.
		if tableAt, ok := k.findTokens(at); ok && k.findNames(tableAt) {
			return k.decode()
		}
		at += len(digits)
	}
	return nil, missing("table", "kallsyms")
}

// findTokens looks behind the digits for the index that fits them, and fills tokens.
func (k *kallsyms) findTokens(digitsAt int) (tableAt int, ok bool) {
	for at := (digitsAt + 7) &^ 7; at+indexSize <= len(k.image) && at < digitsAt+maxTokenTable; at += 8 {
		index := k.image[at : at+indexSize]
		zero := int(binary.LittleEndian.Uint16(index[2*'0':]))
		if binary.LittleEndian.Uint16(index) != 0 || int(binary.LittleEndian.Uint16(index[2*'9':])) != zero+18 || zero > digitsAt {
			continue
		}
		tableAt = digitsAt - zero
		if k.checkTokens(k.image[tableAt:at], index) {
			k.indexAt = at
			return tableAt, true
		}
	}
	return 0, false
}

// checkTokens accepts an index that names 256 tokens of table in order, each ended by the one zero before the next.
func (k *kallsyms) checkTokens(table, index []byte) bool {
	for i := range 256 {
		start := int(binary.LittleEndian.Uint16(index[2*i:]))
		if start >= len(table) || (i > 0 && (start == 0 || table[start-1] != 0)) {
			return false
		}
		end := bytes.IndexByte(table[start:], 0)
		if end < 0 {
			return false
		}
		if i < 255 && int(binary.LittleEndian.Uint16(index[2*i+2:])) != start+end+1 {
			return false
		}
		k.tokens[i] = table[start : start+end]
	}
	return true
}

// findNames goes back from the token table over markers to names and num_syms.
func (k *kallsyms) findNames(tableAt int) bool {
	if tableAt%8 != 0 {
		return false
	}
	for _, pad := range []int{0, 4} {
		if k.namesBefore(tableAt - pad) {
			return true
		}
	}
	// The sequence numbers are 3 bytes each and not monotonic, so each aligned end of markers has to be tried: an
	// end is one where four bytes of padding or the last marker are followed by small numbers. Only those kernels pay.
	for end := tableAt - 8; end > tableAt-maxSeqsGap && end > 8; end -= 4 {
		last := binary.LittleEndian.Uint32(k.image[end-4:])
		prev := binary.LittleEndian.Uint32(k.image[end-8:])
		if k.budget--; k.budget < 0 {
			return false
		}
		if last > prev && last-prev < 256*64 && last-prev > 256*2 && k.namesBefore(end) {
			return k.seqsFit(end, tableAt)
		}
	}
	return false
}

func (k *kallsyms) seqsFit(markersEnd, tableAt int) bool {
	gap := tableAt - (markersEnd+7)&^7
	return gap >= 3*k.num && gap < 3*k.num+8
}

// namesBefore takes end as the end of the markers and looks for names that fit them.
func (k *kallsyms) namesBefore(end int) bool {
	first := end
	for next := uint32(1<<32 - 1); ; {
		if first < 4 || end-first > 4*(maxSymbols/256+1) {
			return false
		}
		m := binary.LittleEndian.Uint32(k.image[first-4:])
		if m >= next {
			return false
		}
		first -= 4
		k.budget--
		if next = m; m == 0 {
			break
		}
	}
	markers := k.image[first:end]
	n := len(markers) / 4
	if n < 2 || first%8 != 0 {
		return false
	}
	span := int(binary.LittleEndian.Uint32(markers[4*(n-1):]))
	// The last marker leaves 1 to 256 names, so their start is known to within the length of those.
	for at := (first - span - 1) &^ 7; at >= 8 && at > first-span-256*130 && k.budget > 0; at -= 8 {
		k.budget--
		num := int(binary.LittleEndian.Uint32(k.image[at-8:]))
		if num > 0 && num <= maxSymbols && (num+255)/256 == n && binary.LittleEndian.Uint32(k.image[at-4:]) == 0 &&
			k.namesFit(at, first, num, markers) {
			k.namesAt, k.num = at, num
			return true
		}
	}
	return false
}

// namesFit walks all names from at and compares with the markers.
func (k *kallsyms) namesFit(at, limit, num int, markers []byte) bool {
	start := at
	for i := range num {
		if i%256 == 0 && uint32(at-start) != binary.LittleEndian.Uint32(markers[4*(i/256):]) {
			return false
		}
		n, head := nameLength(k.image[at:limit])
		if head == 0 || n == 0 || at+head+n > limit {
			k.budget -= i
			return false
		}
		at += head + n
	}
	return limit-at < 8
}

// nameLength decodes the length before a name: head is how many bytes it took, 0 where there is none.
func nameLength(b []byte) (n, head int) {
	switch {
	case len(b) > 0 && b[0] < 0x80:
		return int(b[0]), 1
	case len(b) > 1:
		return int(b[0]&0x7f) | int(b[1])<<7, 2
	}
	return 0, 0
}

// decode expands all names and computes their addresses.
func (k *kallsyms) decode() ([]symbol, error) {
	addrs, err := k.addresses()
	if err != nil {
		return nil, err
	}
	syms := make([]symbol, k.num)
	text := make([]byte, 0, k.num*24)
	at := k.namesAt
	for i := range syms {
		n, head := nameLength(k.image[at:])
		at += head
		start := len(text)
		for _, token := range k.image[at : at+n] {
			text = append(text, k.tokens[token]...)
		}
		at += n
		name := text[start:len(text):len(text)]
		if len(name) < 2 || len(name) > maxNameLength || len(text) > maxNames {
			return nil, fmt.Errorf("%w: kallsyms: symbol %d has a name of %d bytes", ErrNotKernel, i, len(name))
		}
		syms[i] = symbol{addrs(i), name[0], name[1:]}
	}
	return syms, nil
}

// addresses returns how the n-th symbol's address is had, whichever side the offsets are on.
func (k *kallsyms) addresses() (func(int) uint64, error) {
	size := (4*k.num + 7) &^ 7
	after := (k.indexAt + indexSize + 7) &^ 7
	before := k.namesAt - 8 - 8 - size
	for _, at := range []int{after, before} {
		if at < 0 {
			continue
		}
		if base, ok := k.base(at + size); ok {
			if addrs := k.relative(at, base); k.ascending(addrs) {
				return addrs, nil
			}
		}
	}
	return nil, missing("table", "kallsyms_offsets")
}

// ascending: kallsyms is sorted by address. What only looks like offsets is not.
func (k *kallsyms) ascending(addrs func(int) uint64) bool {
	for i := 1; i < k.num; i++ {
		if addrs(i) < addrs(i-1) {
			return false
		}
	}
	return true
}

// base reads relative_base, which must be an address of the kernel's.
func (k *kallsyms) base(at int) (uint64, bool) {
	if at < 0 || at+8 > len(k.image) {
		return 0, false
	}
	base := binary.LittleEndian.Uint64(k.image[at:])
	return base, base >= kernelSpace
}

// relative decodes offsets. With CONFIG_KALLSYMS_ABSOLUTE_PERCPU (gone in 6.15) those ≥ 0 are absolute, for per-CPU
// symbols, and negative ones count from base downwards, less one; without it all count up from base.
func (k *kallsyms) relative(at int, base uint64) func(int) uint64 {
	offset := func(i int) int32 { return int32(binary.LittleEndian.Uint32(k.image[at+4*i:])) }
	negative := 0
	for i := range k.num {
		if offset(i) < 0 {
			negative++
		}
	}
	if negative > k.num/2 {
		return func(i int) uint64 {
			if o := offset(i); o < 0 {
				return base - 1 - uint64(int64(o))
			} else {
				return uint64(o)
			}
		}
	}
	return func(i int) uint64 { return base + uint64(uint32(offset(i))) }
}
