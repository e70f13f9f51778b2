package volume

import (
	"io"
	"sync"
)

// inbox reads requests in large gulps and lends their bytes out of its buffer.
type inbox struct {
	r    io.Reader
	buf  []byte
	a, b int // what is unread
}

// next lends the next n bytes, which last until the call after. n is at most the buffer's size.
func (i *inbox) next(n int) ([]byte, error) {
	for i.b-i.a < n {
		if i.a == i.b {
			i.a, i.b = 0, 0
		} else if i.a+n > len(i.buf) {
			i.b = copy(i.buf, i.buf[i.a:i.b])
			i.a = 0
		}
		k, err := i.r.Read(i.buf[i.b:])
		i.b += k
		if k == 0 && err != nil {
			if err == io.EOF && i.b > i.a {
				err = io.ErrUnexpectedEOF
			}
			return nil, err
		}
	}
	p := i.buf[i.a : i.a+n]
	i.a += n
	return p, nil
}

// waiting says that a whole request header, at least, has already been read.
func (i *inbox) waiting() bool { return i.b-i.a >= requestSize }

// outbox gathers replies and sends them together. Its lock is held from the first byte of a reply to its last.
type outbox struct {
	sync.Mutex
	w   io.Writer
	buf []byte
	err error // of the connection: sticks
}

// room lends n bytes at the end of what is to be sent. n is at most the buffer's size.
func (o *outbox) room(n int) []byte {
	if len(o.buf)+n > cap(o.buf) {
		o.send()
	}
	k := len(o.buf)
	o.buf = o.buf[:k+n]
	return o.buf[k:]
}

// drop takes back the last n bytes that room lent.
func (o *outbox) drop(n int) { o.buf = o.buf[:len(o.buf)-n] }

func (o *outbox) send() {
	if len(o.buf) > 0 && o.err == nil {
		_, o.err = o.w.Write(o.buf)
	}
	o.buf = o.buf[:0]
}
