package volume

import "sync"

// Flush returns when everything written before it is on stable storage.
//
// The order is the promise: (1) the changed parts of the map are copied, so that the record says nothing of later
// writes; (2) the file is synced, and with it the data those parts speak of; (3) the record is written to the log;
// (4) the file is synced again. Before (4) ends, a power cut leaves the old map over data that is old or new block by
// block, as a disk does; after it, everything is there.
func (v *Volume) Flush() error {
	v.flush.Lock()
	defer v.flush.Unlock()
	return v.flushLocked()
}

func (v *Volume) flushLocked() error {
	if err := v.finishHeader(); err != nil {
		return err
	}
	v.write.Lock()
	if v.top == nil || v.closed.Load() {
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

// syncData waits for the overlay's data. After a sync that failed the kernel takes what it could not write for clean, and
// the next sync would succeed over lost data: so all that was written in the touched chunks since the last good sync is
// read back from the page cache and written again first. lock keeps writers out meanwhile; nil where the caller does.
func (v *Volume) syncData(touched []uint32, lock sync.Locker) error {
	failed := false
	return v.stall.try(func() error {
		if failed {
			if err := v.rewrite(touched, lock); err != nil {
				return err
			}
		}
		err := v.top.f.Sync()
		failed = failed || err != nil
		return err
	})
}

func (v *Volume) rewrite(touched []uint32, lock sync.Locker) error {
	if lock != nil {
		lock.Lock()
		defer lock.Unlock()
	}
	buf := make([]byte, chunkBytes)
	for _, c := range touched {
		b, end := int64(c)*chunkBlocks, int64(c)*chunkBlocks+v.m.inChunk(int64(c))
		for b < end {
			src, n := v.m.run(b, end-b)
			if src == v.topSrc {
				p, at := buf[:n*BlockSize], v.top.geo.dataOff+b*BlockSize
				if err := readFull(v.top.f, p, at); err != nil {
					return err
				}
				if _, err := v.top.f.WriteAt(p, at); err != nil {
					return err
				}
			}
			b += n
		}
	}
	return nil
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
	if v.logNext+recordSize(len(w.chunks)) > v.top.geo.logSz {
		w.pages = v.mapPages()
		return w
	}
	w.record = encodeRecord(v.top.generation, v.logSeq, w.chunks, func(c int64, dst []byte) {
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
	if w.pages != nil || w.freeze {
		return v.writeMap(w)
	}
	if w.record == nil {
		return nil
	}
	err := v.stall.try(func() error {
		if _, err := v.top.f.WriteAt(w.record, v.top.geo.logOff+v.logNext); err != nil {
			return err
		}
		return v.top.f.Sync()
	})
	if err != nil {
		return err
	}
	v.stats.records.Add(1)
	v.logNext, v.logSeq = v.logNext+int64(len(w.record)), v.logSeq+1
	return nil
}

// mapImage is one page of the map on its way to the file.
type mapImage struct {
	page int64
	data []byte
}

// mapPages makes the pages of the overlay's whole map, without those that say nothing. The caller holds write.
func (v *Volume) mapPages() []mapImage {
	pages := []mapImage{}
	geo := v.top.geo
	for p := range geo.pages {
		var b []byte
		var st [chunkStates]byte
		for c := p * pageChunks; c < min((p+1)*pageChunks, geo.chunks); c++ {
			if !v.m.states(c, v.topSrc, st[:]) {
				continue
			}
			if b == nil {
				b = make([]byte, pageSize)
			}
			copy(b[(c-p*pageChunks)*chunkStates:], st[:])
		}
		if b != nil {
			pages = append(pages, mapImage{p, b})
		}
	}
	return pages
}

// writeMap folds the log away: the whole map goes to the map area not in use, and after a sync a header of the next
// generation names it. The log's records are of the old generation and thereby void.
func (v *Volume) writeMap(w mapWrite) error {
	h := v.top.header
	h.generation, h.mapWhich = h.generation+1, 1-h.mapWhich
	if w.freeze {
		h.state = layerFrozen
	}
	sum := mapSum(0)
	for _, m := range w.pages {
		sum.add(m.page, encodePage(m.data, m.page, h.generation))
	}
	h.mapSum = uint32(sum)
	err := v.stall.try(func() error {
		if err := v.putPages(h, w.pages); err != nil {
			return err
		}
		return v.top.f.Sync()
	})
	if err != nil {
		return err
	}
	v.stats.checkpoints.Add(1)
	v.pending = &h
	return v.finishHeader()
}

// finishHeader makes the pending header the one in force. Once it may have reached the disk there is no way back: until
// it is known to be there, nothing else may be written to log or maps, so every flush begins here.
func (v *Volume) finishHeader() error {
	if v.pending == nil {
		return nil
	}
	h := *v.pending
	if err := v.stall.try(func() error { return v.putHeader(h) }); err != nil {
		return err
	}
	v.top.header, v.logNext, v.logSeq = h, 0, 0
	v.top.slot, v.pending = 0, nil
	return nil
}

// putHeader writes both slots, one after the other, so that one is whole at any instant and both are in the end. The
// second need not be durable at once: the next flush syncs it, before anything can touch the first again.
func (v *Volume) putHeader(h header) error {
	if err := writeHeader(v.top.f, &h, v.top.slot); err != nil {
		return err
	}
	if err := v.top.f.Sync(); err != nil {
		return err
	}
	if err := writeHeader(v.top.f, &h, 1-v.top.slot); err != nil {
		return err
	}
	if h.state == layerFrozen {
		return v.top.f.Sync()
	}
	return nil
}

// putPages empties the area, since pages of an attempt that a power cut ended may lie there, and fills it.
func (v *Volume) putPages(h header, pages []mapImage) error {
	at := h.geo.mapOff[h.mapWhich]
	if err := zeroArea(v.top.f, at, h.geo.pages*pageSize); err != nil {
		return err
	}
	for _, m := range pages {
		if _, err := v.top.f.WriteAt(m.data, at+m.page*pageSize); err != nil {
			return err
		}
	}
	return nil
}
