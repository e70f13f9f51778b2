package probe

import (
	"encoding/binary"
	"fmt"

	"vigia/internal/memory"
)

// The ring has copies of what the guest's memory said at points, in the order in which they were reached. QEMU writes it: a copy is
// taken out of it whole before anything in it is looked at.
const (
	copyHead = 16 // size, point, CPU, task
	copySkip = 0xffff
)

// copied is a hit that did not wait.
type copied struct {
	point uint32
	cpu   int
	task  uint64
	what  *memory.Copied
}

// next takes the copy at the ring's tail out of it. more is false where there is none. What is malformed ends the ring: everything up to
// the head is passed over.
func (p *page) next(buf []byte) (c copied, more bool, err error) {
	tail, head := p.u64(atTail), p.u64(atHead)
	for range 2 {
		if tail == head {
			return c, false, nil
		}
		at, left := tail%ringSize, ringSize-tail%ringSize
		if tail%8 != 0 || head-tail > ringSize || left < 8 {
			break
		}
		first := p.u64(2*half + int(at))
		size, point := first&0xffffffff, first>>32&0xffff
		if size%8 != 0 || size == 0 || size > min(left, head-tail) {
			break
		}
		if point == copySkip {
			tail += size
			p.put64(atTail, tail)
			continue
		}
		if size < copyHead || size > memory.MaxCopy {
			break
		}
		b := buf[:copy(buf[:size], p.b[2*half+at:])]
		p.put64(atTail, tail+size)
		c = copied{point: uint32(binary.LittleEndian.Uint16(b[4:])), cpu: int(binary.LittleEndian.Uint16(b[6:])), task: binary.LittleEndian.Uint64(b[8:])}
		c.what, err = memory.ParseCopied(b[copyHead:])
		return c, true, err
	}
	p.put64(atTail, head)
	return c, true, fmt.Errorf("%w: its ring is torn", ErrPage)
}

// recipe writes how to copy, and for which points. Until then they are held.
func (p *page) recipe(steps []memory.Step, points uint64) {
	p.put64(atCopied, 0)
	if len(steps) == 0 || len(steps) > memory.MaxSteps {
		return
	}
	clear(p.b[atRecipe : atRecipe+memory.MaxSteps*memory.StepSize])
	for i, s := range steps {
		s.Put(p.b[atRecipe+i*memory.StepSize:])
	}
	p.put64(atCopied, points)
}
