package main

import (
	"context"
	"fmt"
	"net"
	"strings"
	"time"

	"vigia/internal/api/vigiav1"
)

// line is a serial line with a shell on it, on which marks are timed by the host's clock.
type line struct {
	ctx   context.Context
	send  func(string) error
	said  chan string // closed at the line's end
	close func()
	text  string
	asked int
}

// attach is a machine's line.
func (b *bench) attach(name string) (*line, error) {
	ctx, cancel := context.WithCancel(b.ctx)
	stream := b.Client.Machines.Console(ctx)
	if err := stream.Send(&vigiav1.ConsoleInput{Name: name}); err != nil {
		cancel()
		return nil, err
	}
	l := &line{ctx: ctx, said: make(chan string, 64), close: cancel, send: func(s string) error { return stream.Send(&vigiav1.ConsoleInput{Data: []byte(s)}) }}
	go func() {
		defer close(l.said)
		for {
			out, err := stream.Receive()
			if err != nil {
				return
			}
			select {
			case l.said <- string(out.Data):
			case <-ctx.Done():
				return
			}
		}
	}()
	return l, nil
}

// newLine is a bare QEMU's.
func newLine(ctx context.Context, c net.Conn) *line {
	l := &line{ctx: ctx, said: make(chan string, 64), close: func() { c.Close() }, send: func(s string) error { _, err := c.Write([]byte(s)); return err }}
	c.SetReadDeadline(time.Time{})
	go func() {
		defer close(l.said)
		b := make([]byte, 4096)
		for {
			n, err := c.Read(b)
			if err != nil {
				return
			}
			l.said <- string(b[:n])
		}
	}()
	return l
}

// timed runs a command and says how long it took: between the mark before it and the one behind. The marks are sums, so that the echo of
// what is typed does not have them, and each time others: what was typed too often is heard later. A shell that is not there yet drops what is typed: it is typed until it is heard.
func (l *line) timed(command string) (time.Duration, error) {
	l.asked++
	begin, end := fmt.Sprintf("b%d.", 1000+l.asked), fmt.Sprintf("e%d.", 1000+l.asked)
	for range 12 {
		if err := l.send(fmt.Sprintf("echo b$((1000+%d)).; %s; echo e$((1000+%d)).\n", l.asked, command, l.asked)); err != nil {
			return 0, err
		}
		if at, err := l.until(begin, 30*time.Second); err != nil {
			return 0, err
		} else if !at.IsZero() {
			over, err := l.until(end, 10*time.Minute)
			if err == nil && over.IsZero() {
				err = fmt.Errorf("%q takes too long: %q", command, l.text)
			}
			return over.Sub(at), err
		}
	}
	return 0, fmt.Errorf("no answer on the serial line: %q", l.text)
}

// until says when a mark came; zero where it did not.
func (l *line) until(mark string, most time.Duration) (time.Time, error) {
	deadline := time.After(most)
	for {
		if _, after, ok := strings.Cut(l.text, mark); ok {
			l.text = after
			return time.Now(), nil
		}
		select {
		case s, ok := <-l.said:
			if l.text += s; !ok {
				return time.Time{}, fmt.Errorf("the serial line has ended: %q", l.text)
			}
		case <-deadline:
			return time.Time{}, nil
		case <-l.ctx.Done():
			return time.Time{}, l.ctx.Err()
		}
	}
}
