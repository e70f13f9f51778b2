package volume

import (
	"encoding/binary"
	"errors"
	"fmt"
)

// read answers a READ from the page cache where that has all of it, and beside the connection where it has not.
func (s *session) read(r request) error {
	err := s.withRange(r, cmdFlagDF, func() error {
		if r.n == 0 || r.n > maxPayload {
			return errBadRequest
		}
		return nil
	})
	if err != nil {
		s.reply(r, err)
		return nil
	}
	off, n := int64(r.off), int64(r.n)
	s.v.observeRead(off, n)
	s.out.Lock()
	if n >= sendfileMin && s.sock != nil {
		defer s.out.Unlock()
		return s.sendPieces(r)
	}
	if n > pieceSize {
		defer s.out.Unlock()
		return s.readPieces(r)
	}
	err = s.readNow(r)
	s.out.Unlock()
	if errors.Is(err, errWait) {
		s.readLater(r)
		return nil
	}
	return err
}

// readHeader is the length of what comes before the data of a read's reply.
func (s *session) readHeader() int {
	if s.agreed.structured {
		return dataChunkSize
	}
	return simpleSize
}

func (s *session) putReadHeader(b []byte, r request, flags uint16, off int64, n int) {
	if !s.agreed.structured {
		putSimple(b, r.cookie, 0)
		return
	}
	putChunk(b, flags, chunkOffsetData, r.cookie, 8+n)
	binary.BigEndian.PutUint64(b[structuredSize:], uint64(off))
}

// readNow reads into the reply's own place. The caller holds out.
func (s *session) readNow(r request) error {
	h, n := s.readHeader(), int(r.n)
	b := s.out.room(h + n)
	if err := s.v.fillNow(b[h:], int64(r.off)); err != nil {
		s.out.drop(h + n)
		return err
	}
	s.putReadHeader(b, r, chunkFlagDone, int64(r.off), n)
	return nil
}

// readLater waits for the data without holding up the connection.
func (s *session) readLater(r request) {
	s.v.stats.slowRead.Add(1)
	s.slow <- struct{}{}
	s.wg.Go(func() {
		defer func() { <-s.slow }()
		p := make([]byte, r.n)
		_, err := s.v.fill(p, int64(r.off))
		s.out.Lock()
		defer s.out.Unlock()
		if err != nil {
			s.putReply(r, err)
		} else {
			h := s.readHeader()
			b := s.out.room(h + len(p))
			s.putReadHeader(b, r, chunkFlagDone, int64(r.off), len(p))
			copy(b[h:], p)
		}
		s.out.send()
	})
}

// readPieces sends a long read piece by piece. The caller holds out: nothing may come between the pieces of a simple
// reply, and one long read at a time bounds the memory.
func (s *session) readPieces(r request) error {
	off, end := int64(r.off), int64(r.off)+int64(r.n)
	one := !s.agreed.structured || r.flags&cmdFlagDF != 0 // one header for all of it
	if one {
		s.putReadHeader(s.out.room(s.readHeader()), r, chunkFlagDone, off, int(r.n))
	}
	for off < end {
		n := int(min(end-off, pieceSize))
		h := 0
		if !one {
			h = dataChunkSize
		}
		b := s.out.room(h + n)
		if _, err := s.v.fill(b[h:], off); err != nil {
			s.out.drop(h + n)
			if one {
				return fmt.Errorf("nbd: read failed after its reply had begun: %w", err)
			}
			s.putReply(r, err)
			return s.out.err
		}
		if !one {
			flags := uint16(0)
			if off+int64(n) == end {
				flags = chunkFlagDone
			}
			s.putReadHeader(b, r, flags, off, n)
		}
		off += int64(n)
	}
	return s.out.err
}

// sendPieces sends a long read extent by extent, from the page cache straight into the socket. The caller holds out. An
// error of the host that shows itself after a reply has begun costs the connection: the client comes back and asks again.
func (s *session) sendPieces(r request) error {
	off, end := int64(r.off), int64(r.off)+int64(r.n)
	one := !s.agreed.structured || r.flags&cmdFlagDF != 0
	if one {
		s.putReadHeader(s.out.room(s.readHeader()), r, chunkFlagDone, off, int(r.n))
	}
	for off < end {
		e := s.v.extent(off, end-off)
		if !one {
			flags := uint16(0)
			if off+e.n == end {
				flags = chunkFlagDone
			}
			s.putReadHeader(s.out.room(dataChunkSize), r, flags, off, int(e.n))
		}
		if err := s.sendExtent(e, off); err != nil {
			return err
		}
		off += e.n
	}
	return s.out.err
}

func (s *session) sendExtent(e extent, off int64) error {
	if f, ok := e.f.(*osFile); ok && e.n >= sendfileMin {
		s.out.send()
		if s.out.err != nil {
			return s.out.err
		}
		left, err := s.sock.send(f, e.at, e.n)
		if err == nil || !passing(err) {
			return err
		}
		// The host cannot read its file: the copying way holds the rest until it can.
		off, e.n = off+e.n-left, left
	}
	for n := int64(0); n < e.n; {
		k := min(e.n-n, pieceSize)
		if _, err := s.v.fill(s.out.room(int(k)), off+n); err != nil {
			return err
		}
		n += k
	}
	return nil
}
