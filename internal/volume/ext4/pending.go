package ext4

import (
	"math/bits"
	"sync"
)

const (
	// pendingAges is how many commits a written block may wait for its owner. Data are written under the commit before
	// theirs at the earliest.
	pendingAges = 3
	maxPending  = 1024 // maps of 512 bytes in an age
)

type blockSet [chunkBlocks / 64]uint64

// pending holds the blocks that were written while nobody owned them.
type pending struct {
	mu    sync.Mutex
	ages  [pendingAges]map[uint64]*blockSet // youngest first
	drops uint64
}

func (p *pending) add(b, end uint64) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.ages[0] == nil {
		p.ages[0] = map[uint64]*blockSet{}
	}
	for b < end {
		set := p.ages[0][b>>chunkShift]
		if set == nil {
			if len(p.ages[0]) >= maxPending {
				p.drops += end - b
				return
			}
			set = new(blockSet)
			p.ages[0][b>>chunkShift] = set
		}
		for stop := min(end, (b>>chunkShift+1)<<chunkShift); b < stop; b++ {
			i := b & (chunkBlocks - 1)
			set[i/64] |= 1 << (i % 64)
		}
	}
}

// take returns how many of the blocks b..end were written, and forgets them.
func (p *pending) take(b, end uint64) uint64 {
	p.mu.Lock()
	defer p.mu.Unlock()
	n := uint64(0)
	for _, age := range p.ages {
		if len(age) == 0 {
			continue
		}
		for at := b; at < end; {
			stop := min(end, (at>>chunkShift+1)<<chunkShift)
			set := age[at>>chunkShift]
			for ; set != nil && at < stop; at++ {
				i := at & (chunkBlocks - 1)
				n += set[i/64] >> (i % 64) & 1
				set[i/64] &^= 1 << (i % 64)
			}
			at = stop
		}
	}
	return n
}

// turn is called after each commit: blocks that waited too long are dropped.
func (p *pending) turn() {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, set := range p.ages[pendingAges-1] {
		for _, w := range set {
			p.drops += uint64(bits.OnesCount64(w))
		}
	}
	copy(p.ages[1:], p.ages[:pendingAges-1])
	p.ages[0] = nil
}

func (p *pending) lost() uint64 {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.drops
}
