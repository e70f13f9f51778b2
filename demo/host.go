package main

import (
	"context"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"
)

// clean removes the machine, whatever became of the play.
func (s *stage) clean() {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	s.intruder.close()
	s.Command(ctx, "rm", "--force", machineName)
}

// image builds the machine's image, where no earlier run has.
func (s *stage) image(ctx context.Context) error {
	img, err := s.Build(ctx, "recipes/demo.yaml", "demo", func(step string) { s.progress("%s", step) })
	if err != nil {
		return err
	}
	s.progress("image %s: %d MB, kernel %s", img.Id[:12], img.Bytes>>20, img.Kernel)
	return nil
}

func (s *stage) start(ctx context.Context) error {
	s.Command(ctx, "rm", "--force", machineName) // of a run that was cut short
	if err := s.Must(ctx, "run", "demo", machineName, "--memory", "512M", "--publish", "0:22", "--owner", "demo", "--purpose", "an intrusion"); err != nil {
		return err
	}
	m, err := s.Show(ctx, machineName)
	if err != nil {
		return err
	}
	published := m.Publish[0] // 127.0.0.1:40123:22/tcp
	s.port = strings.Split(published, ":")[1]
	confined := 0
	for _, i := range m.Isolation {
		if i.InForce {
			confined++
		}
	}
	s.progress("%s, accelerator %s, ssh at 127.0.0.1:%s, %d measures of confinement in force", m.State, m.Accelerator, s.port, confined)
	return nil
}

// verify checks the ledger with the program that anyone can run on a copy of it.
func (s *stage) verify(ctx context.Context) error {
	out, status, err := s.Command(ctx, "ledger", "verify")
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
	if err := os.CopyFS(copied+"/ledger", os.DirFS(filepath.Join(s.State, "ledger"))); err != nil {
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
	out, status, err := s.Command(ctx, "ledger", "verify", "--dir", copied+"/ledger")
	if err != nil {
		return err
	}
	if status != 3 {
		return fmt.Errorf("verification of a forged copy ended with status %d: %s", status, out)
	}
	s.progress("exit status 3: %s", strings.TrimSpace(strings.ReplaceAll(out, copied+"/", "")))
	return nil
}
