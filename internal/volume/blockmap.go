package volume

import "bytes"

// The sources of a block in the merged map: 1 to MaxLayers are layers, counted from the bottom.
const (
	srcNone = 0   // no layer has it: it reads as zeros
	srcZero = 255 // the overlay says it is zeros
)

type mapPage [chunkBlocks]uint8

// blockMap says for each block of the disk which layer it is read from. A chunk whose blocks all come from one
// source is that source; another has a page with a byte for each block. 2 MiB cost 4 bytes, or 516.
type blockMap struct {
	blocks int64
	chunks []uint32 // paged | index in pages, or the source of the whole chunk
	pages  []*mapPage
	free   []uint32  // pages no chunk uses
	slab   []mapPage // pages not yet given out: they are made 64 at a time
}

const paged = 1 << 31

func newBlockMap(size int64) *blockMap {
	return &blockMap{
		blocks: (size + BlockSize - 1) / BlockSize,
		chunks: make([]uint32, (size+chunkBytes-1)/chunkBytes),
	}
}

// run gives the source of block b and for how many blocks, at most limit, it stays the same.
func (m *blockMap) run(b, limit int64) (src uint8, n int64) {
	src = m.at(b)
	for n = 0; n < limit; {
		c, i := (b+n)/chunkBlocks, (b+n)%chunkBlocks
		e := m.chunks[c]
		if e&paged == 0 {
			if uint8(e) != src {
				return src, n
			}
			n += chunkBlocks - i
			continue
		}
		pg := m.pages[e&^paged]
		for ; i < chunkBlocks && n < limit; i, n = i+1, n+1 {
			if pg[i] != src {
				return src, n
			}
		}
	}
	return src, min(n, limit)
}

func (m *blockMap) at(b int64) uint8 {
	e := m.chunks[b/chunkBlocks]
	if e&paged == 0 {
		return uint8(e)
	}
	return m.pages[e&^paged][b%chunkBlocks]
}

// set gives n blocks from b on the source src.
func (m *blockMap) set(b, n int64, src uint8) {
	for n > 0 {
		c, i := b/chunkBlocks, b%chunkBlocks
		k := min(n, chunkBlocks-i)
		m.setChunk(c, i, k, src)
		b, n = b+k, n-k
	}
}

func (m *blockMap) setChunk(c, i, k int64, src uint8) {
	e := m.chunks[c]
	if e&paged == 0 {
		if uint8(e) == src {
			return
		}
		if k < chunkBlocks {
			fill(m.page(c)[i:i+k], src)
			return
		}
		m.chunks[c] = uint32(src)
		return
	}
	pg := m.pages[e&^paged]
	fill(pg[i:i+k], src)
	if pg[0] == src && pg[chunkBlocks-1] == src && bytes.Count(pg[:], []byte{src}) == chunkBlocks {
		m.free = append(m.free, e&^paged)
		m.chunks[c] = uint32(src)
	}
}

// page turns a uniform chunk into one with a page.
func (m *blockMap) page(c int64) *mapPage {
	var i uint32
	if k := len(m.free); k > 0 {
		i, m.free = m.free[k-1], m.free[:k-1]
	} else {
		i = uint32(len(m.pages))
		if len(m.slab) == 0 {
			m.slab = make([]mapPage, min(64, max(4, len(m.chunks)/8)))
		}
		m.pages = append(m.pages, &m.slab[0])
		m.slab = m.slab[1:]
	}
	fill(m.pages[i][:], uint8(m.chunks[c]))
	m.chunks[c] = paged | i
	return m.pages[i]
}

func fill(p []uint8, v uint8) {
	if v == 0 {
		clear(p)
		return
	}
	if len(p) == 0 {
		return
	}
	p[0] = v
	for n := 1; n < len(p); n *= 2 {
		copy(p[n:], p[:n])
	}
}

// replace turns every block of source old into one of source new.
func (m *blockMap) replace(old, new uint8) {
	for c, e := range m.chunks {
		if e&paged == 0 {
			if uint8(e) == old {
				m.chunks[c] = uint32(new)
			}
			continue
		}
		pg := m.pages[e&^paged]
		for i := bytes.IndexByte(pg[:], old); i >= 0; {
			pg[i] = new
			k := bytes.IndexByte(pg[i+1:], old)
			if k < 0 {
				break
			}
			i += 1 + k
		}
	}
}

// apply lays the states of one layer's chunk over the map.
func (m *blockMap) apply(c int64, states []byte, data, zero uint8) {
	switch uniform(states) {
	case 0x00:
		return
	case 0x55:
		m.set(c*chunkBlocks, m.inChunk(c), data)
		return
	case 0xaa:
		m.set(c*chunkBlocks, m.inChunk(c), zero)
		return
	}
	e := m.chunks[c]
	pg := (*mapPage)(nil)
	if e&paged != 0 {
		pg = m.pages[e&^paged]
	} else {
		pg = m.page(c)
	}
	for i, s := range states {
		switch s {
		case 0x00:
			continue
		case 0x55: // four blocks of data, the common case
			*(*[4]uint8)(pg[4*i:]) = [4]uint8{data, data, data, data}
			continue
		}
		for k := range 4 {
			switch s >> (2 * k) & 3 {
			case stateData:
				pg[4*i+k] = data
			case stateZero:
				pg[4*i+k] = zero
			}
		}
	}
}

// inChunk is how many blocks of the disk lie in chunk c: fewer in the last.
func (m *blockMap) inChunk(c int64) int64 { return min(chunkBlocks, m.blocks-c*chunkBlocks) }

// uniform gives the byte that all of p is, or 0xff.
func uniform(p []byte) byte {
	if p[0] != p[len(p)-1] || bytes.Count(p, p[:1]) != len(p) {
		return 0xff
	}
	return p[0]
}

// states writes into dst what the overlay, whose source is top, has of chunk c, and says if it has anything.
func (m *blockMap) states(c int64, top uint8, dst []byte) bool {
	clear(dst)
	e := m.chunks[c]
	if e&paged == 0 {
		s := stateOf(uint8(e), top)
		if s == stateAbsent {
			return false
		}
		for i := range m.inChunk(c) {
			dst[i/4] |= s << (2 * (i % 4))
		}
		return s != stateAbsent
	}
	any := byte(0)
	for i, src := range m.pages[e&^paged] {
		s := stateOf(src, top)
		dst[i/4] |= s << (2 * (i % 4))
		any |= s
	}
	return any != 0
}

func stateOf(src, top uint8) byte {
	switch src {
	case top:
		return stateData
	case srcZero:
		return stateZero
	}
	return stateAbsent
}

// bytes is about what the map costs in memory.
func (m *blockMap) bytes() int64 {
	return int64(len(m.chunks))*4 + int64(len(m.pages))*(chunkBlocks+8)
}
