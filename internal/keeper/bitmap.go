package keeper

import "math/bits"

// bitmap is a set of pages.
type bitmap []uint64

func newBitmap(pages uint64) bitmap { return make(bitmap, (pages+63)/64) }

func (b bitmap) has(p uint64) bool { return b[p/64]&(1<<(p%64)) != 0 }
func (b bitmap) add(p uint64)      { b[p/64] |= 1 << (p % 64) }
func (b bitmap) del(p uint64)      { b[p/64] &^= 1 << (p % 64) }

// fill adds the first n pages.
func (b bitmap) fill(n uint64) {
	for p := uint64(0); p < n; p++ {
		if p%64 == 0 && n-p >= 64 {
			b[p/64] = ^uint64(0)
			p += 63
			continue
		}
		b.add(p)
	}
}

func (b bitmap) count() (n int) {
	for _, w := range b {
		n += bits.OnesCount64(w)
	}
	return n
}

// next returns the first run of at most most pages at or after p; n is 0 where there is none.
func (b bitmap) next(p, most uint64) (first, n uint64) {
	end := uint64(len(b)) * 64
	for p < end {
		w := b[p/64] >> (p % 64)
		if w == 0 {
			p = (p/64 + 1) * 64
			continue
		}
		p += uint64(bits.TrailingZeros64(w))
		for n < most && p+n < end && b.has(p+n) {
			n++
		}
		return p, n
	}
	return end, 0
}
