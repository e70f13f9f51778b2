package guard

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"time"

	"vigia/internal/link"
	"vigia/internal/probe"
)

// tracedCall is one line of a trace.
type tracedCall struct {
	Time time.Time `json:"time"`
	probe.Called
	Lost int64 `json:"lost,omitempty"` // calls before this one that were not taken fast enough
}

// traceRoom is how many calls may wait for their reader.
const traceRoom = 16384

// trace writes system calls into a pipe until its other end is closed, or the caller leaves.
func (g *Guard) trace(ctx context.Context, r link.Request) (link.Response, error) {
	defer closeFiles(r.Files)
	var t link.Trace
	if err := r.Decode(&t); err != nil {
		return link.Response{}, err
	}
	if len(r.Files) != 1 {
		return link.Response{}, errors.New("trace: no pipe was given")
	}
	if g.prober.watcher == nil {
		return link.Response{}, fmt.Errorf("%w: %s", probe.ErrNotProbed, g.prober.state())
	}
	if t.PID < 0 || t.PID > 1<<30 {
		return link.Response{}, fmt.Errorf("trace: pid %d", t.PID)
	}
	calls := make(chan tracedCall, traceRoom)
	var lost int64
	end, err := g.prober.watcher.Trace(t.PID, func(c probe.Called) {
		select {
		case calls <- tracedCall{time.Now().UTC(), c, lost}:
			lost = 0
		default:
			lost++
		}
	})
	if err != nil {
		return link.Response{}, err
	}
	defer end()
	return link.Response{}, writeCalls(ctx, r.Files[0], calls)
}

func writeCalls(ctx context.Context, pipe *os.File, calls <-chan tracedCall) error {
	out := json.NewEncoder(pipe)
	for {
		select {
		case c := <-calls:
			if out.Encode(c) != nil {
				return nil // nobody reads any more
			}
		case <-ctx.Done():
			return nil
		}
	}
}
