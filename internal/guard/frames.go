package guard

import (
	"bufio"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"hash"
	"io"
	"net"
	"time"

	"vigia/internal/link"
)

// frames digests what goes over the card of a machine that is recorded or replayed. QEMU's filter-mirror shows each frame, with its
// length in four bytes before it (net/filter-mirror.c): the digest of two runs is the same where they sent and were given the
// same frames in the same order.
type frames struct {
	conn  net.Conn
	late  bool // another guard saw those before
	ended chan struct{}

	sum          hash.Hash
	count, bytes int64
	broken       bool
}

// frameMost bounds a frame, in bytes: QEMU's own buffers hold no larger one (NET_BUFSIZE in its net/net.h).
const frameMost = 4096 + 64<<10

func newFrames(conn net.Conn, late bool) *frames {
	return &frames{conn: conn, late: late, ended: make(chan struct{}), sum: sha256.New()}
}

// run reads until QEMU is gone. One that does not keep to the form is read on, so that it does not wait, and not believed.
func (f *frames) run() {
	defer close(f.ended)
	defer f.conn.Close()
	in := bufio.NewReaderSize(f.conn, 256<<10)
	for !f.broken {
		if err := f.take(in); err == io.EOF {
			return
		} else if err != nil {
			f.broken = true
		}
	}
	io.Copy(io.Discard, in)
}

func (f *frames) take(in io.Reader) error {
	var length [4]byte
	if _, err := io.ReadFull(in, length[:]); err != nil {
		return err
	}
	n := int64(binary.BigEndian.Uint32(length[:]))
	if n > frameMost {
		return link.ErrProtocol
	}
	f.sum.Write(length[:])
	if _, err := io.CopyN(f.sum, in, n); err != nil {
		return io.ErrUnexpectedEOF
	}
	f.count, f.bytes = f.count+1, f.bytes+n
	return nil
}

// shown waits for the last frame: the daemon asks when QEMU is gone.
func (g *Guard) shown(ctx context.Context, r link.Request) (link.Response, error) {
	closeFiles(r.Files)
	f := g.frames
	if f == nil {
		return link.Response{Body: link.Shown{}}, nil
	}
	select {
	case <-f.ended:
	case <-ctx.Done():
		return link.Response{}, ctx.Err()
	case <-time.After(3 * time.Second):
		return link.Response{Body: link.Shown{}}, nil
	}
	return link.Response{Body: f.shown()}, nil
}

func (f *frames) shown() link.Shown {
	return link.Shown{Whole: !f.late && !f.broken, Frames: f.count, Bytes: f.bytes, Sum: hex.EncodeToString(f.sum.Sum(nil))}
}
