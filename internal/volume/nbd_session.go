package volume

import (
	"encoding/binary"
	"fmt"
	"io"
	"sync"
)

// session is the transmission part of one connection. One goroutine takes the requests in order and answers those that
// the page cache can; what has to wait for the host's disk (a flush, a read of cold data) goes to a goroutine of its
// own and is answered when it is done, so that it holds up nothing else.
type session struct {
	v      *Volume
	agreed agreed
	sock   *socket // nil where the connection is something else
	in     inbox
	out    outbox
	slow   chan struct{} // a slot for each request that waits for the disk
	wg     sync.WaitGroup
}

func newSession(c io.ReadWriter, sock *socket, v *Volume, a agreed) *session {
	return &session{
		v: v, agreed: a, sock: sock,
		in:   inbox{r: c, buf: make([]byte, readBufferSize)},
		out:  outbox{w: c, buf: make([]byte, 0, readBufferSize)},
		slow: make(chan struct{}, maxInFlight),
	}
}

func (s *session) run() error {
	defer s.wg.Wait()
	for {
		if !s.in.waiting() {
			if err := s.flushReplies(); err != nil {
				return err
			}
		}
		b, err := s.in.next(requestSize)
		if err != nil {
			return err
		}
		r, err := decodeRequest(b)
		if err != nil {
			return err
		}
		if err := s.serve(r); err != nil {
			return err
		}
	}
}

func (s *session) flushReplies() error {
	s.out.Lock()
	defer s.out.Unlock()
	s.out.send()
	return s.out.err
}

// serve does one request. Its error is the connection's; the request's own goes into the reply.
func (s *session) serve(r request) error {
	switch r.command {
	case cmdRead:
		return s.read(r)
	case cmdWrite:
		return s.write(r)
	case cmdDisc:
		return errDone
	case cmdFlush:
		s.later(r, s.v.Flush)
		return nil
	case cmdTrim:
		s.finish(r, s.withRange(r, cmdFlagFUA, func() error { return s.v.Trim(int64(r.off), int64(r.n)) }))
		return nil
	case cmdWriteZeroes:
		s.finish(r, s.withRange(r, cmdFlagFUA|cmdFlagNoHole|cmdFlagFastZero, func() error { return s.zero(r) }))
		return nil
	case cmdBlockStatus:
		return s.blockStatus(r)
	}
	s.reply(r, errBadRequest)
	return nil
}

// withRange checks flags and range before it calls f.
func (s *session) withRange(r request, flags uint16, f func() error) error {
	if r.flags&^flags != 0 {
		return errBadRequest
	}
	if r.off > uint64(s.v.size) {
		return ErrRange
	}
	if err := s.v.checkRange(int64(r.off), int64(r.n)); err != nil {
		return err
	}
	return f()
}

// zero refuses to be fast where it would have to write the zeros.
func (s *session) zero(r request) error {
	allocate := r.flags&cmdFlagNoHole != 0
	if allocate && r.flags&cmdFlagFastZero != 0 {
		return errUnsupported
	}
	return s.v.WriteZeroes(int64(r.off), int64(r.n), allocate)
}

// finish answers a request that changed the disk, after a flush if that was asked for.
func (s *session) finish(r request, err error) {
	if err == nil && r.flags&cmdFlagFUA != 0 {
		s.later(r, s.v.Flush)
		return
	}
	s.reply(r, err)
}

// later runs f beside the connection and answers with what it gives.
func (s *session) later(r request, f func() error) {
	s.slow <- struct{}{}
	s.wg.Go(func() {
		s.replyNow(r, f())
		<-s.slow
	})
}

func (s *session) replyNow(r request, err error) {
	s.reply(r, err)
	s.flushReplies()
}

func (s *session) reply(r request, err error) {
	s.out.Lock()
	defer s.out.Unlock()
	s.putReply(r, err)
}

// putReply answers a request that has no data to give. The caller holds out.
func (s *session) putReply(r request, err error) {
	if !s.agreed.structured {
		putSimple(s.out.room(simpleSize), r.cookie, nbdErrno(err))
		return
	}
	if err == nil {
		putChunk(s.out.room(structuredSize), chunkFlagDone, chunkNone, r.cookie, 0)
		return
	}
	b := s.out.room(structuredSize + 6)
	putChunk(b, chunkFlagDone, chunkError, r.cookie, 6)
	binary.BigEndian.PutUint32(b[structuredSize:], nbdErrno(err))
	binary.BigEndian.PutUint16(b[structuredSize+4:], 0)
}

// write takes the payload in pieces that end on block boundaries.
func (s *session) write(r request) error {
	err := s.withRange(r, cmdFlagFUA, func() error { return nil })
	for off, n := int64(r.off), int64(r.n); n > 0; {
		k := min(n, pieceSize-off&(BlockSize-1))
		b, rerr := s.in.next(int(k))
		if rerr != nil {
			return fmt.Errorf("payload of a write: %w", rerr)
		}
		if err == nil {
			_, err = s.v.WriteAt(b, off)
		}
		off, n = off+k, n-k
	}
	s.finish(r, err)
	return nil
}

// blockStatus tells which parts of a range are stored.
func (s *session) blockStatus(r request) error {
	var ext []Extent
	err := s.withRange(r, cmdFlagReqOne, func() error {
		if !s.agreed.allocation || r.n == 0 {
			return errBadRequest
		}
		limit := maxExtents
		if r.flags&cmdFlagReqOne != 0 {
			limit = 1
		}
		return s.v.Extents(int64(r.off), int64(r.n), func(e Extent) bool {
			ext = append(ext, e)
			return len(ext) < limit
		})
	})
	s.out.Lock()
	defer s.out.Unlock()
	if err != nil {
		s.putReply(r, err)
		return nil
	}
	b := s.out.room(structuredSize + 4 + 8*len(ext))
	putChunk(b, chunkFlagDone, chunkBlockStatus, r.cookie, 4+8*len(ext))
	binary.BigEndian.PutUint32(b[structuredSize:], metaContextID)
	for i, e := range ext {
		p := b[structuredSize+4+8*i:]
		binary.BigEndian.PutUint32(p, uint32(e.Length))
		status := uint32(0)
		if e.Zero {
			status = statusHole | statusZero
		}
		binary.BigEndian.PutUint32(p[4:], status)
	}
	return nil
}
