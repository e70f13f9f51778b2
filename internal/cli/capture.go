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
			if length > 0 {
				var cancel context.CancelFunc
				ctx, cancel = context.WithTimeout(ctx, length)
				defer cancel()
			}
			return a.capture(ctx, c, req, file)
		}),
		ValidArgsFunction: a.machineNames,
	}
	f := c.Flags()
	f.StringVarP(&file, "write", "w", "", "`file` to write, - for the standard output")
	f.Uint32Var(&req.SnapLength, "snap", 0, "`bytes` kept of each frame (default: all)")
	f.DurationVar(&length, "for", 0, "end after this `time`, as in 30s")
	return c
}

func (a *app) capture(ctx context.Context, c *api.Client, req *vigiav1.CaptureRequest, file string) error {
	stream, err := c.Machines.Capture(ctx, connect.NewRequest(req))
	if err != nil {
		return err
	}
	defer stream.Close()
	// The file is made when the first bytes are there: a refused capture leaves none, and no old one is lost to it.
	var out io.Writer
	var written int
	for stream.Receive() {
		if out == nil {
			if out, err = a.create(file); err != nil {
				return err
			}
		}
		n, err := out.Write(stream.Msg().GetData())
		if written += n; err != nil {
			return err
		}
	}
	if f, ok := out.(*os.File); ok && file != "-" {
		if err := f.Close(); err != nil {
			return err
		}
	}
	if err := stream.Err(); err != nil && !ended(ctx, err) {
		return err
	}
	if file != "-" && !a.json() {
		a.note("%s: %s captured", file, formatSize(uint64(written)))
	}
	return nil
}

// ended tells an end that the person asked for, by Ctrl-C or a time, from a failure.
func ended(ctx context.Context, err error) bool {
	code := connect.CodeOf(err)
	return ctx.Err() != nil && (code == connect.CodeCanceled || code == connect.CodeDeadlineExceeded || errors.Is(err, ctx.Err()))
}

// create opens what -w names. Frames hold what the guest sent and received: they are for the owner alone.
func (a *app) create(file string) (io.Writer, error) {
	if file == "-" {
		return a.std.Out, nil
	}
	f, err := os.OpenFile(file, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return nil, fmt.Errorf("capture: %w", err)
	}
	return f, nil
}
