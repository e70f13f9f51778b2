package volume

import "errors"

// dirtySet is a set of chunks.
type dirtySet struct {
	bits []uint64
	list []uint32
}

func (d *dirtySet) init(chunks int64) { *d = dirtySet{bits: make([]uint64, (chunks+63)/64)} }

func (d *dirtySet) add(c int64) {
	if w := &d.bits[c/64]; *w>>(c%64)&1 == 0 {
		*w |= 1 << (c % 64)
		d.list = append(d.list, uint32(c))
	}
}

// take empties the set and returns what was in it.
func (d *dirtySet) take() []uint32 {
	list := d.list
	for _, c := range list {
		d.bits[c/64] = 0
	}
	d.list = nil
	return list
}

// WriteAt puts p on the disk at off. It is durable after the next Flush.
func (v *Volume) WriteAt(p []byte, off int64) (int, error) {
	if err := v.checkRange(off, int64(len(p))); err != nil {
		return 0, err
	}
	if len(p) == 0 {
		return 0, nil
	}
	v.write.Lock()
	defer v.write.Unlock()
	if err := v.writable(); err != nil {
		return 0, err
	}
	if err := v.store(p, off); err != nil {
		return 0, err
	}
	v.stats.writes.Add(1)
	v.stats.writtenBytes.Add(int64(len(p)))
	if v.o.Observer != nil {
		v.o.Observer.Written(off, p)
	}
	return len(p), nil
}

// store writes p to the overlay and marks its blocks. Data comes before the mark, so a reader never finds a block of
// which only a part is there.
func (v *Volume) store(p []byte, off int64) error {
	first, last := off/BlockSize, (off+int64(len(p))-1)/BlockSize
	src, n := v.m.run(first, last-first+1)
	fresh := src != v.topSrc || n != last-first+1
	if fresh {
		if err := v.fillEdges(off, off+int64(len(p))); err != nil {
			return err
		}
	}
	v.written++
	for c := first / chunkBlocks; c <= last/chunkBlocks; c++ {
		v.touched.add(c)
	}
	if err := v.put(p, off); err != nil {
		return err
	}
	if fresh {
		return v.mark(first, last-first+1, v.topSrc)
	}
	return nil
}

func (v *Volume) put(p []byte, off int64) error {
	return v.stall.try(func() error {
		_, err := v.top.f.WriteAt(p, v.top.geo.dataOff+off)
		return err
	})
}

// fillEdges completes the blocks that a write from off to end covers in part and the overlay does not have yet.
func (v *Volume) fillEdges(off, end int64) error {
	first, last := off/BlockSize, (end-1)/BlockSize
	if off%BlockSize != 0 || (first == last && end%BlockSize != 0) {
		if err := v.copyUp(first); err != nil {
			return err
		}
	}
	if last != first && end%BlockSize != 0 {
		return v.copyUp(last)
	}
	return nil
}

// copyUp writes block b into the overlay as the layers below have it, but does not mark it.
func (v *Volume) copyUp(b int64) error {
	if v.m.at(b) == v.topSrc {
		return nil
	}
	var buf [BlockSize]byte
	p := buf[:]
	e := v.extent(b*BlockSize, BlockSize)
	if e.f != nil {
		if err := v.stall.try(func() error { return readFull(e.f, p, e.at) }); err != nil {
			return err
		}
	}
	return v.put(p, b*BlockSize)
}

// mark gives blocks a new source. The caller holds write.
func (v *Volume) mark(b, n int64, src uint8) error {
	v.mapMu.Lock()
	v.m.set(b, n, src)
	v.mapMu.Unlock()
	for c := b / chunkBlocks; c <= (b+n-1)/chunkBlocks; c++ {
		v.dirty.add(c)
	}
	return v.putLive(b/chunkBlocks, (b+n-1)/chunkBlocks)
}

// Trim tells that the guest has no use for a range: whole blocks in it read as zeros from now on and their room is
// given back. What is left over at the ends stays.
func (v *Volume) Trim(off, n int64) error {
	if err := v.checkRange(off, n); err != nil {
		return err
	}
	v.write.Lock()
	defer v.write.Unlock()
	if err := v.writable(); err != nil {
		return err
	}
	first, end := (off+BlockSize-1)/BlockSize, v.wholeEnd(off+n)
	if first < end {
		if err := v.zeroBlocks(first, end-first); err != nil {
			return err
		}
	}
	v.stats.trims.Add(1)
	if v.o.Observer != nil {
		v.o.Observer.Trimmed(off, n)
	}
	return nil
}

// wholeEnd is the first block that a range ending at end does not wholly cover; the disk's last may be short.
func (v *Volume) wholeEnd(end int64) int64 {
	if end == v.size {
		return (end + BlockSize - 1) / BlockSize
	}
	return end / BlockSize
}

// WriteZeroes makes a range read as zeros. With allocate it takes room for them, so that a later write finds it.
func (v *Volume) WriteZeroes(off, n int64, allocate bool) error {
	if err := v.checkRange(off, n); err != nil || n == 0 {
		return err
	}
	v.write.Lock()
	defer v.write.Unlock()
	if err := v.writable(); err != nil {
		return err
	}
	if err := v.zeroRange(off, off+n, allocate); err != nil {
		return err
	}
	v.stats.zeroes.Add(1)
	if v.o.Observer != nil {
		v.o.Observer.Zeroed(off, n)
	}
	return nil
}

func (v *Volume) zeroRange(off, end int64, allocate bool) error {
	first, last := (off+BlockSize-1)/BlockSize, v.wholeEnd(end)
	if first >= last {
		return v.storeZeroes(off, end)
	}
	if err := v.storeZeroes(off, min(end, first*BlockSize)); err != nil {
		return err
	}
	if err := v.storeZeroes(last*BlockSize, end); err != nil {
		return err
	}
	if allocate {
		return v.allocateZeroes(first, last-first)
	}
	return v.zeroBlocks(first, last-first)
}

// storeZeroes writes zeros as data, less than two blocks of them.
func (v *Volume) storeZeroes(off, end int64) error {
	if off >= end {
		return nil
	}
	var zero [2 * BlockSize]byte
	return v.store(zero[:end-off], off)
}

// zeroBlocks marks blocks as zeros and then punches them out: in that order a power cut leaves the old or zeros.
func (v *Volume) zeroBlocks(b, n int64) error {
	for end := b + n; b < end; {
		src, k := v.m.run(b, end-b)
		if src != srcNone && src != srcZero {
			v.written++
			if err := v.mark(b, k, srcZero); err != nil {
				return err
			}
			if src == v.topSrc {
				if err := v.punch(b, k); err != nil {
					return err
				}
			}
		}
		b += k
	}
	return nil
}

func (v *Volume) punch(b, n int64) error {
	return v.stall.try(func() error {
		err := v.top.f.Punch(v.top.geo.dataOff+b*BlockSize, n*BlockSize)
		if errors.Is(err, errNoPunch) {
			return nil // the map says zeros: only the room is not given back
		}
		return err
	})
}

// allocateZeroes writes zeros in pieces.
func (v *Volume) allocateZeroes(b, n int64) error {
	zero := make([]byte, min(n*BlockSize, 256<<10))
	for off, end := b*BlockSize, min((b+n)*BlockSize, v.size); off < end; {
		k := min(int64(len(zero)), end-off)
		if err := v.store(zero[:k], off); err != nil {
			return err
		}
		off += k
	}
	return nil
}
