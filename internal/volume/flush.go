package volume

import "errors"

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
	if err := v.sync(); err != nil {
		v.uncapture(w)
		return err
	}
	if err := v.commit(w); err != nil {
		v.uncapture(w)
		return err
	}
	v.flushed = upTo
	return nil
}

// sync waits for the overlay's data.
func (v *Volume) sync() error { return v.stall.try(v.top.f.Sync) }

// mapWrite is what a flush has to make durable of the map: a log record, or all of it.
type mapWrite struct {
	chunks []uint32
	record []byte
	pages  []mapImage // set instead of record when the log is full
	freeze bool
}

// capture copies the changed parts of the map. The caller holds write.
func (v *Volume) capture() mapWrite {
	w := mapWrite{chunks: v.dirty.take()}
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

// uncapture gives back what could not be made durable.
func (v *Volume) uncapture(w mapWrite) {
	v.write.Lock()
	for _, c := range w.chunks {
		v.dirty.add(int64(c))
	}
	v.write.Unlock()
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
		if err := v.top.f.Sync(); err != nil {
			return err
		}
		if err := writeHeader(v.top.f, &h); err != nil {
			return err
		}
		return v.top.f.Sync()
	})
	if err != nil {
		return err
	}
	v.stats.checkpoints.Add(1)
	v.top.header, v.logNext, v.logSeq = h, 0, 0
	return nil
}

// putPages empties the area, since pages of an attempt that a power cut ended may lie there, and fills it.
func (v *Volume) putPages(h header, pages []mapImage) error {
	at := h.geo.mapOff[h.mapWhich]
	if err := v.top.f.Punch(at, h.geo.pages*pageSize); errors.Is(err, errNoPunch) {
		zero := make([]byte, pageSize)
		for p := range h.geo.pages {
			if _, err := v.top.f.WriteAt(zero, at+p*pageSize); err != nil {
				return err
			}
		}
	} else if err != nil {
		return err
	}
	for _, m := range pages {
		if _, err := v.top.f.WriteAt(m.data, at+m.page*pageSize); err != nil {
			return err
		}
	}
	return nil
}
