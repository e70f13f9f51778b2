package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"vigia/internal/api/vigiav1"

	"connectrpc.com/connect"
)

// command runs bin/vigia as a person would and returns what it printed and its exit status.
func (s *stage) command(ctx context.Context, args ...string) (stdout string, status int, err error) {
	cmd := exec.CommandContext(ctx, s.vigia, append([]string{"--state", s.state}, args...)...)
	var out, errs bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errs
	err = cmd.Run()
	var exit *exec.ExitError
	if errors.As(err, &exit) {
		return out.String() + errs.String(), exit.ExitCode(), nil
	}
	return out.String(), 0, err
}

// must is command where anything but success ends the demo.
func (s *stage) must(ctx context.Context, args ...string) error {
	out, status, err := s.command(ctx, args...)
	if err == nil && status != 0 {
		err = fmt.Errorf("vigia %s: exit status %d: %s", strings.Join(args, " "), status, strings.TrimSpace(out))
	}
	return err
}

// process is the daemon of the demo.
type process struct {
	cmd  *exec.Cmd
	done chan struct{}
}

// serve starts a daemon on the demo's state and waits until it answers.
func (s *stage) serve(ctx context.Context) (*process, error) {
	log, err := os.Create(filepath.Join(s.state, "serve.log"))
	if err != nil {
		return nil, err
	}
	defer log.Close()
	p := &process{cmd: exec.Command(s.vigia, "--state", s.state, "serve"), done: make(chan struct{})}
	p.cmd.Stdout, p.cmd.Stderr = log, log
	p.cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true} // Ctrl-C is for the demo, which then ends the daemon
	if err := p.cmd.Start(); err != nil {
		return nil, err
	}
	go func() {
		p.cmd.Wait()
		close(p.done)
	}()
	for range 100 {
		if _, err := s.client.Daemon.Info(ctx, connect.NewRequest(&vigiav1.InfoRequest{})); err == nil {
			return p, nil
		}
		select {
		case <-p.done:
			text, _ := os.ReadFile(log.Name())
			return nil, fmt.Errorf("the daemon ended: %s", strings.TrimSpace(string(text)))
		case <-time.After(100 * time.Millisecond):
		}
	}
	p.end()
	return nil, fmt.Errorf("the daemon does not answer: see %s", log.Name())
}

func (p *process) end() {
	p.cmd.Process.Signal(syscall.SIGTERM)
	select {
	case <-p.done:
	case <-time.After(30 * time.Second):
		p.cmd.Process.Kill()
		<-p.done
	}
}

// clean removes the machine, whatever became of the play.
func (s *stage) clean() {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	s.intruder.close()
	s.command(ctx, "rm", "--force", machineName)
}

// image builds the machine's image; one of an earlier run whose recipe has not changed is taken as it is.
func (s *stage) image(ctx context.Context) error {
	recipe, err := os.ReadFile("recipes/demo.yaml")
	if err != nil {
		return err
	}
	file, err := filepath.Abs("recipes/demo.yaml")
	if err != nil {
		return err
	}
	stream, err := s.client.Images.Build(ctx, connect.NewRequest(&vigiav1.BuildRequest{RecipeYaml: recipe, RecipeFile: file, Name: "demo", Reuse: true}))
	if err != nil {
		return err
	}
	defer stream.Close()
	for stream.Receive() {
		p := stream.Msg()
		if p.Image != nil {
			s.progress("image %s: %d MB, kernel %s", p.Image.Id[:12], p.Image.Bytes>>20, p.Image.Kernel)
			continue
		}
		s.progress("%s", p.Step)
	}
	return stream.Err()
}

func (s *stage) start(ctx context.Context) error {
	s.command(ctx, "rm", "--force", machineName) // of a run that was cut short
	if err := s.must(ctx, "run", "demo", machineName, "--memory", "512M", "--publish", "0:22", "--owner", "demo", "--purpose", "an intrusion"); err != nil {
		return err
	}
	m, err := s.client.Machines.Show(ctx, connect.NewRequest(&vigiav1.MachineRequest{Name: machineName}))
	if err != nil {
		return err
	}
	published := m.Msg.Publish[0] // 127.0.0.1:40123:22/tcp
	s.port = strings.Split(published, ":")[1]
	confined := 0
	for _, i := range m.Msg.Isolation {
		if i.InForce {
			confined++
		}
	}
	s.progress("%s, accelerator %s, ssh at 127.0.0.1:%s, %d measures of confinement in force", m.Msg.State, m.Msg.Accelerator, s.port, confined)
	return nil
}

// verify checks the ledger with the program that anyone can run on a copy of it.
func (s *stage) verify(ctx context.Context) error {
	out, status, err := s.command(ctx, "ledger", "verify")
	if err != nil || status != 0 {
		return fmt.Errorf("exit status %d, %w: %s", status, err, out)
	}
	s.progress("%s", strings.TrimSpace(out))
	return nil
}

// flipBit changes one bit of one entry in a copy of the ledger: verification must fail with the status of a finding.
func (s *stage) flipBit(ctx context.Context) error {
	copied, err := os.MkdirTemp("", "vigia-demo-ledger-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(copied)
	if err := os.CopyFS(copied+"/ledger", os.DirFS(filepath.Join(s.state, "ledger"))); err != nil {
		return err
	}
	var bundle string
	err = filepath.WalkDir(copied+"/ledger/tile/entries", func(path string, d fs.DirEntry, err error) error {
		if err == nil && d.Type().IsRegular() && bundle == "" {
			bundle = path
		}
		return err
	})
	if err != nil || bundle == "" {
		return fmt.Errorf("no entries in the copy: %w", err)
	}
	data, err := os.ReadFile(bundle)
	if err != nil {
		return err
	}
	data[len(data)/2] ^= 0x10
	if err := os.Chmod(bundle, 0o600); err != nil {
		return err
	}
	if err := os.WriteFile(bundle, data, 0o600); err != nil {
		return err
	}
	out, status, err := s.command(ctx, "ledger", "verify", "--dir", copied+"/ledger")
	if err != nil {
		return err
	}
	if status != 3 {
		return fmt.Errorf("verification of a forged copy ended with status %d: %s", status, out)
	}
	s.progress("exit status 3: %s", strings.TrimSpace(strings.ReplaceAll(out, copied+"/", "")))
	return nil
}
