package volume

import "sync"

// Flush returns when everything written before it is on stable storage.
//
// The order is the promise: (1) the changed parts of the map are copied, so that the record says nothing of later
// writes; (2) the file is synced, and with it the data those parts speak of; (3) the record is written to the log;
// (4) the file is synced again. Before (4) ends, a power cut leaves the old map over data that is old or new block by
// block, as a disk does; after it, everything is there. A layer that a Swap has left behind comes before all of it.
func (v *Volume) Flush() error {
	v.flush.Lock()
	defer v.flush.Unlock()
	return v.flushLocked()
}

func (v *Volume) flushLocked() error {
	if err := v.settle(); err != nil || v.top == nil {
		return err
	}
	v.write.Lock()
	if v.closed.Load() {
		v.write.Unlock()
		return nil
	}
	upTo := v.written
	if upTo == v.flushed {
		v.write.Unlock()
		return nil
	}
	w := v.capture()
	v.write.Unlock()

	v.stats.flushes.Add(1)
	err := v.syncData(w.touched, &v.write)
	if err == nil {
		err = v.commit(w)
	}
	if err != nil {
		v.write.Lock()
		v.uncapture(w)
		v.write.Unlock()
		return err
	}
	v.flushed = upTo
	return nil
}

// syncData waits for the overlay's data. lock keeps writers out while it is written again; nil where the caller does.
func (v *Volume) syncData(touched []uint32, lock sync.Locker) error {
	return v.top.syncData(&v.stall, func(rewrite func(c int64, states []byte) error) error {
		if lock != nil {
			lock.Lock()
			defer lock.Unlock()
		}
		var st [chunkStates]byte
		for _, c := range touched {
			v.m.states(int64(c), v.topSrc, st[:])
			if err := rewrite(int64(c), st[:]); err != nil {
				return err
			}
		}
		return nil
	})
}

// settle brings to an end what an earlier step has left half done: a layer that is being frozen, a header. The caller holds flush.
func (v *Volume) settle() error {
	if v.below != nil {
		if err := v.below.run(); err != nil {
			return err
		}
		v.below = nil
	}
	if v.top == nil {
		return nil
	}
	return v.top.finishHeader(&v.stall)
}

// mapWrite is what a flush has to make durable of the map: a log record, or all of it.
type mapWrite struct {
	touched []uint32 // chunks whose data changed
	chunks  []uint32 // chunks whose map changed
	record  []byte
	pages   []mapImage // set instead of record when the log is full
	freeze  bool
}

// capture copies the changed parts of the map. The caller holds write.
func (v *Volume) capture() mapWrite {
	w := mapWrite{touched: v.touched.take(), chunks: v.dirty.take()}
	if len(w.chunks) == 0 {
		return w
	}
	if v.top.logNext+recordSize(len(w.chunks)) > v.top.geo.logSz {
		w.pages = v.m.mapPages(v.topSrc, v.top.geo)
		return w
	}
	w.record = encodeRecord(v.top.generation, v.top.logSeq, w.chunks, func(c int64, dst []byte) {
		v.m.states(c, v.topSrc, dst)
	})
	return w
}

// uncapture gives back what could not be made durable. The caller holds write.
func (v *Volume) uncapture(w mapWrite) {
	for _, c := range w.chunks {
		v.dirty.add(int64(c))
	}
	for _, c := range w.touched {
		v.touched.add(int64(c))
	}
}

func (v *Volume) commit(w mapWrite) error {
	if w.pages != nil {
		v.stats.checkpoints.Add(1)
		return v.top.fold(w.pages, w.freeze, &v.stall)
	}
	if w.record == nil {
		return nil
	}
	l := v.top
	err := v.stall.try(func() error {
		if _, err := l.f.WriteAt(w.record, l.geo.logOff+l.logNext); err != nil {
			return err
		}
		return l.sync()
	})
	if err != nil {
		return err
	}
	v.stats.records.Add(1)
	l.logNext, l.logSeq = l.logNext+int64(len(w.record)), l.logSeq+1
	return nil
}
