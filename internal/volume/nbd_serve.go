package volume

import (
	"context"
	"net"
	"runtime"
	"sync"
	"time"
)

// ServeOptions of the NBD server.
type ServeOptions struct {
	Name     string      // of the export; clients may also ask for ""
	MaxConns int         // at one time; 8 if zero. One more is closed at once
	OnError  func(error) // a connection ended because of this; may be nil
	// Simple offers simple replies only. QEMU takes them with a system call less for each read; clients can then not
	// ask which parts of the disk are stored, and zeros are sent as zeros.
	Simple bool
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
	n := negotiator{rw: c, name: o.Name, simple: o.Simple, size: v.size, flags: v.exportFlags()}
	a, err := n.run()
	if err == nil {
		c.SetDeadline(time.Time{})
		err = transmit(ctx, c, v, a)
	}
	if ctx.Err() != nil || left(err) {
		return nil
	}
	return err
}

// transmit answers requests until the client leaves.
func transmit(ctx context.Context, c net.Conn, v *Volume, a agreed) error {
	sock := takeOver(c)
	if sock == nil {
		return newSession(c, nil, v, a).run()
	}
	defer sock.Close()
	stop := context.AfterFunc(ctx, sock.hangUp)
	defer stop()
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	return newSession(sock, sock, v, a).run()
}

func (v *Volume) exportFlags() uint16 {
	f := uint16(txHasFlags | txFlush | txFUA | txDF | txMultiConn)
	if v.ReadOnly() {
		return f | txReadOnly
	}
	return f | txTrim | txWriteZeroes | txFastZero
}
