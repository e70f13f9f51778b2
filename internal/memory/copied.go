package memory

import (
	"encoding/binary"
	"errors"
	"fmt"
)

// Copied is what was copied out of a guest at one instant, to be read when the guest has long gone on: pieces of its virtual memory,
// each with its address. Whoever copied it followed a recipe of [Step], and may be the guest's by now: see [ParseCopied].
//
// A Space reads from a copy alone while it is turned to one ([Space.From]): what was not copied is absent.
type Copied struct{ parts []part }

type part struct {
	va    uint64
	bytes []byte
}

// Step is one step of a recipe. There are StepRegisters registers of 64 bits; the first holds a task's address at the beginning, the
// others 0. A step whose base is 0, or whose memory can't be read, is passed over, and what it should load is 0.
type Step struct {
	Op   uint8
	Base uint8  // register
	Dst  uint8  // register
	When uint8  // one of WhenAlways, WhenOpening
	At   uint32 // offset from the base
	Len  uint32 // bytes
	_    uint32
}

// What a step does.
const (
	StepEnd   uint8 = iota
	StepCopy        // copies Len bytes at Base + At
	StepLoad        // the same with 8 bytes, which go into Dst as well
	StepClimb       // copies the names of a path from dentry Dst of mount Base up to the root
	StepText        // copies Len bytes at most of user memory from Base up to Dst; without a NUL at their end on up to register At
)

// When a step is taken.
const (
	WhenAlways  uint8 = iota
	WhenOpening       // at points that opened files pass
)

// Bounds of a copy, which the plugin keeps to.
const (
	StepSize      = 16
	StepRegisters = 16
	MaxSteps      = 64
	MaxCopy       = 16 << 10
)

// Put writes a step as the plugin reads it.
func (s Step) Put(b []byte) {
	b[0], b[1], b[2], b[3] = s.Op, s.Base, s.Dst, s.When
	binary.LittleEndian.PutUint32(b[4:], s.At)
	binary.LittleEndian.PutUint32(b[8:], s.Len)
	binary.LittleEndian.PutUint32(b[12:], 0)
}

// ErrCopy is wrapped where a copy is malformed.
var ErrCopy = errors.New("not a copy of guest memory")

const partHead = 16

// ParseCopied takes a copy apart: each piece is its address (8 bytes), its length (4), 4 bytes of nothing and its bytes, up to a
// multiple of 8. The pieces are not copied: b must not change.
func ParseCopied(b []byte) (*Copied, error) {
	if len(b) > MaxCopy {
		return nil, fmt.Errorf("%w: %d bytes", ErrCopy, len(b))
	}
	c := &Copied{}
	for len(b) > 0 {
		if len(b) < partHead {
			return nil, fmt.Errorf("%w: %d bytes too many", ErrCopy, len(b))
		}
		va, n := binary.LittleEndian.Uint64(b), uint64(binary.LittleEndian.Uint32(b[8:]))
		room := (n + 7) &^ 7
		if b = b[partHead:]; room > uint64(len(b)) || va+n < va {
			return nil, fmt.Errorf("%w: %d bytes at %#x", ErrCopy, n, va)
		}
		c.parts = append(c.parts, part{va, b[:n:n]})
		b = b[room:]
	}
	return c, nil
}

// at returns what was copied from va on, to the end of its piece: nil where nothing was.
func (c *Copied) at(va uint64) []byte {
	for i := range c.parts {
		if p := &c.parts[i]; va-p.va < uint64(len(p.bytes)) {
			return p.bytes[va-p.va:]
		}
	}
	return nil
}

// read fills b from va as far as it was copied.
func (c *Copied) read(va uint64, b []byte) (n int) {
	for n < len(b) {
		have := c.at(va + uint64(n))
		if len(have) == 0 {
			return n
		}
		n += copy(b[n:], have)
	}
	return n
}

// whole returns n bytes at va where they lie in one piece.
func (c *Copied) whole(va, n uint64) []byte {
	for i := range c.parts {
		if p := &c.parts[i]; va-p.va < uint64(len(p.bytes)) && n <= uint64(len(p.bytes))-(va-p.va) {
			return p.bytes[va-p.va:][:n]
		}
	}
	return nil
}

// From makes reads come from a copy, of whichever address space, until From(nil).
func (s *Space) From(c *Copied) { s.copied = c }
