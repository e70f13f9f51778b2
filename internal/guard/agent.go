package guard

import (
	"context"
	"errors"
	"os"
	"time"

	"vigia/internal/link"
)

var errNoChannel = errors.New("this machine has no guest channel: it was not run with --additions exec")

// exec runs a command in the guest and writes what it printed into the two pipes that came along.
func (g *Guard) exec(ctx context.Context, r link.Request) (link.Response, error) {
	defer closeFiles(r.Files)
	var e link.Exec
	if err := r.Decode(&e); err != nil {
		return link.Response{}, err
	}
	if g.agent == nil {
		return link.Response{}, errNoChannel
	}
	if len(r.Files) != 2 {
		return link.Response{}, errors.New("exec: no pipes were given")
	}
	ctx, cancel := context.WithTimeout(ctx, e.Timeout)
	defer cancel()
	g.keepCommand(e)
	result, err := g.agent.Exec(ctx, e.Command, e.Stdin)
	if err != nil {
		return link.Response{}, err
	}
	done := make(chan error, 2)
	for i, b := range [][]byte{result.Stdout, result.Stderr} {
		go func() {
			_, err := r.Files[i].Write(b)
			done <- err
		}()
	}
	if err := errors.Join(<-done, <-done); err != nil {
		return link.Response{}, err
	}
	return link.Response{Body: link.ExecResult{ExitCode: result.ExitCode, Signal: result.Signal, Truncated: result.Truncated}}, nil
}

// copyIn writes what comes through the pipe into a file of the guest.
func (g *Guard) copyIn(ctx context.Context, r link.Request) (link.Response, error) {
	return g.copy(ctx, r, func(ctx context.Context, c link.Copy, pipe *os.File) (int64, error) {
		copied := g.keepCopy(c, pipe)
		n, err := g.agent.WriteFile(ctx, c.Path, c.Mode, copied)
		copied.done(err)
		return n, err
	})
}

// copyOut writes a file of the guest into the pipe.
func (g *Guard) copyOut(ctx context.Context, r link.Request) (link.Response, error) {
	return g.copy(ctx, r, func(ctx context.Context, c link.Copy, pipe *os.File) (int64, error) {
		return g.agent.ReadFile(ctx, c.Path, pipe, c.Limit)
	})
}

func (g *Guard) copy(ctx context.Context, r link.Request, do func(context.Context, link.Copy, *os.File) (int64, error)) (link.Response, error) {
	defer closeFiles(r.Files)
	var c link.Copy
	if err := r.Decode(&c); err != nil {
		return link.Response{}, err
	}
	if g.agent == nil {
		return link.Response{}, errNoChannel
	}
	if len(r.Files) != 1 {
		return link.Response{}, errors.New("copy: no pipe was given")
	}
	ctx, cancel := context.WithTimeout(ctx, time.Hour)
	defer cancel()
	n, err := do(ctx, c, r.Files[0])
	if err != nil {
		return link.Response{}, err
	}
	return link.Response{Body: link.Copied{Bytes: n}}, nil
}
