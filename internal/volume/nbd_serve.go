package volume

import (
	"context"
	"errors"
	"io"
	"net"
	"sync"
	"time"
)

// ServeOptions of the NBD server.
type ServeOptions struct {
	Name     string      // of the export; clients may also ask for ""
	MaxConns int         // at one time; 8 if zero. One more is closed at once
	OnError  func(error) // a connection ended because of this; may be nil
}

// Serve answers NBD clients on l until ctx ends, then closes l and every connection and waits for them.
func Serve(ctx context.Context, l net.Listener, v *Volume, o ServeOptions) error {
	if o.MaxConns <= 0 {
		o.MaxConns = 8
	}
	stop := context.AfterFunc(ctx, func() { l.Close() })
	defer stop()
	var wg sync.WaitGroup
	defer wg.Wait()
	slots := make(chan struct{}, o.MaxConns)
	for {
		c, err := l.Accept()
		if err != nil {
			if ctx.Err() != nil {
				return nil
			}
			return err
		}
		select {
		case slots <- struct{}{}:
		default:
			c.Close()
			continue
		}
		wg.Go(func() {
			defer func() { <-slots }()
			if err := ServeConn(ctx, c, v, o); err != nil && o.OnError != nil {
				o.OnError(err)
			}
		})
	}
}

// negotiationTime is how long a client may take to begin.
const negotiationTime = 30 * time.Second

// ServeConn answers one client until it leaves or ctx ends, and closes c. A client that leaves is no error.
func ServeConn(ctx context.Context, c net.Conn, v *Volume, o ServeOptions) error {
	defer c.Close()
	stop := context.AfterFunc(ctx, func() {
		c.Close()
		v.stall.interrupt()
	})
	defer stop()
	c.SetDeadline(time.Now().Add(negotiationTime))
	n := negotiator{rw: c, name: o.Name, size: v.size, flags: v.exportFlags()}
	a, err := n.run()
	if err == nil {
		c.SetDeadline(time.Time{})
		err = newSession(c, v, a).run()
	}
	if ctx.Err() != nil || errors.Is(err, errDone) || errors.Is(err, io.EOF) || errors.Is(err, net.ErrClosed) {
		return nil
	}
	return err
}

func (v *Volume) exportFlags() uint16 {
	f := uint16(txHasFlags | txFlush | txFUA | txDF | txMultiConn)
	if v.ReadOnly() {
		return f | txReadOnly
	}
	return f | txTrim | txWriteZeroes | txFastZero
}
