package cli

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"strings"
	"time"

	"connectrpc.com/connect"
	"github.com/spf13/cobra"

	"vigia/internal/api"
	"vigia/internal/api/vigiav1"
)

// tracedCall is a line of a trace, as the guard writes it.
type tracedCall struct {
	Time   time.Time `json:"time"`
	PID    int64     `json:"pid"`
	TID    int64     `json:"tid"`
	Comm   string    `json:"comm"`
	Number int64     `json:"number"`
	Name   string    `json:"name"`
	Args   [6]uint64 `json:"args"`
	Path   string    `json:"path"`
	Result int64     `json:"result"`
	Lost   int64     `json:"lost"`
}

func (a *app) traceCmd() *cobra.Command {
	req := &vigiav1.TraceRequest{}
	var length time.Duration
	c := &cobra.Command{
		Use:   "trace NAME [--pid P]",
		Short: "Print the system calls of a machine's processes, until Ctrl-C",
		Long: "Print the system calls of a machine's processes as they return, until Ctrl-C. It works where QEMU has the plugin (see: vigia show NAME), and\n" +
			"slows down what it traces.",
		Example: `  vigia trace web --pid 132
  vigia trace web --for 5s -o json`,
		Args: oneArg("NAME"),
		RunE: a.remote(func(ctx context.Context, c *api.Client, args []string) error {
			switch {
			case length < 0:
				return usagef("for %s: use a time such as 30s", length)
			case req.Pid < 0:
				return usagef("pid %d: use a process's number in the guest, as ps shows it", req.Pid)
			}
			req.Name = args[0]
			return a.trace(ctx, c, req, length)
		}),
		ValidArgsFunction: a.machineNames,
	}
	c.Flags().Int64Var(&req.Pid, "pid", 0, "of this process only")
	c.Flags().DurationVar(&length, "for", 0, "end after this `time`, as in 30s")
	return c
}

func (a *app) trace(ctx context.Context, c *api.Client, req *vigiav1.TraceRequest, length time.Duration) error {
	ctx, end := context.WithCancel(ctx)
	defer end()
	if length > 0 {
		defer time.AfterFunc(length, end).Stop()
	}
	stream, err := c.Machines.Trace(ctx, connect.NewRequest(req))
	if err != nil {
		return err
	}
	defer stream.Close()
	read, write := io.Pipe()
	printed := make(chan error, 1)
	go func() {
		err := a.printCalls(read)
		read.CloseWithError(err) // nobody reads any more
		printed <- err
	}()
	for stream.Receive() {
		if _, err := write.Write(stream.Msg().GetData()); err != nil {
			break
		}
	}
	write.Close()
	if err := <-printed; err != nil {
		return err
	}
	if err := stream.Err(); err != nil && !ended(ctx, err) {
		return err
	}
	return nil
}

// printCalls prints whole lines; one that was cut short by the end is left out.
func (a *app) printCalls(r io.Reader) error {
	lines := bufio.NewReaderSize(r, 64<<10)
	for {
		line, err := lines.ReadString('\n')
		if err != nil {
			return nil
		}
		var t tracedCall
		if err := json.Unmarshal([]byte(line), &t); err != nil {
			return fmt.Errorf("trace: a line that is none: %w", err)
		}
		if a.json() {
			_, err = io.WriteString(a.std.Out, line)
		} else {
			_, err = fmt.Fprintln(a.std.Out, t)
		}
		if err != nil {
			return err
		}
	}
}

func (t tracedCall) String() string {
	name := t.Name
	if name == "" {
		name = fmt.Sprintf("call-%d", t.Number)
	}
	args := make([]string, len(t.Args))
	for i, v := range t.Args {
		args[i] = fmt.Sprintf("%#x", v)
	}
	text := fmt.Sprintf("%s  %d  %s  %s(%s) = %d", t.Time.Format("15:04:05.000000Z"), t.PID, t.Comm, name, strings.Join(args, ", "), t.Result)
	if t.Path != "" {
		text += fmt.Sprintf("  %q", t.Path)
	}
	if t.Lost > 0 {
		text += fmt.Sprintf("  (%d before it were lost)", t.Lost)
	}
	return text
}
