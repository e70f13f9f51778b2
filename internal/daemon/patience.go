package daemon

import (
	"context"
	"io"
	"net"
	"net/http"
	"sync"
	"sync/atomic"
	"time"
)

// bodyTime is how long a client may take over the first message of a call; a stream's later ones have all the time.
const bodyTime = 30 * time.Second

// limited bounds the connections that are open at one time. One more takes the place of the one that has asked for
// nothing for longest; where all are being served, it is closed at once.
type limited struct {
	net.Listener
	mu   sync.Mutex
	open map[*client]bool
}

// client is one connection to the API.
type client struct {
	net.Conn
	of      *limited
	serving atomic.Int32 // calls that run
	last    atomic.Int64 // when it connected, or its last call ended, in nanoseconds since 1970
}

func (l *limited) Accept() (net.Conn, error) {
	for {
		conn, err := l.Listener.Accept()
		if err != nil {
			return nil, err
		}
		c := &client{Conn: conn, of: l}
		c.last.Store(time.Now().UnixNano())
		out, ok := l.admit(c)
		if out != nil {
			out.Close()
		}
		if ok {
			return c, nil
		}
		conn.Close()
	}
}

// admit lets c in, and names who has to go for it.
func (l *limited) admit(c *client) (out *client, ok bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if len(l.open) >= maxConnections {
		if out = l.idlest(); out == nil {
			return nil, false
		}
		delete(l.open, out)
	}
	l.open[c] = true
	return out, true
}

func (l *limited) idlest() (out *client) {
	for c := range l.open {
		if c.serving.Load() == 0 && (out == nil || c.last.Load() < out.last.Load()) {
			out = c
		}
	}
	return out
}

func (c *client) Close() error {
	c.of.mu.Lock()
	delete(c.of.open, c)
	c.of.mu.Unlock()
	return c.Conn.Close()
}

type clientKey struct{}

type bodyKey struct{}

// attentive gives each call's body its time, and knows which connections are being served.
func attentive(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if c, ok := r.Context().Value(clientKey{}).(*client); ok {
			c.serving.Add(1)
			defer func() {
				c.last.Store(time.Now().UnixNano())
				c.serving.Add(-1)
			}()
		}
		b := &body{ReadCloser: r.Body, control: http.NewResponseController(w)}
		b.control.SetReadDeadline(time.Now().Add(bodyTime))
		r = r.WithContext(context.WithValue(r.Context(), bodyKey{}, b))
		r.Body = b
		next.ServeHTTP(w, r)
	})
}

// body is a request's, with a deadline until it is there.
type body struct {
	io.ReadCloser
	control *http.ResponseController
	once    sync.Once
}

func (b *body) Read(p []byte) (int, error) {
	n, err := b.ReadCloser.Read(p)
	if err == io.EOF {
		b.arrived()
	}
	return n, err
}

// arrived lifts the deadline: on HTTP/1 it would end the call, however long that takes.
func (b *body) arrived() { b.once.Do(func() { b.control.SetReadDeadline(time.Time{}) }) }

// arrived is told of a stream's first message: the rest of the body may take as long as the stream.
func arrived(ctx context.Context) {
	if b, ok := ctx.Value(bodyKey{}).(*body); ok {
		b.arrived()
	}
}
