package cli

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"time"

	"connectrpc.com/connect"
	"github.com/spf13/cobra"

	"vigia/internal/api"
	"vigia/internal/api/vigiav1"
)

func (a *app) captureCmd() *cobra.Command {
	req := &vigiav1.CaptureRequest{}
	var file string
	var length time.Duration
	c := &cobra.Command{
		Use:   "capture NAME -w FILE|-",
		Short: "Write a machine's frames as pcapng, until Ctrl-C",
		Example: `  vigia capture web -w web.pcapng --for 30s
  vigia capture web -w - | tcpdump -nr -`,
		Args: oneArg("NAME"),
		RunE: a.remote(func(ctx context.Context, c *api.Client, args []string) error {
			switch {
			case file == "":
				return usagef("-w is missing: give a file, or - for the standard output")
			case file == "-" && isTerminal(a.std.Out):
				return usagef("frames would be written to the terminal: use -w FILE, or a pipe")
			case length < 0:
				return usagef("for %s: use a time such as 30s", length)
			}
			req.Name = args[0]
			return a.capture(ctx, c, req, file, length)
		}),
		ValidArgsFunction: a.machineNames,
	}
	f := c.Flags()
	f.StringVarP(&file, "write", "w", "", "`file` to write, - for the standard output")
	f.Uint32Var(&req.SnapLength, "snap", 0, "`bytes` kept of each frame (default: all)")
	f.DurationVar(&length, "for", 0, "end after this `time`, as in 30s")
	return c
}

func (a *app) capture(ctx context.Context, c *api.Client, req *vigiav1.CaptureRequest, file string, length time.Duration) error {
	ctx, end := context.WithCancel(ctx)
	defer end()
	stream, err := c.Machines.Capture(ctx, connect.NewRequest(req))
	if err != nil {
		return err
	}
	defer stream.Close()
	out := &captureFile{a: a, name: file}
	defer out.Close()
	for stream.Receive() {
		if length > 0 {
			defer time.AfterFunc(length, end).Stop() // counted from the header, when the capture has begun
			length = 0
		}
		if _, err := out.Write(stream.Msg().GetData()); err != nil {
			return err
		}
	}
	if err := stream.Err(); err != nil && !ended(ctx, err) {
		return err
	}
	if err := out.Close(); err != nil {
		return err
	}
	if file != "-" && !a.json() {
		a.note("%s: %s captured", file, formatSize(out.written))
	}
	return nil
}

// captureFile is made when the first bytes are there: a refused capture leaves none, and no old one is lost to it.
type captureFile struct {
	a       *app
	name    string // - is the standard output
	file    *os.File
	written uint64
}

func (c *captureFile) Write(p []byte) (n int, err error) {
	var w io.Writer = c.a.std.Out
	if c.name != "-" {
		if c.file == nil {
			// Frames hold what the guest sent and received: they are for the owner alone.
			if c.file, err = os.OpenFile(c.name, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o600); err != nil {
				return 0, fmt.Errorf("capture: %w", err)
			}
		}
		w = c.file
	}
	n, err = w.Write(p)
	c.written += uint64(n)
	return n, err
}

func (c *captureFile) Close() error {
	if c.file == nil {
		return nil
	}
	f := c.file
	c.file = nil
	return f.Close()
}

// ended tells an end that the person asked for, by Ctrl-C or a time, from a failure.
func ended(ctx context.Context, err error) bool {
	if err == nil || ctx.Err() == nil {
		return false
	}
	code := connect.CodeOf(err)
	return code == connect.CodeCanceled || code == connect.CodeDeadlineExceeded || errors.Is(err, ctx.Err())
}
