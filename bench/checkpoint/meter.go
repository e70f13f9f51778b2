package main

import (
	"context"
	"fmt"
	"strings"
	"sync"
	"time"

	"vigia/internal/api/vigiav1"
)

// meter reads a serial line on which the guest writes dots without end, and knows the longest silence. Commands run beside.
type meter struct {
	cancel context.CancelFunc
	send   func(string) error

	mu   sync.Mutex
	last time.Time
	most time.Duration
	said string // without the dots
	err  error
}

// meter starts the dots.
func (b *bench) meter(machine string) (*meter, error) {
	ctx, cancel := context.WithCancel(b.ctx)
	stream := b.Client.Machines.Console(ctx)
	m := &meter{cancel: cancel, last: time.Now(), send: func(s string) error { return stream.Send(&vigiav1.ConsoleInput{Data: []byte(s)}) }}
	if err := stream.Send(&vigiav1.ConsoleInput{Name: machine}); err != nil {
		cancel()
		return nil, err
	}
	go func() {
		for {
			out, err := stream.Receive()
			now := time.Now()
			m.mu.Lock()
			if err != nil {
				m.err = err
				m.mu.Unlock()
				return
			}
			m.most, m.last = max(m.most, now.Sub(m.last)), now
			m.said += strings.ReplaceAll(string(out.Data), ".", "")
			m.mu.Unlock()
		}
	}()
	// In the foreground of its own shell the loop would keep commands from being read.
	if err := m.send("stty -echo; (while :; do printf .; done) & true\n"); err != nil {
		cancel()
		return nil, err
	}
	time.Sleep(500 * time.Millisecond)
	return m, nil
}

// longest is the longest silence since the last call, in milliseconds.
func (m *meter) longest() float64 {
	m.mu.Lock()
	defer m.mu.Unlock()
	most := m.most
	m.most = 0
	return float64(most.Microseconds()) / 1000
}

// command runs a command in the guest's shell and waits for its end.
func (m *meter) command(command string) (string, error) {
	m.mu.Lock()
	m.said = ""
	m.mu.Unlock()
	if err := m.send(command + "; echo end$((40+2))\n"); err != nil {
		return "", err
	}
	for range 3000 {
		m.mu.Lock()
		said, err := m.said, m.err
		m.mu.Unlock()
		if answer, _, ended := strings.Cut(said, "end42"); ended {
			return answer, nil
		}
		if err != nil {
			return "", err
		}
		time.Sleep(100 * time.Millisecond)
	}
	return "", fmt.Errorf("no answer to %q on the serial line", command)
}

func (m *meter) end() {
	m.send("kill %1\n")
	m.cancel()
}
