package guard

import (
	"bytes"
	"context"
	"errors"
	"strconv"
	"sync"
	"time"

	"vigia/internal/introspect"
	"vigia/internal/machine/additions"
)

// inside asks the guest, through its agent, what it would show a person there.
type inside struct {
	exec func(ctx context.Context, command []string, stdin []byte) (additions.Result, error)

	mu    sync.Mutex
	quiet time.Time // not before: the agent did not answer
	pids  []int64
	names []string
	asked time.Time // when that was the answer
}

const (
	insideTimeout = 3 * time.Second
	insideRetry   = time.Minute
	insideFresh   = 50 * time.Millisecond // two checks of one round take the same answer, two samples do not
	maxInside     = 1 << 16               // of pids, and of modules
)

// newInside makes one; nil without a channel.
func newInside(a *additions.Agent) introspect.Inside {
	if a == nil {
		return nil
	}
	return &inside{exec: a.Exec}
}

var errInsideQuiet = errors.New("the guest agent did not answer a moment ago")

// insideCommand is what a person would do: names in /proc, and lsmod. A rootkit has to hide from these.
var insideCommand = []string{"/bin/sh", "-c", "ls /proc; echo .; cat /proc/modules"}

// Listing returns what the guest lists.
func (i *inside) Listing() (pids []int64, modules []string, err error) {
	i.mu.Lock()
	defer i.mu.Unlock()
	now := time.Now()
	if now.Before(i.quiet) {
		return nil, nil, errInsideQuiet
	}
	if now.Sub(i.asked) < insideFresh {
		return i.pids, i.names, nil
	}
	ctx, cancel := context.WithTimeout(context.Background(), insideTimeout)
	defer cancel()
	r, err := i.exec(ctx, insideCommand, nil)
	if err != nil {
		i.quiet = now.Add(insideRetry)
		return nil, nil, err
	}
	i.pids, i.names = parseInside(r.Stdout)
	i.asked = time.Now()
	return i.pids, i.names, nil
}

// parseInside takes the pids up to a line with a dot, and then the first word of each line.
func parseInside(out []byte) (pids []int64, modules []string) {
	listing := true
	for line := range bytes.Lines(out) {
		line = bytes.TrimSpace(line)
		if bytes.Equal(line, []byte(".")) {
			listing = false
			continue
		}
		if listing {
			if pid, err := strconv.ParseInt(string(line), 10, 32); err == nil && len(pids) < maxInside {
				pids = append(pids, pid)
			}
			continue
		}
		if name, _, ok := bytes.Cut(line, []byte(" ")); ok && len(modules) < maxInside {
			modules = append(modules, string(name))
		}
	}
	return pids, modules
}
