package cli_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"github.com/rogpeppe/go-internal/testscript"

	"vigia/internal/cli"
)

func TestMain(m *testing.M) {
	testscript.Main(m, map[string]func(){"vigia": vigia})
}

// vigia is the program as the scripts start it: the real command line, over a fake daemon and fake local functions.
func vigia() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	defer stop()
	os.Exit(cli.Main(ctx, os.Args[1:], cli.Streams{In: os.Stdin, Out: os.Stdout, Err: os.Stderr}, local))
}

// TestScript runs testdata/script: each file is one conversation of a person with vigia. A daemon listens on
// $VIGIA_STATE; `status N vigia …` wants exactly that exit status.
func TestScript(t *testing.T) {
	testscript.Run(t, testscript.Params{
		Dir:             "testdata/script",
		UpdateScripts:   os.Getenv("UPDATE") != "",
		ContinueOnError: true,
		Setup: func(env *testscript.Env) error {
			state := filepath.Join(env.WorkDir, ".state")
			stop, err := serveFake(state)
			if err != nil {
				return err
			}
			env.Defer(stop)
			env.Setenv("VIGIA_STATE", state)
			env.Setenv("GORACE", "atexit_sleep_ms=0") // else each command under -race sleeps a second at its end
			return nil
		},
		Cmds: map[string]func(*testscript.TestScript, bool, []string){"status": status},
	})
}

func status(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) < 2 {
		ts.Fatalf("usage: status N command…")
	}
	want, err := strconv.Atoi(args[0])
	ts.Check(err)
	got := 0
	var exit *exec.ExitError
	if err := ts.Exec(args[1], args[2:]...); errors.As(err, &exit) {
		got = exit.ExitCode()
	} else {
		ts.Check(err)
	}
	if got != want {
		ts.Fatalf("%s ended with %d, not %d", strings.Join(args[1:], " "), got, want)
	}
}

// local stands for what cmd/vigia gives: it shows what it was called with.
var local = cli.Local{
	Version: "v0.1.0-test",
	Serve: func(_ context.Context, o cli.ServeOptions) error {
		fmt.Fprintf(o.Err, "serving %s accelerator=%s rules=%s\n", filepath.Base(o.State), o.Accelerator, o.Rules)
		return nil
	},
	Doctor: func(_ context.Context, state string, asJSON bool, w io.Writer) error {
		_, err := fmt.Fprintf(w, "doctor %s json=%t\n", filepath.Base(state), asJSON)
		return err
	},
	PolicyCheck: func(files []string, w io.Writer) error {
		fmt.Fprintf(w, "checked %s\n", strings.Join(files, " "))
		if files[0] == "bad.yaml" {
			return fmt.Errorf("bad.yaml:3: unknown response \"explode\"\nknown are alert, pause, quarantine, stop%w", found)
		}
		return nil
	},
	PolicyTest: func(file, events string, asJSON bool, w io.Writer) error {
		_, err := fmt.Fprintf(w, "%s on %s json=%t\n", file, events, asJSON)
		return err
	},
	LedgerVerify: func(_ context.Context, o cli.LedgerOptions, asJSON bool, w io.Writer) error {
		fmt.Fprintf(w, "dir=%s key=%s json=%t\n", o.Dir, o.Key, asJSON)
		if o.Dir == "flipped" {
			return fmt.Errorf("ledger flipped: entry 7 is not what was signed: %w", cli.ErrFound)
		}
		return nil
	},
	LedgerExport: func(_ context.Context, o cli.LedgerOptions, w io.Writer) error {
		fmt.Fprintf(w, "exported %s dir=%s\n", filepath.Base(o.State), o.Dir)
		if o.Dir == "torn" {
			return errors.New("ledger torn: entry 7 is missing")
		}
		return nil
	},
	VolumeCheck: func(_ context.Context, state, target string, asJSON bool, w io.Writer) error {
		if target == "broken" {
			fmt.Fprintln(w, "broken: block 9 fails its sum")
			return cli.ErrFound
		}
		_, err := fmt.Fprintf(w, "%s is sound\n", target)
		return err
	},
}

// found wraps ErrFound without its words, as a Local function may.
var found = quiet{}

type quiet struct{}

func (quiet) Error() string { return "" }
func (quiet) Unwrap() error { return cli.ErrFound }
