package network

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
)

// maxFrame is the longest frame that QEMU takes or sends, NET_BUFSIZE.
const maxFrame = 4096 + 65536

// ErrFraming means that the length before a frame can't be true, so the stream can't be followed any more.
var ErrFraming = errors.New("frame stream is out of step")

// frameReader takes frames off a stream in big gulps.
type frameReader struct {
	r          io.Reader
	buf        []byte
	start, end int
}

// readBuffer holds many small frames, or at least three of the longest.
const readBuffer = 256 << 10

func newFrameReader(r io.Reader) *frameReader {
	return &frameReader{r: r, buf: make([]byte, readBuffer)}
}

// next returns the next frame, which is valid until the call after. io.EOF means the stream ended between two frames.
func (f *frameReader) next() ([]byte, error) {
	for {
		frame, size, err := splitFrame(f.buf[f.start:f.end])
		if err != nil {
			return nil, err
		}
		if frame != nil {
			f.start += size
			return frame, nil
		}
		if err := f.fill(size); err != nil {
			return nil, err
		}
	}
}

// ready reports whether next would return without reading.
func (f *frameReader) ready() bool {
	frame, _, err := splitFrame(f.buf[f.start:f.end])
	return frame != nil || err != nil
}

// fill reads more, having made room for size bytes from start on.
func (f *frameReader) fill(size int) error {
	if f.start == f.end {
		f.start, f.end = 0, 0
	} else if f.start+size > len(f.buf) {
		f.end = copy(f.buf, f.buf[f.start:f.end])
		f.start = 0
	}
	n, err := f.r.Read(f.buf[f.end:])
	f.end += n
	switch {
	case n > 0:
		return nil
	case err == io.EOF && f.end > f.start:
		return io.ErrUnexpectedEOF
	case err == nil:
		return io.ErrNoProgress
	}
	return err
}

// splitFrame returns the first whole frame in b and its size with the length before it. A nil frame without an
// error means that b must hold size bytes first.
func splitFrame(b []byte) (frame []byte, size int, err error) {
	if len(b) < 4 {
		return nil, 4, nil
	}
	n := binary.BigEndian.Uint32(b)
	if n == 0 || n > maxFrame {
		return nil, 0, fmt.Errorf("%w: a frame of %d bytes", ErrFraming, n)
	}
	size = 4 + int(n)
	if len(b) < size {
		return nil, size, nil
	}
	return b[4:size:size], size, nil
}
