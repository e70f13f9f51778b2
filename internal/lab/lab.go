// Package lab runs vigia from outside, as a person would: bin/vigia with a daemon on a state directory of its own. The
// demo and the benches are made with it; it is no part of vigia.
package lab

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"connectrpc.com/connect"

	"vigia/internal/api"
	"vigia/internal/api/vigiav1"
)

// Lab is a daemon and a client of it.
type Lab struct {
	Vigia  string // the program
	State  string // its state directory
	Client *api.Client

	daemon *exec.Cmd
	done   chan struct{}
}

// Start runs `vigia serve` on the state directory, which is made if need be, and waits until it answers. The program is
// bin/vigia below the working directory; flags are for serve.
func Start(ctx context.Context, state string, flags ...string) (*Lab, error) {
	state, err := filepath.Abs(state)
	if err != nil {
		return nil, err
	}
	vigia, err := filepath.Abs("bin/vigia")
	if err != nil {
		return nil, err
	}
	if err := os.MkdirAll(state, 0o700); err != nil {
		return nil, err
	}
	l := &Lab{Vigia: vigia, State: state, Client: api.Dial(state)}
	return l, l.serve(ctx, flags)
}

func (l *Lab) serve(ctx context.Context, flags []string) error {
	log, err := os.Create(filepath.Join(l.State, "serve.log"))
	if err != nil {
		return err
	}
	defer log.Close()
	l.daemon, l.done = exec.Command(l.Vigia, append([]string{"--state", l.State, "serve"}, flags...)...), make(chan struct{})
	l.daemon.Stdout, l.daemon.Stderr = log, log
	l.daemon.SysProcAttr = &syscall.SysProcAttr{Setpgid: true} // Ctrl-C is for us, who then end the daemon
	if err := l.daemon.Start(); err != nil {
		return err
	}
	go func() {
		l.daemon.Wait()
		close(l.done)
	}()
	for range 100 {
		if _, err := l.Client.Daemon.Info(ctx, connect.NewRequest(&vigiav1.InfoRequest{})); err == nil {
			return nil
		}
		select {
		case <-l.done:
			text, _ := os.ReadFile(log.Name())
			return fmt.Errorf("the daemon ended: %s", strings.TrimSpace(string(text)))
		case <-time.After(100 * time.Millisecond):
		}
	}
	l.End()
	return fmt.Errorf("the daemon does not answer: see %s", log.Name())
}

// PID is the daemon's.
func (l *Lab) PID() int { return l.daemon.Process.Pid }

// End stops the daemon.
func (l *Lab) End() {
	l.daemon.Process.Signal(syscall.SIGTERM)
	select {
	case <-l.done:
	case <-time.After(30 * time.Second):
		l.daemon.Process.Kill()
		<-l.done
	}
}

// Command runs the program on the lab's state and returns what it printed, and its exit status.
func (l *Lab) Command(ctx context.Context, args ...string) (output string, status int, err error) {
	cmd := exec.CommandContext(ctx, l.Vigia, append([]string{"--state", l.State}, args...)...)
	var out, errs bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errs
	err = cmd.Run()
	var exit *exec.ExitError
	if errors.As(err, &exit) {
		return out.String() + errs.String(), exit.ExitCode(), nil
	}
	return out.String(), 0, err
}

// Must is Command where anything but success is an error.
func (l *Lab) Must(ctx context.Context, args ...string) error {
	out, status, err := l.Command(ctx, args...)
	if err == nil && status != 0 {
		err = fmt.Errorf("vigia %s: exit status %d: %s", strings.Join(args, " "), status, strings.TrimSpace(out))
	}
	return err
}

// Build makes an image of a recipe file; one of an earlier run whose recipe has not changed is taken as it is.
func (l *Lab) Build(ctx context.Context, recipe, name string, progress func(step string)) (*vigiav1.Image, error) {
	text, err := os.ReadFile(recipe)
	if err != nil {
		return nil, err
	}
	file, err := filepath.Abs(recipe)
	if err != nil {
		return nil, err
	}
	stream, err := l.Client.Images.Build(ctx, connect.NewRequest(&vigiav1.BuildRequest{RecipeYaml: text, RecipeFile: file, Name: name, Reuse: true}))
	if err != nil {
		return nil, err
	}
	defer stream.Close()
	var made *vigiav1.Image
	for stream.Receive() {
		if made = stream.Msg().Image; made == nil {
			progress(stream.Msg().Step)
		}
	}
	return made, stream.Err()
}

// Show returns how a machine is.
func (l *Lab) Show(ctx context.Context, machine string) (*vigiav1.Machine, error) {
	m, err := l.Client.Machines.Show(ctx, connect.NewRequest(&vigiav1.MachineRequest{Name: machine}))
	if err != nil {
		return nil, err
	}
	return m.Msg, nil
}
