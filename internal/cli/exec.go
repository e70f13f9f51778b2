package cli

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"strings"
	"time"

	"connectrpc.com/connect"
	"github.com/spf13/cobra"

	"vigia/internal/api"
	"vigia/internal/api/vigiav1"
)

// maxStdin bounds what exec passes to its command: it goes in one request, under api.MaxMessage.
const maxStdin = 3 << 20

// stdinPatience is how long exec waits for its input to end before it says that it does.
const stdinPatience = 3 * time.Second

type execOptions struct {
	noStdin, raw bool
	timeout      time.Duration
}

func (a *app) execCmd() *cobra.Command {
	var o execOptions
	c := &cobra.Command{
		Use:   "exec NAME -- COMMAND [ARGUMENT…]",
		Short: "Run a command in a machine, through its agent",
		Long: "Run a command in a machine, through its agent (run … --additions exec). The standard input is passed where it is no\n" +
			"terminal. What comes back, the exit status too, is the guest's claim. Ends with the command's own status, 128 and\n" +
			"the signal's number where a signal ended it.",
		Example: `  vigia exec web -- systemctl is-active ssh
  tar c site | vigia exec web -- tar x -C /srv`,
	}
	c.Args = func(c *cobra.Command, args []string) error {
		switch dash := c.ArgsLenAtDash(); {
		case len(args) == 0 || dash == 0:
			return usagef("NAME is missing")
		case dash > 1:
			return usagef("%q stands between NAME and --", args[1])
		case len(args) == 1:
			return usagef("the command is missing: give it after --")
		}
		return nil
	}
	c.RunE = a.remote(func(ctx context.Context, c *api.Client, args []string) error {
		if o.timeout < 0 {
			return usagef("timeout %s: use a time such as 30s", o.timeout)
		}
		return a.exec(ctx, c, args[0], args[1:], o)
	})
	c.ValidArgsFunction = a.machineNames
	f := c.Flags()
	f.BoolVarP(&o.noStdin, "no-stdin", "n", false, "do not read the standard input")
	f.BoolVar(&o.raw, "raw", false, "let control characters of the output reach the terminal: only for a guest you trust")
	f.DurationVar(&o.timeout, "timeout", 0, "`time` the command has, as in 30s")
	return c
}

func (a *app) exec(ctx context.Context, c *api.Client, name string, command []string, o execOptions) error {
	req := &vigiav1.ExecRequest{Name: name, Command: command, TimeoutSeconds: o.timeout.Seconds()}
	var err error
	if !o.noStdin && !isTerminal(a.std.In) {
		if req.Stdin, err = a.readStdin(ctx); err != nil {
			return err
		}
	}
	stream, err := c.Machines.Exec(ctx, connect.NewRequest(req))
	if err != nil {
		return err
	}
	defer stream.Close()
	r := &execResult{out: a.guestOutput(a.std.Out, true, o.raw), err: a.guestOutput(a.std.Err, true, o.raw)}
	if a.json() {
		r.out, r.err = &r.stdout, &r.stderr
	}
	if err := r.receive(stream); err != nil {
		return err
	}
	a.exit = exitStatus(r.last)
	if a.json() {
		return a.printValue(r.value())
	}
	if r.truncated {
		a.note("the output of the command was longer than vigia takes: its end is missing")
	}
	return nil
}

// readStdin reads all of the input. A script that inherits an input which never ends would hang here: it is told.
func (a *app) readStdin(ctx context.Context) ([]byte, error) {
	defer time.AfterFunc(stdinPatience, func() {
		a.note("waiting for the end of the standard input; -n runs the command without it")
	}).Stop()
	data, err := io.ReadAll(io.LimitReader(a.input(ctx), maxStdin+1))
	switch {
	case err != nil:
		return nil, fmt.Errorf("standard input: %w", err)
	case len(data) > maxStdin:
		return nil, fmt.Errorf("standard input is larger than %s: use vigia cp", formatSize(maxStdin))
	}
	return data, nil
}

// execResult gathers what comes back from a command.
type execResult struct {
	out, err       io.Writer
	stdout, stderr bytes.Buffer
	truncated      bool
	last           *vigiav1.ExecOutput
}

func (r *execResult) receive(stream *connect.ServerStreamForClient[vigiav1.ExecOutput]) error {
	for stream.Receive() {
		msg := stream.Msg()
		if _, err := r.out.Write(msg.GetStdout()); err != nil {
			return err
		}
		if _, err := r.err.Write(msg.GetStderr()); err != nil {
			return err
		}
		r.truncated = r.truncated || msg.GetTruncated()
		if msg.GetDone() {
			r.last = &vigiav1.ExecOutput{ExitCode: msg.GetExitCode(), Signal: msg.GetSignal()}
		}
	}
	if err := stream.Err(); err != nil {
		return err
	}
	if r.last == nil {
		return errors.New("the command's exit status never came: the agent or the machine went away")
	}
	return nil
}

// value is the result as -o json prints it. Bytes that are no UTF-8 become U+FFFD: exec without -o json passes them on.
func (r *execResult) value() any {
	return struct {
		ExitCode  int32  `json:"exit_code"`
		Signal    int32  `json:"signal"`
		Stdout    string `json:"stdout"`
		Stderr    string `json:"stderr"`
		Truncated bool   `json:"truncated"`
	}{r.last.GetExitCode(), r.last.GetSignal(), text(r.stdout.Bytes()), text(r.stderr.Bytes()), r.truncated}
}

func text(b []byte) string { return strings.ToValidUTF8(string(b), "\uFFFD") }

// exitStatus fits a guest's claim into what a process can end with: 256 must not become 0.
func exitStatus(last *vigiav1.ExecOutput) int {
	code, signal := last.GetExitCode(), last.GetSignal()
	switch {
	case code < 0 || code > 255 || signal < 0 || signal > 127:
		return 255
	case signal > 0:
		return 128 + int(signal)
	}
	return int(code)
}
