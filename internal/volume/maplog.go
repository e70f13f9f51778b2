package volume

import (
	"encoding/binary"
	"hash/crc32"
)

// A log record says what the map is for some chunks. It begins on a block of its own, so writing it touches no
// record before it, and it counts only where generation and sequence are the expected ones and its checksum holds:
// the first that is not so ends the log.
const (
	recordMagic  = 0x474f4c56 // "VLOG"
	recordHeader = 32
	entrySize    = 4 + chunkStates
)

func recordSize(entries int) int64 {
	return (recordHeader + int64(entries)*entrySize + BlockSize - 1) / BlockSize * BlockSize
}

// encodeRecord makes a record of chunks whose states fill has written.
func encodeRecord(generation, seq uint64, chunks []uint32, states func(c int64, dst []byte)) []byte {
	b := make([]byte, recordSize(len(chunks)))
	le := binary.LittleEndian
	le.PutUint32(b, recordMagic)
	le.PutUint64(b[8:], generation)
	le.PutUint64(b[16:], seq)
	le.PutUint32(b[24:], uint32(len(chunks)))
	p := b[recordHeader:]
	for _, c := range chunks {
		le.PutUint32(p, c)
		states(int64(c), p[4:entrySize])
		p = p[entrySize:]
	}
	le.PutUint32(b[4:], crc32.Checksum(b[8:], castagnoli))
	return b
}

// replayLog applies the records of the current generation and finds where the next one goes.
func (l *layer) replayLog(chunk func(c int64, states []byte)) error {
	for l.logNext, l.logSeq = 0, 0; l.logNext < l.geo.logSz; {
		b, ok, err := l.readRecord(l.logNext, l.logSeq)
		if err != nil || !ok {
			return err
		}
		n := int64(binary.LittleEndian.Uint32(b[24:]))
		for p := b[recordHeader:]; n > 0; n, p = n-1, p[entrySize:] {
			c := int64(binary.LittleEndian.Uint32(p))
			if err := l.checkStates(c, p[4:entrySize]); err != nil {
				return err
			}
			chunk(c, p[4:entrySize])
		}
		l.logNext, l.logSeq = l.logNext+int64(len(b)), l.logSeq+1
	}
	return nil
}

func (l *layer) readRecord(at int64, seq uint64) ([]byte, bool, error) {
	le := binary.LittleEndian
	b := make([]byte, BlockSize)
	if _, err := l.f.ReadAt(b, l.geo.logOff+at); err != nil {
		return nil, false, err
	}
	n := int64(le.Uint32(b[24:]))
	if le.Uint32(b) != recordMagic || le.Uint64(b[8:]) != l.generation || le.Uint64(b[16:]) != seq ||
		n == 0 || n > l.geo.chunks {
		return nil, false, nil
	}
	size := recordSize(int(n))
	if size > l.geo.logSz-at {
		return nil, false, nil
	}
	if size > BlockSize {
		b = append(b, make([]byte, size-BlockSize)...)
		if _, err := l.f.ReadAt(b[BlockSize:], l.geo.logOff+at+BlockSize); err != nil {
			return nil, false, err
		}
	}
	return b, le.Uint32(b[4:]) == crc32.Checksum(b[8:], castagnoli), nil
}
