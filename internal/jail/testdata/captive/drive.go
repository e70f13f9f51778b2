package main

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"strconv"

	"vigia/internal/jail"
)

// Outcome is what came of one confined process.
type Outcome struct {
	Error    string          `json:"error,omitempty"` // it did not start
	Measures []jail.Measure  `json:"measures,omitempty"`
	Said     json.RawMessage `json:"said,omitempty"`
	Exit     string          `json:"exit,omitempty"`
	Log      string          `json:"log,omitempty"`
}

// drive starts the attempts named, each in a process of its own under the profile, as the user given.
// drive PROFILE UID ATTEMPT…
func drive(args []string) error {
	uid, err := strconv.Atoi(args[1])
	if err != nil {
		return err
	}
	var user *jail.User
	if uid >= 0 {
		user = &jail.User{UID: uid, GID: uid}
	}
	outcomes := map[string]Outcome{}
	for _, a := range args[2:] {
		outcomes[a] = one(args[0], user, a)
	}
	return say(outcomes)
}

func one(profile string, user *jail.User, attempt string) Outcome {
	outRead, outWrite, _ := os.Pipe()
	errRead, errWrite, _ := os.Pipe()
	proc, err := start(profile, user, attempt, outWrite, errWrite)
	outWrite.Close()
	errWrite.Close()
	logged := make(chan []byte)
	go func() {
		b, _ := io.ReadAll(errRead)
		logged <- b
	}()
	said, _ := io.ReadAll(outRead)
	o := Outcome{Log: string(<-logged)}
	if json.Valid(bytes.TrimSpace(said)) {
		o.Said = bytes.TrimSpace(said)
	}
	if err != nil {
		o.Error = err.Error()
		return o
	}
	o.Measures, o.Exit = proc.Measures, proc.Exit().String()
	proc.Close()
	return o
}

func start(profile string, user *jail.User, attempt string, out, log *os.File) (*jail.Process, error) {
	ctx := context.Background()
	if profile == "qemu" {
		self, err := os.Executable()
		if err != nil {
			return nil, err
		}
		return jail.QEMU{Binary: self, Args: []string{"try", attempt}, User: user, Stdout: out, Stderr: log}.Start(ctx)
	}
	p, ok := jail.Profiles[profile]
	if !ok {
		return nil, fmt.Errorf("no profile %q", profile)
	}
	return jail.Worker{Profile: p, Args: []string{"worker", profile, attempt}, User: user, Stdout: out, Stderr: log}.Start(ctx)
}
