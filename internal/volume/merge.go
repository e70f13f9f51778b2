package volume

import (
	"errors"
	"fmt"
	"os"
)

// ErrNotMine is returned for a layer that can't take the place of any of the chain's.
var ErrNotMine = errors.New("the layer is not made of layers of this chain")

// Replace puts a frozen layer that Flatten has made in the place of those it is made of, while requests go on: it has the id of the
// topmost of them and the parent of the lowest, by which they are found. It returns how many layers the chain is shorter by; the
// volume takes the file over. The files that are replaced close by themselves when no request reads them any more.
func (v *Volume) Replace(merged *os.File) (fewer int, err error) {
	n, err := v.replaceLayers(hostFile(merged))
	if err != nil {
		return 0, fmt.Errorf("replace layers: %w", err)
	}
	return n, nil
}

func (v *Volume) replaceLayers(f file) (int, error) {
	l, err := openLayer(f)
	switch {
	case err != nil:
		return 0, err
	case l.state != layerFrozen:
		return 0, ErrNotFrozen
	}
	has := newBlockMap(l.size)
	if err := l.loadMap(func(c int64, st []byte) { has.apply(c, st, 1, srcNone) }); err != nil {
		return 0, err
	}
	v.flush.Lock()
	defer v.flush.Unlock()
	if err := v.settle(); err != nil {
		return 0, err
	}
	v.write.Lock()
	defer v.write.Unlock()
	if v.closed.Load() {
		return 0, ErrClosed
	}
	v.mapMu.Lock()
	defer v.mapMu.Unlock()
	low, high, err := v.place(l)
	if err != nil {
		return 0, err
	}
	if err := v.m.covered(has, uint8(low+1), uint8(high+1)); err != nil {
		return 0, err
	}
	v.m.renumber(merging(uint8(low+1), uint8(high+1)))
	chain := append([]*layer(nil), v.chain[:low]...)
	v.chain = append(append(chain, l), v.chain[high+1:]...)
	if v.top != nil {
		v.topSrc = uint8(len(v.chain))
	}
	return high - low, nil
}

// place finds which layers of the chain, from low to high, the new one is made of. The caller holds mapMu.
func (v *Volume) place(l *layer) (low, high int, err error) {
	high = -1
	for i, c := range v.chain {
		if c.id == l.id && c != v.top {
			high = i
		}
	}
	for low = high; low >= 0 && v.chain[low].parent != l.parent; low-- {
	}
	if high < 0 || low < 0 || v.chain[high].size != l.size {
		return 0, 0, ErrNotMine
	}
	for _, c := range v.chain[low : high+1] {
		if c.geo.dataOff != l.geo.dataOff {
			return 0, 0, fmt.Errorf("%w: its blocks lie elsewhere", ErrNotMine)
		}
	}
	return low, high, nil
}

// merging numbers the sources anew where those from low to high become one.
func merging(low, high uint8) (to [256]uint8) {
	for s := range to {
		switch s := uint8(s); {
		case s == srcZero || s < low:
			to[s] = s
		case s <= high:
			to[s] = low
		default:
			to[s] = s - (high - low)
		}
	}
	return to
}

// covered says whether every block whose source is from low to high is one that has holds.
func (m *blockMap) covered(has *blockMap, low, high uint8) error {
	for b := int64(0); b < m.blocks; {
		src, n := m.run(b, m.blocks-b)
		if src >= low && src <= high && src != srcZero {
			if b+n > has.blocks {
				return fmt.Errorf("%w: it is too short", ErrNotMine)
			}
			if held, k := has.run(b, n); held != 1 || k < n {
				return fmt.Errorf("%w: it lacks a block", ErrNotMine)
			}
		}
		b += n
	}
	return nil
}

// renumber gives every block the source that to says.
func (m *blockMap) renumber(to [256]uint8) {
	for c, e := range m.chunks {
		if e&paged == 0 {
			m.chunks[c] = uint32(to[uint8(e)])
			continue
		}
		pg := m.pages[e&^paged]
		for i, s := range pg {
			pg[i] = to[s]
		}
		if uniform(pg[:]) == pg[0] && pg[0] != 0xff {
			m.free = append(m.free, e&^paged)
			m.chunks[c] = uint32(pg[0])
		}
	}
}
