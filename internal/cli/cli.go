// Package cli is the command line: it asks the daemon, by package api, and prints what comes back.
//
// A command is a function in the file of its name; what all of them share is in four files:
//
//	cli.go      Main, the root command, the exit status
//	output.go   one JSON value (-o json) or text: tables, sizes, times
//	plain.go    what a guest wrote, made harmless for a terminal
//	progress.go bars on a terminal, silence in a pipe
//
// The rules that tests and other programs rely on:
//
//   - Results go to the standard output, everything else (progress, notes, errors) to the standard error.
//   - `-o json` prints exactly one JSON value; `events -f -o json` prints a line per event.
//   - Exit status: 0 fine, 1 failed, 2 usage, 3 a check found something. `exec` ends with its command's own status.
//   - An error is one line, "vigia: …", in lower case, that names the thing; a second line says what to do.
//   - No byte that a guest chose reaches a terminal as a control character, but through `console`, which lets a list of
//     harmless ones pass.
//
// What works without a daemon (serve, doctor, the offline checks) is given by cmd/vigia as a Local, so that this package
// knows the API and nothing else of vigia. The manual is doc/cli.md.
package cli

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/url"
	"strings"
	"syscall"
	"time"

	"connectrpc.com/connect"
	"github.com/spf13/cobra"

	"vigia/internal/api"
)

// ErrFound is wrapped by a Local function's error when a check did its work and found something: exit status 3.
// Returned bare, it prints no line of its own.
var ErrFound = errors.New("the check found something")

// ErrUsage is wrapped by errors about what the person typed: exit status 2.
var ErrUsage = errors.New("usage")

// Exit statuses.
const (
	exitFine   = 0
	exitFailed = 1
	exitUsage  = 2
	exitFound  = 3
)

// Streams are the standard ones. Where they are terminals, they must be *os.File for vigia to see it.
type Streams struct {
	In       io.Reader
	Out, Err io.Writer
}

// Local holds what works without a daemon. A nil function's command says that it is not in this build.
type Local struct {
	Version string

	Serve        func(ctx context.Context, o ServeOptions) error
	Doctor       func(ctx context.Context, state string, asJSON bool, w io.Writer) error
	PolicyCheck  func(files []string, w io.Writer) error
	PolicyTest   func(file, events string, asJSON bool, w io.Writer) error
	LedgerVerify func(ctx context.Context, o LedgerOptions, asJSON bool, w io.Writer) error
	LedgerExport func(ctx context.Context, o LedgerOptions, w io.Writer) error
	LedgerProve  func(ctx context.Context, o LedgerOptions, entry string, w io.Writer) error
	VolumeCheck  func(ctx context.Context, state, target string, asJSON bool, w io.Writer) error
}

// ServeOptions are the flags of `vigia serve`.
type ServeOptions struct {
	State                      string
	Accelerator                string        // auto, kvm or tcg
	Rules                      string        // directory of rules; empty: rules in the state directory
	CheckEvery, CheckFullEvery time.Duration // 0: never
	DayBudget                  int64         // bytes of the ledger by machine and day; 0: no bound
	Spares                     int           // clones made ahead, at most
	Verbose                    bool          // log where the time of a start or a rollback goes
	Err                        io.Writer
}

// LedgerOptions are the flags of `vigia ledger verify` and `vigia ledger export`.
type LedgerOptions struct {
	State string
	Dir   string // a ledger's own directory, or a copy of one; empty: the state directory's
	Key   string // file of the verifier key; empty: the one beside the ledger
	Head  string // file of a signed head that was kept elsewhere, which the ledger must contain; empty: none
	Proof string // file of a proof or an export, to be verified in the ledger's place; empty: the ledger
}

// Main runs one command line, without the program's name, and returns the exit status. Cancelling ctx ends the command.
func Main(ctx context.Context, args []string, std Streams, local Local) int {
	a := &app{std: std, local: local}
	root := a.root()
	root.SetArgs(args)
	c, err := root.ExecuteContextC(ctx)
	return a.status(c, err)
}

// app is one run of the program.
type app struct {
	std   Streams
	local Local

	stateFlag string
	output    string
	parsed    bool // flags and arguments were fine: what fails from here on is not usage
	exit      int  // of exec's command
}

