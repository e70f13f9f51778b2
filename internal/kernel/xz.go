package kernel

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"

	"github.com/ulikunitz/xz/lzma"
)

// The kernel's build packs with `xz --x86 --lzma2`: LZMA2 behind a filter that turns the targets of calls and jumps
// into absolute addresses. The xz module knows LZMA2 alone, so the container (one stream, one block) is taken apart
// here, and the filter undone. Source: the .xz file format 1.1, sections 2 and 5.3.
const (
	xzHeader    = 12
	xzFilterX86 = 0x04
	xzFilterLZ2 = 0x21
	maxXZDict   = 128 << 20 // what the kernel's script asks for at most
)

var errXZ = errors.New("malformed xz")

func unpackXZ(b []byte, size int64) ([]byte, error) {
	if len(b) < xzHeader+1 {
		return nil, errXZ
	}
	block := b[xzHeader:]
	n := (int(block[0]) + 1) * 4
	if block[0] == 0 || n > len(block) {
		return nil, fmt.Errorf("%w: no block", errXZ)
	}
	dict, x86, err := xzFilters(block[1 : n-4])
	if err != nil {
		return nil, err
	}
	// The dictionary need not exceed what is unpacked.
	dict = max(min(dict, int(size)), lzma.MinDictCap)
	r, err := lzma.Reader2Config{DictCap: dict}.NewReader2(bytes.NewReader(block[n:]))
	if err != nil {
		return nil, err
	}
	out, err := drain(r, size)
	if err == nil && x86 {
		unfilterX86(out)
	}
	return out, err
}

// xzFilters reads a block header's filters: LZMA2, last, and maybe the one for x86 before it.
func xzFilters(h []byte) (dict int, x86 bool, err error) {
	flags := h[0]
	h = h[1:]
	for _, present := range []byte{0x40, 0x80} { // packed and unpacked size: not needed
		if flags&present != 0 {
			_, n := binary.Uvarint(h)
			if n <= 0 {
				return 0, false, errXZ
			}
			h = h[n:]
		}
	}
	for i := range int(flags&3) + 1 {
		if len(h) < 2 || len(h) < 2+int(h[1]) {
			return 0, false, errXZ
		}
		id, props := h[0], h[2:2+h[1]]
		h = h[2+len(props):]
		switch {
		case id == xzFilterX86 && i == 0 && len(props) == 0:
			x86 = true
		case id == xzFilterLZ2 && i == int(flags&3) && len(props) == 1 && props[0] < 40:
			dict = (2 | int(props[0]&1)) << (props[0]/2 + 11)
			if dict > maxXZDict {
				return 0, false, fmt.Errorf("%w: dictionary of %d bytes", ErrTooLarge, dict)
			}
			return dict, x86, nil
		default:
			return 0, false, fmt.Errorf("%w: unknown filter %#x", errXZ, id)
		}
	}
	return 0, false, errXZ
}

// unfilterX86 turns the absolute targets after E8 (call) and E9 (jump) back into distances. The packer converts only
// where the top byte looks like a near distance, 00 or FF, and no earlier opcode among the last three bytes makes it
// likely that this one is part of an operand; recent has a bit for each of those, the nearest lowest.
func unfilterX86(b []byte) {
	near := func(c byte) bool { return c == 0 || c == 0xff }
	var recent uint32
	last := -1 << 30
	for i := 0; i+4 < len(b); i++ {
		if b[i]&0xfe != 0xe8 {
			continue
		}
		if gap := i - last; gap > 3 {
			recent = 0
		} else {
			recent = recent << (gap - 1) & 7
		}
		last = i
		// The byte that recent's highest opcode would have as its top byte.
		ambiguous := recent == 3 || recent > 4 || recent != 0 && near(b[i+4-span(recent)])
		if ambiguous || !near(b[i+4]) {
			recent = recent<<1 | 1
			continue
		}
		target := binary.LittleEndian.Uint32(b[i+1:])
		var distance uint32
		for {
			distance = target - uint32(i+5)
			if recent == 0 {
				break
			}
			shift := span(recent) * 8
			if !near(byte(distance >> (24 - shift))) {
				break
			}
			target = distance ^ (1<<(32-shift) - 1)
		}
		distance &= 0x01ffffff
		distance |= -(distance & 0x01000000) // sign
		binary.LittleEndian.PutUint32(b[i+1:], distance)
		i += 4
	}
}

// span is how many of an operand's bytes lie between an opcode in recent and the present one.
func span(recent uint32) int {
	switch {
	case recent >= 4:
		return 3
	case recent >= 2:
		return 2
	}
	return int(recent)
}
