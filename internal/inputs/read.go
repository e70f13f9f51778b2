package inputs

import (
	"cmp"
	"fmt"
	"io"
	"slices"
	"time"
)

// Kept is a log as it was read: its records in their order, and what is known of those that are not there.
type Kept struct {
	Records []Record
	Dropped bool // older segments were overwritten, or were too old
	Torn    int  // segments whose end can't be read, the newest apart
}

// Segment is a file of a log.
type Segment interface {
	io.ReaderAt
	Size() int64
}

// segment is what a file holds.
type segment struct {
	seq  uint64
	at   time.Time
	body []byte
}

// Read reads a log. An empty file is a segment not yet used; a file that is something else is an error, and a record that can't be read
// ends its segment.
func Read(files []Segment) (Kept, error) {
	var k Kept
	if len(files) > MaxSegments {
		return k, fmt.Errorf("%w: %d segments", ErrFormat, len(files))
	}
	segments, err := load(files)
	if err != nil || len(segments) == 0 {
		return k, err
	}
	k.Dropped = segments[0].seq > 1
	for i, s := range segments {
		if i > 0 && s.seq == segments[i-1].seq {
			return Kept{}, fmt.Errorf("%w: two segments have the number %d", ErrFormat, s.seq)
		}
		k.Dropped = k.Dropped || (i > 0 && s.seq != segments[i-1].seq+1)
		rest := s.body
		for len(rest) > 0 {
			r, size, ok := parseRecord(rest, s.seq)
			if !ok {
				break
			}
			k.Records, rest = append(k.Records, r), rest[size:]
		}
		if len(rest) > 0 && i < len(segments)-1 {
			k.Torn++
		}
	}
	return k, nil
}

func load(files []Segment) (segments []segment, err error) {
	for _, f := range files {
		n := f.Size()
		if n == 0 {
			continue
		}
		if n > MaxSegment+MaxData+headerSize+recordHead+recordTail {
			return nil, fmt.Errorf("%w: a segment of %d bytes", ErrFormat, n)
		}
		b := make([]byte, n)
		got, err := f.ReadAt(b, 0)
		if err != nil && err != io.EOF {
			return nil, err
		}
		if b = b[:got]; len(b) < headerSize {
			continue // its writer ended while it began it
		}
		s := segment{body: b[headerSize:]}
		if s.seq, s.at, err = parseHeader(b); err != nil {
			return nil, err
		}
		segments = append(segments, s)
	}
	slices.SortFunc(segments, func(a, b segment) int { return cmp.Compare(a.seq, b.seq) })
	return segments, nil
}
