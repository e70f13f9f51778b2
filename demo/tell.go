package main

import (
	"fmt"
	"io"
	"os"
	"strings"
	"sync"
	"time"

	"golang.org/x/term"
)

// teller prints the play: a line for each step, with a running clock on a terminal.
type teller struct {
	w       io.Writer
	tty     bool
	began   time.Time
	mu      sync.Mutex
	step    string
	stepped time.Time
	note    string
	stop    chan struct{}
}

func newTeller(f *os.File) *teller {
	return &teller{w: f, tty: term.IsTerminal(int(f.Fd())), began: time.Now()}
}

func (t *teller) title(s string) { fmt.Fprintf(t.w, "%s\n\n", s) }

func (t *teller) begin(step string) {
	t.mu.Lock()
	t.step, t.stepped, t.note, t.stop = step, time.Now(), "", make(chan struct{})
	t.mu.Unlock()
	if t.tty {
		go t.spin(t.stop)
	}
}

func (t *teller) spin(stop chan struct{}) {
	for i := 0; ; i++ {
		t.mu.Lock()
		line := fmt.Sprintf("%s %5.1fs  %s", string([]rune("⠋⠙⠹⠸⠼⠴⠦⠧⠇⠏")[i%10]), time.Since(t.stepped).Seconds(), t.step)
		if t.note != "" {
			line += " · " + t.note
		}
		fmt.Fprintf(t.w, "\r\x1b[K%s", cut(line, 118))
		t.mu.Unlock()
		select {
		case <-stop:
			return
		case <-time.After(100 * time.Millisecond):
		}
	}
}

func cut(s string, n int) string {
	if r := []rune(s); len(r) > n {
		return string(r[:n-1]) + "…"
	}
	return s
}

// progress shows where a long step is.
func (t *teller) progress(format string, args ...any) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.note = fmt.Sprintf(format, args...)
}

func (t *teller) done() { t.finish("✓") }
func (t *teller) fail() { t.finish("✗") }

func (t *teller) finish(mark string) {
	close(t.stop)
	t.mu.Lock()
	defer t.mu.Unlock()
	start := ""
	if t.tty {
		start = "\r\x1b[K"
	}
	fmt.Fprintf(t.w, "%s%s %5.1fs  %s\n", start, mark, time.Since(t.stepped).Seconds(), t.step)
	if t.note != "" {
		fmt.Fprintf(t.w, "          %s\n", strings.ReplaceAll(t.note, "\n", "\n          "))
	}
}