func (a *app) root() *cobra.Command {
	root := &cobra.Command{
		Use:   "vigia",
		Short: "Runs Linux virtual machines under guard",
		Long: "vigia runs Linux virtual machines under guard: it sees, controls and remembers what a guest does from below\n" +
			"the guest's kernel, with nothing installed in the guest.",
		SilenceErrors: true,
		SilenceUsage:  true,
		RunE:          needsCommand,
		Args:          cobra.ArbitraryArgs,
		PersistentPreRunE: func(*cobra.Command, []string) error {
			if a.output != "text" && a.output != "json" {
				return usagef("output %q: use text or json", a.output)
			}
			return nil
		},
	}
	root.SetIn(a.std.In)
	root.SetOut(a.std.Out)
	root.SetErr(a.std.Err)
	root.SetFlagErrorFunc(func(_ *cobra.Command, err error) error { return usage(err) })
	flags := root.PersistentFlags()
	flags.StringVar(&a.stateFlag, "state", "", "state `directory` (default $VIGIA_STATE, else vigia in the XDG data home)")
	flags.StringVarP(&a.output, "output", "o", "text", "output `form`: text or json")
	_ = root.RegisterFlagCompletionFunc("output", cobra.FixedCompletions([]string{"text", "json"}, cobra.ShellCompDirectiveNoFileComp))
	root.AddGroup(
		&cobra.Group{ID: "machine", Title: "Machines:"},
		&cobra.Group{ID: "inside", Title: "Seen and done inside a machine:"},
		&cobra.Group{ID: "guard", Title: "Guarding:"},
		&cobra.Group{ID: "host", Title: "Host, images and disks:"},
	)
	add := func(group string, commands ...*cobra.Command) {
		for _, c := range commands {
			c.GroupID = group
			root.AddCommand(c)
		}
	}
	add("machine", a.runCmd(), a.lsCmd(), a.showCmd(), a.startCmd(), a.stopCmd(), a.pauseCmd(), a.resumeCmd(), a.rmCmd(),
		a.checkpointCmd(), a.checkpointsCmd(), a.rollbackCmd(), a.cloneCmd(), a.replayCmd(), a.seekCmd())
	add("inside", a.consoleCmd(), a.execCmd(), a.cpCmd(), a.psCmd(), a.modulesCmd(), a.socketsCmd(),
		a.filesCmd(), a.mapsCmd(), a.kernelCmd(), a.checkCmd())
	add("guard", a.eventsCmd(), a.policyCmd(), a.quarantineCmd(), a.releaseCmd(), a.rulesCmd(), a.captureCmd(), a.traceCmd(), a.ledgerCmd())
	add("host", a.serveCmd(), a.doctorCmd(), a.imageCmd(), a.volumeCmd(), a.infoCmd(), a.versionCmd())
	return root
}

// needsCommand is the body of a command that only groups others.
func needsCommand(c *cobra.Command, args []string) error {
	if len(args) > 0 {
		return usagef("%s: no command %q", c.CommandPath(), args[0])
	}
	var names []string
	for _, sub := range c.Commands() {
		if sub.IsAvailableCommand() {
			names = append(names, sub.Name())
		}
	}
	return usagef("%s: give a command: %s", c.CommandPath(), strings.Join(names, ", "))
}

// run wraps a command's body: from here on, errors are not about the command line.
func (a *app) run(f func(ctx context.Context, args []string) error) func(*cobra.Command, []string) error {
	return func(c *cobra.Command, args []string) error {
		a.parsed = true
		return f(c.Context(), args)
	}
}

// remote wraps the body of a command that asks the daemon.
func (a *app) remote(f func(ctx context.Context, c *api.Client, args []string) error) func(*cobra.Command, []string) error {
	return a.run(func(ctx context.Context, args []string) error {
		state, err := api.StateDir(a.stateFlag)
		if err != nil {
			return err
		}
		return f(ctx, api.Dial(state), args)
	})
}

func (a *app) json() bool { return a.output == "json" }

// usageError marks an error as usage without changing its words.
type usageError struct{ err error }

func (e usageError) Error() string        { return e.err.Error() }
func (e usageError) Unwrap() error        { return e.err }
func (e usageError) Is(target error) bool { return target == ErrUsage }

func usage(err error) error                { return usageError{err} }
func usagef(format string, v ...any) error { return usageError{fmt.Errorf(format, v...)} }

// status prints err, if there is something to say, and returns the exit status.
func (a *app) status(c *cobra.Command, err error) int {
	switch {
	case err == nil:
		return a.exit
	case err == ErrFound:
		return exitFound
	case errors.Is(err, syscall.EPIPE):
		return exitFailed // who read us has seen enough
	}
	text, code := explain(err), exitFailed
	hint := ""
	switch {
	case errors.Is(err, ErrUsage), !a.parsed, api.IsUsage(err):
		code = exitUsage
		if !api.IsUsage(err) {
			hint = "see: " + c.CommandPath() + " --help"
		}
	case errors.Is(err, ErrFound), connect.CodeOf(err) == connect.CodeDataLoss:
		code = exitFound
	}
	fmt.Fprintf(a.std.Err, "vigia: %s\n", plainLines(text))
	if hint != "" {
		fmt.Fprintln(a.std.Err, hint)
	}
	return code
}

// explain finds the words that mean something to a person: the daemon's own, or the system's, without the layers between.
func explain(err error) string {
	var ue *url.Error
	switch {
	case errors.Is(err, context.Canceled) || connect.CodeOf(err) == connect.CodeCanceled:
		return "interrupted"
	case errors.As(err, &ue):
		return ue.Err.Error()
	}
	var ce *connect.Error
	if errors.As(err, &ce) && ce.Code() == connect.CodeUnimplemented {
		return "the daemon does not know this command: " + ce.Message() + "\nis it of another version? see: vigia info"
	}
	return api.Message(err)
}

// note tells the person something beside the result.
func (a *app) note(format string, v ...any) {
	fmt.Fprintf(a.std.Err, "vigia: %s\n", plainLines(fmt.Sprintf(format, v...)))
}

func missing(what string) error { return fmt.Errorf("%s is not in this build of vigia", what) }
