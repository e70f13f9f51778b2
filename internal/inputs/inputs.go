// Package inputs keeps what entered a machine: what was sent to it, what it was answered, what was typed, which commands came through
// the guest channel. A clone of a checkpoint is given the same again (decision 170).
//
//	gate  ── flows, answers ───▶ Log ──▶ segment files, a ring ──▶ Read ──▶ Script ──▶ gate, guard of a clone
//	guard ── console, commands ▶ Log ──▶ segment files, a ring ──▶
//
// It is kept at the level at which it can be given again: a TCP connection as the bytes that came in on it, and how many the machine
// had sent by then. Frames could not be given again: a machine that goes on from a checkpoint chooses other sequence numbers for its next
// connection.
//
// What is kept is bounded in bytes and in age, the oldest goes first. Nobody waits for it: records go through a queue, and
// one for which there is no room is counted, and told in the log where it is missing. The format is doc/inputs-format.md; it is read as the
// hostile thing it is, since its bytes come from outside and its writer may have been taken over.
package inputs

import (
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"net/netip"
	"time"
)

// ErrFormat is wrapped by the errors of what is no log.
var ErrFormat = errors.New("not a log of inputs")

// Kind is what a record tells.
type Kind uint8

// The kinds. Flow is the number of a flow or call; 0 where there is none.
const (
	Began    Kind = 1  // a run's log, or a new worker's part of it: Flow is when the run began, payload the checkpoint it went on from
	Flowed   Kind = 2  // a flow began: payload is a Flow
	Opened   Kind = 3  // it came to be
	Data     Kind = 4  // bytes, or one datagram
	Closed   Kind = 5  // the outside has said all
	Reset    Kind = 6  // the outside has cut it
	Ended    Kind = 7  // it is over: payload says why
	Answered Kind = 8  // a name was asked for: payload is an Answer
	Typed    Kind = 9  // on the serial line
	Command  Kind = 10 // through the guest channel: payload is the words, each with a 0 behind it; Data is its input
	Copy     Kind = 11 // the same: payload is the mode, 4 bytes, and the path; Data is the file
	Missing  Kind = 12 // records for which there was no room: Flow is how many, Sent their bytes
)

const lastKind = Missing

// Record is one thing that entered, and when.
type Record struct {
	Kind Kind
	Time time.Time
	Flow uint64
	Sent int64 // what the machine had sent on the flow until then: bytes, or datagrams
	Data []byte
}

// The layout of a segment. MaxData bounds a record's payload; longer bytes are several records.
const (
	magic       = "VIGIAIN1"
	headerSize  = 32
	recordHead  = 32
	recordTail  = 4
	MaxData     = 64 << 10
	MinSegment  = 256 << 10
	MaxSegment  = 32 << 20
	MaxSegments = 32
)

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// appendHeader begins a segment.
func appendHeader(b []byte, seq uint64, at time.Time) []byte {
	start := len(b)
	b = append(b, magic...)
	b = binary.LittleEndian.AppendUint64(b, seq)
	b = binary.LittleEndian.AppendUint64(b, uint64(at.UnixNano()))
	b = append(b, 0, 0, 0, 0)
	return binary.LittleEndian.AppendUint32(b, crc32.Checksum(b[start:], castagnoli))
}

func parseHeader(b []byte) (seq uint64, at time.Time, err error) {
	if len(b) < headerSize || string(b[:8]) != magic {
		return 0, at, fmt.Errorf("%w: a segment does not begin as one", ErrFormat)
	}
	if crc32.Checksum(b[:28], castagnoli) != binary.LittleEndian.Uint32(b[28:]) {
		return 0, at, fmt.Errorf("%w: a segment's header is damaged", ErrFormat)
	}
	return binary.LittleEndian.Uint64(b[8:]), time.Unix(0, int64(binary.LittleEndian.Uint64(b[16:]))), nil
}

