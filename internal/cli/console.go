package cli

import (
	"bytes"
	"context"
	"errors"
	"io"
	"sync/atomic"
	"time"

	"connectrpc.com/connect"
	"github.com/spf13/cobra"
	"golang.org/x/term"

	"vigia/internal/api"
	"vigia/internal/api/vigiav1"
)

// detachKey is ^], as telnet and the containers' tools have it.
const detachKey = 0x1d

type consoleOptions struct {
	log, raw bool
	wait     time.Duration
}

func (a *app) consoleCmd() *cobra.Command {
	var o consoleOptions
	c := &cobra.Command{
		Use:   "console NAME",
		Short: "Attach to a machine's serial line, or print its log",
		Long: "Attach to a machine's serial line: ^] detaches, every other key goes to the guest. On a terminal, sequences that\n" +
			"could make it do more than show text are left out. Without a terminal, the standard input is sent, and the command\n" +
			"ends --wait after the input did, or when the machine stops.",
		Example: `  vigia console web
  vigia console web --log | less
  echo 'uname -a' | vigia console web --wait 5s`,
		Args: oneArg("NAME"),
		RunE: a.remote(func(ctx context.Context, c *api.Client, args []string) error {
			if o.wait < 0 {
				return usagef("wait %s: use a time such as 5s", o.wait)
			}
			if o.log {
				return a.consoleLog(ctx, c, args[0], o)
			}
			return a.console(ctx, c, args[0], o)
		}),
		ValidArgsFunction: a.machineNames,
	}
	f := c.Flags()
	f.BoolVar(&o.log, "log", false, "print the kept log, from the first byte, and end")
	f.BoolVar(&o.raw, "raw", false, "let every byte of the guest reach the terminal: only for a guest you trust")
	f.DurationVar(&o.wait, "wait", 2*time.Second, "without a terminal: `time` to go on after the end of the input")
	return c
}

// guestOutput is where a guest's bytes go: filtered if it is a terminal, as they are if not.
func (a *app) guestOutput(w io.Writer, strict, raw bool) io.Writer {
	if raw || !isTerminal(w) {
		return w
	}
	return newScreen(w, strict)
}

func (a *app) consoleLog(ctx context.Context, c *api.Client, name string, o consoleOptions) error {
	stream, err := c.Machines.ConsoleLog(ctx, machine(name))
	if err != nil {
		return err
	}
	defer stream.Close()
	out := a.guestOutput(a.std.Out, true, o.raw)
	for stream.Receive() {
		if _, err := out.Write(stream.Msg().GetData()); err != nil {
			return err
		}
	}
	return stream.Err()
}

// console joins the standard streams and the serial line until one of them ends or the person detaches.
func (a *app) console(ctx context.Context, c *api.Client, name string, o consoleOptions) error {
	ctx, leave := context.WithCancel(ctx)
	defer leave()
	stream := c.Machines.Console(ctx)
	defer stream.CloseResponse()
	// net/http looks at ctx only once the request has ended: without this, an open console could not be left.
	defer context.AfterFunc(ctx, func() { _ = stream.CloseRequest() })()
	// A refusal shows at the first Receive: Send's error says only that there is one.
	if err := stream.Send(&vigiav1.ConsoleInput{Name: name}); err != nil && !errors.Is(err, io.EOF) {
		return err
	}
	restore, interactive, err := a.rawTerminal(name)
	if err != nil {
		return err
	}
	defer restore()
	out := a.guestOutput(a.std.Out, false, o.raw)
	if s, ok := out.(*screen); ok {
		defer func() { _, _ = io.WriteString(a.std.Out, s.reset()) }()
	}

	var left atomic.Bool
	detach := func() { left.Store(true); leave() }
	typed := make(chan []byte, 64)
	go a.readKeys(ctx, typed, interactive, detach)
	go sendKeys(ctx, stream, typed, func() {
		if interactive {
			detach()
		} else {
			time.AfterFunc(o.wait, detach)
		}
	})
	err = showConsole(stream, out)
	if left.Load() {
		return nil
	}
	return err
}

// rawTerminal hands every key to the guest, where the input is a terminal.
func (a *app) rawTerminal(name string) (restore func(), interactive bool, err error) {
	fd, ok := terminal(a.std.In)
	if !ok {
		return func() {}, false, nil
	}
	a.note("console of %s: ^] detaches", name)
	old, err := term.MakeRaw(fd)
	if err != nil {
		return nil, false, err
	}
	return func() {
		_ = term.Restore(fd, old)
		a.note("left the console of %s", name)
	}, true, nil
}

// readKeys reads the standard input until its end or, on a terminal, the key that detaches.
func (a *app) readKeys(ctx context.Context, typed chan<- []byte, interactive bool, detach func()) {
	defer close(typed)
	buf := make([]byte, 4096)
	for {
		n, err := a.std.In.Read(buf)
		data := bytes.Clone(buf[:n])
		if interactive && bytes.IndexByte(data, detachKey) >= 0 {
			detach() // what was typed just before goes with it: the person has left
			return
		}
		if n > 0 {
			select {
			case typed <- data:
			case <-ctx.Done():
				return
			}
		}
		if err != nil {
			return
		}
	}
}

type consoleStream = connect.BidiStreamForClient[vigiav1.ConsoleInput, vigiav1.ConsoleOutput]

// sendKeys passes on what was typed; atEnd is called when the input is over, not when the line is.
func sendKeys(ctx context.Context, stream *consoleStream, typed <-chan []byte, atEnd func()) {
	for {
		select {
		case data, ok := <-typed:
			if !ok {
				atEnd()
				return
			}
			if stream.Send(&vigiav1.ConsoleInput{Data: data}) != nil {
				return // Receive tells why
			}
		case <-ctx.Done():
			return
		}
	}
}

func showConsole(stream *consoleStream, out io.Writer) error {
	for {
		msg, err := stream.Receive()
		if errors.Is(err, io.EOF) {
			return nil // the machine has stopped
		}
		if err != nil {
			return err
		}
		if _, err := out.Write(msg.GetData()); err != nil {
			return err
		}
	}
}
