package test

import (
	"context"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"vigia/internal/api/vigiav1"
)

// bootTime is how long a guest may take on a host that does other things too.
const bootTime = 3 * time.Minute

// guest is a running machine and the root shell on its serial line. Nothing in it is vigia's.
type guest struct {
	*host
	name string
	line *line
	asks int
	qemu int // its pid, where a test has noted it
}

// run makes a machine of the image tiny and waits for its shell.
func (h *host) run(name string, args ...string) *guest {
	h.t.Helper()
	h.must(append([]string{"run", "tiny", name, "--memory", "256M"}, args...)...)
	g := h.guest(name)
	g.ready()
	return g
}

// guest is for a machine that runs already.
func (h *host) guest(name string) *guest { return &guest{host: h, name: name} }

// on is the same guest for a subtest.
func (g *guest) on(t *testing.T) *guest {
	h := *g.host
	h.t = t
	on := *g
	on.host, on.line = &h, nil
	return &on
}

// line is a console that is attached.
type line struct {
	cancel context.CancelFunc
	send   func(string) error
	text   chan string
	failed error // valid once text is closed
}

func (g *guest) attach() (*line, error) {
	ctx, cancel := context.WithCancel(context.Background())
	stream := g.client.Machines.Console(ctx)
	l := &line{cancel: cancel, text: make(chan string, 1024), send: func(s string) error {
		return stream.Send(&vigiav1.ConsoleInput{Data: []byte(s)})
	}}
	if err := stream.Send(&vigiav1.ConsoleInput{Name: g.name}); err != nil {
		cancel()
		return nil, err
	}
	go func() {
		defer close(l.text)
		for {
			out, err := stream.Receive()
			if err != nil {
				l.failed = err
				return
			}
			select {
			case l.text <- string(out.Data):
			case <-ctx.Done():
				return
			}
		}
	}()
	return l, nil
}

// ready waits until the guest's shell answers.
func (g *guest) ready() {
	g.t.Helper()
	if _, err := g.try("true", bootTime); err != nil {
		g.t.Fatalf("the guest %s does not come up: %v", g.name, err)
	}
}

// sh runs a command in the guest's shell and returns what it printed; one that fails ends the test.
func (g *guest) sh(format string, args ...any) string {
	g.t.Helper()
	out, err := g.try(fmt.Sprintf(format, args...), time.Minute)
	if err != nil {
		g.t.Fatal(err)
	}
	return out
}

// try is sh for commands that may fail or end the guest.
func (g *guest) try(command string, most time.Duration) (string, error) {
	g.t.Helper()
	deadline := time.Now().Add(most)
	var last error
	for time.Now().Before(deadline) {
		if g.line == nil {
			if g.line, last = g.attach(); last != nil {
				time.Sleep(200 * time.Millisecond)
				continue
			}
			g.t.Cleanup(g.hangUp)
		}
		out, status, err := g.ask(command, deadline)
		if err == nil && status != 0 {
			return out, fmt.Errorf("in the guest: %s: status %d: %s", command, status, out)
		}
		if err == nil {
			return out, nil
		}
		last = err
		g.hangUp()
	}
	return "", fmt.Errorf("in the guest: %s: no answer after %s: %w", command, most, last)
}

func (g *guest) hangUp() {
	if g.line != nil {
		g.line.cancel()
		g.line = nil
	}
}

// ask types a command and waits for what it prints between two marks, which are sums so that the echo of what was typed
// does not hold them. What is typed before there is a shell is lost, so it is typed again until it was heard.
func (g *guest) ask(command string, deadline time.Time) (string, int, error) {
	g.asks++
	mark := strconv.Itoa(1_000_000*g.asks + time.Now().Nanosecond()%1_000_000)
	typed := fmt.Sprintf("echo b$((%s+0))b; %s; echo e$((%s+0))e$?e\n", mark, command, mark)
	begin, end := "b"+mark+"b", "e"+mark+"e"
	text := ""
	for {
		if err := g.line.send(typed); err != nil {
			return "", 0, err
		}
		again := time.After(5 * time.Second)
		for again != nil {
			select {
			case part, ok := <-g.line.text:
				if !ok {
					return "", 0, fmt.Errorf("the serial line ended: %w: %q", g.line.failed, tail(text))
				}
				text += part
			case <-again:
				again = nil
			case <-time.After(time.Until(deadline)):
				return "", 0, fmt.Errorf("no answer: %q", tail(text))
			}
			_, after, begun := strings.Cut(text, begin)
			if !begun {
				continue
			}
			again = time.After(time.Hour) // it was heard
			if out, rest, ended := strings.Cut(after, end); ended {
				if status, _, whole := strings.Cut(rest, "e"); whole {
					return plain(out), number(status), nil
				}
			}
		}
	}
}

// plain takes carriage returns out of what came, and the lines that a test lets the guest print all the time.
func plain(s string) string {
	lines := strings.Split(strings.ReplaceAll(s, "\r", ""), "\n")
	lines = slices.DeleteFunc(lines, func(l string) bool { return ticks.MatchString(l) && ticks.FindString(l) == l })
	return strings.TrimSpace(strings.Join(lines, "\n"))
}

func number(s string) int {
	n, err := strconv.Atoi(strings.TrimSpace(s))
	if err != nil {
		return -1
	}
	return n
}

func tail(s string) string { return s[max(0, len(s)-300):] }

// dies types a command whose answer is not waited for.
func (g *guest) dies(command string) {
	g.t.Helper()
	if g.line == nil {
		g.ready()
	}
	if err := g.line.send(command + "\n"); err != nil {
		g.t.Fatal(err)
	}
}

// deaf ends what waits for the power button and for the agent's word.
func (g *guest) deaf() {
	g.t.Helper()
	g.sh("pkill -f 'head -c 1 /dev/input'; busybox killall -q qemu-ga; true")
}