// appendRecord writes a record as it stands in the segment seq. The sum holds the segment's number: what an older round of the ring has
// left behind is no record of this one.
func appendRecord(b []byte, seq uint64, r *Record) []byte {
	start := len(b)
	b = binary.LittleEndian.AppendUint32(b, uint32(len(r.Data)))
	b = append(b, byte(r.Kind), 0, 0, 0)
	b = binary.LittleEndian.AppendUint64(b, uint64(r.Time.UnixNano()))
	b = binary.LittleEndian.AppendUint64(b, r.Flow)
	b = binary.LittleEndian.AppendUint64(b, uint64(r.Sent))
	b = append(b, r.Data...)
	return binary.LittleEndian.AppendUint32(b, sum(seq, b[start:]))
}

func sum(seq uint64, b []byte) uint32 {
	var s [8]byte
	binary.LittleEndian.PutUint64(s[:], seq)
	return crc32.Update(crc32.Checksum(s[:], castagnoli), castagnoli, b)
}

// parseRecord reads the first record of b; its data lies in b.
func parseRecord(b []byte, seq uint64) (r Record, size int, ok bool) {
	if len(b) < recordHead+recordTail {
		return r, 0, false
	}
	n := binary.LittleEndian.Uint32(b)
	if n > MaxData || len(b) < recordHead+int(n)+recordTail {
		return r, 0, false
	}
	end := recordHead + int(n)
	r.Kind = Kind(b[4])
	if r.Kind == 0 || r.Kind > lastKind || sum(seq, b[:end]) != binary.LittleEndian.Uint32(b[end:]) {
		return r, 0, false
	}
	r.Time = time.Unix(0, int64(binary.LittleEndian.Uint64(b[8:])))
	r.Flow = binary.LittleEndian.Uint64(b[16:])
	r.Sent = int64(binary.LittleEndian.Uint64(b[24:]))
	r.Data = b[recordHead:end:end]
	return r, end + recordTail, r.Sent >= 0
}

// Ends are a flow's: near is the machine's, far the other; client is who really called, where far is a stand-in.
type Ends struct {
	Protocol          uint8 // 6 TCP, 17 UDP, 1 ICMP echo
	In                bool  // the outside began it
	Near, Far, Client netip.AddrPort
}

// Append writes the ends as a Flowed record's payload.
func (e Ends) Append(b []byte) []byte {
	in := byte(0)
	if e.In {
		in = 1
	}
	b = append(b, e.Protocol, in)
	for _, a := range []netip.AddrPort{e.Near, e.Far, e.Client} {
		raw := a.Addr().AsSlice()
		b = append(append(b, byte(len(raw))), raw...)
		b = binary.BigEndian.AppendUint16(b, a.Port())
	}
	return b
}

func parseEnds(b []byte) (e Ends, ok bool) {
	if len(b) < 2 || b[1] > 1 {
		return e, false
	}
	e.Protocol, e.In, b = b[0], b[1] == 1, b[2:]
	for _, a := range []*netip.AddrPort{&e.Near, &e.Far, &e.Client} {
		if len(b) < 1 || len(b) < 1+int(b[0])+2 {
			return e, false
		}
		n := int(b[0])
		addr, _ := netip.AddrFromSlice(b[1 : 1+n])
		if n != 0 && !addr.IsValid() {
			return e, false
		}
		*a, b = netip.AddrPortFrom(addr, binary.BigEndian.Uint16(b[1+n:])), b[3+n:]
	}
	return e, len(b) == 0
}

// Answer is what a name server answered.
type Answer struct {
	Time        time.Time
	Name        string // lower case, without the last dot
	Type, Class uint16
	Reply       []byte // the whole message
}

// Append writes the answer as a payload.
func (a Answer) Append(b []byte) []byte {
	b = binary.BigEndian.AppendUint16(b, uint16(len(a.Name)))
	b = append(b, a.Name...)
	b = binary.BigEndian.AppendUint16(b, a.Type)
	b = binary.BigEndian.AppendUint16(b, a.Class)
	return append(b, a.Reply...)
}

func parseAnswer(b []byte) (a Answer, ok bool) {
	if len(b) < 2 {
		return a, false
	}
	n := int(binary.BigEndian.Uint16(b))
	if b = b[2:]; n > 255 || len(b) < n+4 {
		return a, false
	}
	a.Name, b = string(b[:n]), b[n:]
	a.Type, a.Class, a.Reply = binary.BigEndian.Uint16(b), binary.BigEndian.Uint16(b[2:]), b[4:]
	return a, true
}
