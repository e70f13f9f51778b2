package volume

// Shares says whether a range of two disks is known to hold the same, because each of its blocks comes from one layer that both have, or
// from none. It reads nothing; false says nothing.
func (v *Volume) Shares(o *Volume, off, n int64) bool {
	if v.checkRange(off, n) != nil || o.checkRange(off, n) != nil {
		return false
	}
	for n > 0 {
		mine, k := v.sourceAt(off, n)
		theirs, l := o.sourceAt(off, min(n, k))
		if mine != theirs {
			return false
		}
		off, n = off+l, n-l
	}
	return true
}

// sourceAt is the id of the layer that a range begins in, zero for none, and how far it is the same.
func (v *Volume) sourceAt(off, n int64) (ID, int64) {
	b, last := off/BlockSize, (off+n-1)/BlockSize
	v.mapMu.RLock()
	defer v.mapMu.RUnlock()
	src, k := v.m.run(b, last-b+1)
	var id ID
	if src != srcNone && src != srcZero {
		id = v.chain[src-1].id
	}
	return id, min(n, (b+k)*BlockSize-off)
}
