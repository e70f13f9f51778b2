package volume

// mapImage is one page of the map on its way to the file.
type mapImage struct {
	page int64
	data []byte
}

// mapPages makes the pages of one layer's whole map, without those that say nothing: src is the layer's source in m.
func (m *blockMap) mapPages(src uint8, geo geometry) []mapImage {
	pages := []mapImage{}
	for p := range geo.pages {
		var b []byte
		var st [chunkStates]byte
		for c := p * pageChunks; c < min((p+1)*pageChunks, geo.chunks); c++ {
			if !m.states(c, src, st[:]) {
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

// sync is a Sync that remembers failing. A sync that failed leaves the kernel taking what it could not write for clean:
// the next would succeed over lost data.
func (l *layer) sync() error {
	err := l.f.Sync()
	l.lost = l.lost || err != nil
	return err
}

// syncData waits for the layer's data. If a sync has failed before, all that was written in the chunks touched since the last good
// one is read back from the page cache and written again first: again calls rewrite for each of them.
func (l *layer) syncData(s *staller, again func(rewrite func(c int64, states []byte) error) error) error {
	return s.try(func() error {
		if l.lost {
			buf := make([]byte, chunkBytes)
			if err := again(func(c int64, st []byte) error { return l.rewrite(c, st, buf) }); err != nil {
				return err
			}
		}
		err := l.sync()
		if err == nil {
			l.lost = false
		}
		return err
	})
}

// rewrite writes what the layer has of a chunk a second time.
func (l *layer) rewrite(c int64, st, buf []byte) error {
	isData := func(i int64) bool { return st[i/4]>>(2*(i%4))&3 == stateData }
	for i := int64(0); i < chunkBlocks; i++ {
		first := i
		for i < chunkBlocks && isData(i) {
			i++
		}
		if i == first {
			continue
		}
		p, at := buf[:(i-first)*BlockSize], l.geo.dataOff+(c*chunkBlocks+first)*BlockSize
		if err := readFull(l.f, p, at); err != nil {
			return err
		}
		if _, err := l.f.WriteAt(p, at); err != nil {
			return err
		}
	}
	return nil
}

// fold puts the log away: the whole map goes to the map area not in use, and after a sync a header of the next
// generation names it. The log's records are of the old generation and thereby void.
func (l *layer) fold(pages []mapImage, freeze bool, s *staller) error {
	h := l.header
	h.generation, h.mapWhich = h.generation+1, 1-h.mapWhich
	if freeze {
		h.state = layerFrozen
	}
	sum := mapSum(0)
	for _, m := range pages {
		sum.add(m.page, encodePage(m.data, m.page, h.generation))
	}
	h.mapSum = uint32(sum)
	err := s.try(func() error {
		if err := l.putPages(h, pages); err != nil {
			return err
		}
		return l.sync()
	})
	if err != nil {
		return err
	}
	l.pending = &h
	return l.finishHeader(s)
}

// finishHeader makes the pending header the one in force. Once it may have reached the disk there is no way back: until
// it is known to be there, nothing else may be written to log or maps, so every flush begins here.
func (l *layer) finishHeader(s *staller) error {
	if l.pending == nil {
		return nil
	}
	h := *l.pending
	if err := s.try(func() error { return l.putHeader(h) }); err != nil {
		return err
	}
	// Readers look at the rest of the header meanwhile, which never changes.
	l.generation, l.state, l.mapWhich, l.mapSum = h.generation, h.state, h.mapWhich, h.mapSum
	l.logNext, l.logSeq, l.slot, l.pending = 0, 0, 0, nil
	return nil
}

// putHeader writes both slots, one after the other, so that one is whole at any instant and both are in the end. The
// second need not be durable at once: the next flush syncs it, before anything can touch the first again.
func (l *layer) putHeader(h header) error {
	if err := writeHeader(l.f, &h, l.slot); err != nil {
		return err
	}
	if err := l.sync(); err != nil {
		return err
	}
	if err := writeHeader(l.f, &h, 1-l.slot); err != nil {
		return err
	}
	if h.state == layerFrozen {
		return l.sync()
	}
	return nil
}

// putPages empties the area, since pages of an attempt that a power cut ended may lie there, and fills it.
func (l *layer) putPages(h header, pages []mapImage) error {
	at := h.geo.mapOff[h.mapWhich]
	if err := zeroArea(l.f, at, h.geo.pages*pageSize); err != nil {
		return err
	}
	for _, m := range pages {
		if _, err := l.f.WriteAt(m.data, at+m.page*pageSize); err != nil {
			return err
		}
	}
	return nil
}
