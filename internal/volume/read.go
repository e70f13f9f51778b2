package volume

import "errors"

// ReadAt fills p from the disk at off.
func (v *Volume) ReadAt(p []byte, off int64) (int, error) {
	if err := v.checkRange(off, int64(len(p))); err != nil {
		return 0, err
	}
	v.observeRead(off, int64(len(p)))
	return v.fill(p, off)
}

// fill reads a range that has been checked.
func (v *Volume) fill(p []byte, off int64) (int, error) {
	for done := 0; done < len(p); {
		e := v.extent(off+int64(done), int64(len(p)-done))
		q := p[done : done+int(e.n)]
		if e.f == nil {
			clear(q)
		} else if err := v.stall.try(func() error { return readFull(e.f, q, e.at) }); err != nil {
			return done, err
		}
		done += len(q)
	}
	return len(p), nil
}

// errWait is what a read that may not wait gives when the host would have to fetch the data first.
var errWait = errors.New("not in the page cache")

// nowaiter is a file that can be read without waiting.
type nowaiter interface {
	ReadNowait(p []byte, off int64) error
}

// fillNow is fill without waiting for the host's disk: errWait means that nothing is known of p.
func (v *Volume) fillNow(p []byte, off int64) error {
	for len(p) > 0 {
		e := v.extent(off, int64(len(p)))
		q := p[:e.n]
		if e.f == nil {
			clear(q)
		} else if nw, ok := e.f.(nowaiter); !ok {
			return errWait
		} else if err := nw.ReadNowait(q, e.at); err != nil {
			return errWait // whatever it is, the waiting way finds out and handles it
		}
		p, off = p[e.n:], off+e.n
	}
	return nil
}

func (v *Volume) observeRead(off, n int64) {
	v.stats.reads.Add(1)
	v.stats.readBytes.Add(n)
	if v.o.Observer != nil {
		v.o.Observer.Read(off, n)
	}
}

func readFull(f file, p []byte, off int64) error {
	n, err := f.ReadAt(p, off)
	if n == len(p) {
		return nil
	}
	return err
}

// extent is a run of bytes of the disk that lie together in one file, or are zeros and lie nowhere.
type extent struct {
	f  file // nil: zeros
	at int64
	n  int64
}

// extent finds what the disk has at off, at most n bytes of it.
func (v *Volume) extent(off, n int64) extent {
	b := off / BlockSize
	last := (off + n - 1) / BlockSize
	v.mapMu.RLock()
	src, k := v.m.run(b, last-b+1)
	e := extent{n: min(n, (b+k)*BlockSize-off)}
	if src != srcNone && src != srcZero {
		l := v.chain[src-1]
		e.f, e.at = l.f, l.geo.dataOff+off
	}
	v.mapMu.RUnlock()
	return e
}

// Extent is a run of the disk that is stored, or is zeros and takes no room.
type Extent struct {
	Length int64
	Zero   bool
}

// Extents calls f for the runs of a range, in order, until f returns false.
func (v *Volume) Extents(off, n int64, f func(Extent) bool) error {
	if err := v.checkRange(off, n); err != nil {
		return err
	}
	var cur Extent
	for n > 0 {
		e := v.extent(off, n)
		if cur.Length > 0 && cur.Zero != (e.f == nil) {
			if !f(cur) {
				return nil
			}
			cur = Extent{}
		}
		cur = Extent{cur.Length + e.n, e.f == nil}
		off, n = off+e.n, n-e.n
	}
	if cur.Length > 0 {
		f(cur)
	}
	return nil
}
