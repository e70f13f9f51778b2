package main

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"strconv"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"vigia/internal/jail"
)

// Outcome is what came of one confined process.
type Outcome struct {
	Error    string            `json:"error,omitempty"` // it did not start
	Measures []jail.Measure    `json:"measures,omitempty"`
	Compared []jail.Measure    `json:"compared,omitempty"`
	Seen     *jail.Observation `json:"seen,omitempty"`
	Said     json.RawMessage   `json:"said,omitempty"`
	Exit     string            `json:"exit,omitempty"`
	Log      string            `json:"log,omitempty"`
}

// drive starts the attempts named, each in a process of its own under the profile, as the user given. A refusal is a
// feature that the host is to lack: "namespaces" or "mounts".
// drive PROFILE UID REFUSAL ATTEMPT…
func drive(args []string) error {
	if err := refuse(args[2]); err != nil {
		return fmt.Errorf("refuse %s: %w", args[2], err)
	}
	uid, err := strconv.Atoi(args[1])
	if err != nil {
		return err
	}
	var user *jail.User
	if uid >= 0 {
		user = &jail.User{UID: uid, GID: uid}
	}
	outcomes := map[string]Outcome{}
	for _, a := range args[3:] {
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
	if err == nil && attempt == "sleep" {
		seen, oerr := jail.Observe(proc.PID)
		proc.Kill()
		if oerr != nil {
			return Outcome{Error: oerr.Error()}
		}
		return Outcome{Measures: proc.Measures, Seen: &seen, Compared: jail.Profiles[profile].Compare(seen), Exit: proc.Exit().String()}
	}
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
		return jail.QEMU{Binary: self, Args: []string{"try", attempt}, KVM: attempt == "open /dev/kvm", User: user, Stdout: out, Stderr: log}.Start(ctx)
	}
	if profile == "rogue" {
		ctx, cancel := context.WithTimeout(ctx, 300*time.Millisecond)
		defer cancel()
		return jail.Worker{Profile: jail.Guard, Args: []string{"rogue"}, User: user}.Start(ctx)
	}
	p, ok := jail.Profiles[profile]
	if !ok {
		return nil, fmt.Errorf("no profile %q", profile)
	}
	w := jail.Worker{Profile: p, Args: []string{"worker", profile, attempt}, User: user, Stdout: out, Stderr: log}
	if attempt == "serve" {
		s, err := newService()
		if err != nil {
			return nil, err
		}
		w.Files, w.Env = s.files, []string{"UPSTREAM=" + s.upstream}
	}
	return w.Start(ctx)
}

// refuse makes this process and all it starts live on a lesser host.
func refuse(feature string) error {
	refusal := jail.Refuse
	var rules []jail.Rule
	switch feature {
	case "":
		return nil
	case "namespaces":
		rules = []jail.Rule{{Call: unix.SYS_CLONE, Do: refusal, When: []jail.Arg{{Index: 0, Mask: unix.CLONE_NEWNS, OneOf: []uint32{unix.CLONE_NEWNS}}}}}
	case "mounts":
		rules = []jail.Rule{{Call: unix.SYS_MOUNT, Do: refusal}, {Call: unix.SYS_FSOPEN, Do: refusal}}
	case "landlock":
		rules = []jail.Rule{{Call: unix.SYS_LANDLOCK_CREATE_RULESET, Do: jail.Absent}}
	case "everything":
		rules = []jail.Rule{{Call: unix.SYS_LANDLOCK_CREATE_RULESET, Do: jail.Absent}, {Call: unix.SYS_MOUNT, Do: refusal}}
	default:
		return fmt.Errorf("no such feature")
	}
	prog, err := jail.Compile(rules, jail.Allow)
	if err != nil {
		return err
	}
	filter := make([]unix.SockFilter, len(prog))
	for i, p := range prog {
		filter[i] = unix.SockFilter{Code: p.Op, Jt: p.Jt, Jf: p.Jf, K: p.K}
	}
	if err := unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0); err != nil {
		return err
	}
	_, _, errno := unix.RawSyscall(unix.SYS_SECCOMP, unix.SECCOMP_SET_MODE_FILTER, unix.SECCOMP_FILTER_FLAG_TSYNC,
		uintptr(unsafe.Pointer(&unix.SockFprog{Len: uint16(len(filter)), Filter: &filter[0]})))
	if errno != 0 {
		return errno
	}
	return nil
}

// leave starts a process in QEMU's place, says which, and ends without ending it: leave UID [TAG].
func leave(args []string) error {
	uid, err := strconv.Atoi(args[0])
	if err != nil {
		return err
	}
	self, err := os.Executable()
	if err != nil {
		return err
	}
	q := jail.QEMU{Binary: self, Args: []string{"try", "sleep"}}
	if uid >= 0 {
		q.User = &jail.User{UID: uid, GID: uid}
	}
	if len(args) > 1 {
		q.Tag = args[1]
	}
	p, err := q.Start(context.Background())
	if err != nil {
		return err
	}
	return say(map[string]any{"PID": p.PID, "Start": p.StartTime})
}
