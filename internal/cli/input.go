package cli

import (
	"context"
	"io"
)

// input is the standard input, read until ctx ends: a read of a terminal or a pipe knows nothing of Ctrl-C.
func (a *app) input(ctx context.Context) io.Reader { return &input{ctx: ctx, r: a.std.In} }

type input struct {
	ctx context.Context
	r   io.Reader
	buf []byte
}

type inputRead struct {
	n   int
	err error
}

// Read reads into a buffer of its own: a read that was given up may still come back, and must not write into p.
func (i *input) Read(p []byte) (int, error) {
	if err := i.ctx.Err(); err != nil {
		return 0, err
	}
	if i.buf == nil {
		i.buf = make([]byte, copyChunk)
	}
	buf := i.buf[:min(len(p), len(i.buf))]
	done := make(chan inputRead, 1)
	go func() {
		n, err := i.r.Read(buf)
		done <- inputRead{n, err}
	}()
	select {
	case r := <-done:
		return copy(p, buf[:r.n]), r.err
	case <-i.ctx.Done():
		return 0, i.ctx.Err()
	}
}
