// Package vm holds the words for machines: names, ids, specifications, states.
//
// It does no I/O and knows no other package. Every value that a person types (a name, a size, a port to publish)
// has its one parser here, so that the command line, the API and the daemon refuse the same things with the same words.
//
// A machine has a Name, chosen by a person and free again once the machine is removed, and an ID, random and never
// reused: files and control groups are named by it, and machine.created tells which name it had.
package vm

import (
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"regexp"
	"time"
)

// ErrInvalid is wrapped by every error of this package's parsers.
var ErrInvalid = errors.New("invalid value")

var namePattern = regexp.MustCompile(`^[a-z0-9-]{1,63}$`)

// ParseName accepts a machine's or image's name: 1 to 63 of a–z, 0–9 and '-', not starting with '-'.
func ParseName(s string) (string, error) {
	if !namePattern.MatchString(s) || s[0] == '-' {
		return "", fmt.Errorf("%w: name %q: use 1 to 63 of a-z, 0-9 and '-', not starting with '-'", ErrInvalid, s)
	}
	return s, nil
}

// ID identifies one machine for ever: 16 lower-case hexadecimal digits.
type ID string

var idPattern = regexp.MustCompile(`^[0-9a-f]{16}$`)

// NewID returns a random ID.
func NewID() ID {
	var b [8]byte
	rand.Read(b[:])
	return ID(hex.EncodeToString(b[:]))
}

// ParseID accepts the text form of an ID.
func ParseID(s string) (ID, error) {
	if !idPattern.MatchString(s) {
		return "", fmt.Errorf("%w: machine id %q: want 16 hexadecimal digits", ErrInvalid, s)
	}
	return ID(s), nil
}

// State is what a machine is doing now.
type State string

// The states of a machine. Quarantined machines run, but are cut off; Failed ones ended in a way nobody asked for.
const (
	Stopped     State = "stopped"
	Starting    State = "starting"
	Running     State = "running"
	Paused      State = "paused"
	Quarantined State = "quarantined"
	Stopping    State = "stopping"
	Failed      State = "failed"
)

// Ended says how a machine's last run came to its end.
type Ended string

// The ways a run ends. They are told apart by QEMU's own words (SHUTDOWN, GUEST_PANICKED, RESET) and by its exit.
const (
	EndedNone     Ended = ""
	EndedPowerOff Ended = "poweroff"  // the guest powered itself off
	EndedReboot   Ended = "reboot"    // the guest rebooted and the spec says not to go on
	EndedPanic    Ended = "panic"     // the guest kernel panicked
	EndedStopped  Ended = "stopped"   // stopped from outside, gracefully
	EndedForced   Ended = "forced"    // stopped from outside, after the graceful time was over
	EndedQEMU     Ended = "qemu-died" // QEMU itself ended: killed, crashed, refused its arguments
)

// Limits of a Spec. MaxCPUs follows q35's default limit; MinMemory is what a cloud kernel boots with.
const (
	MinMemory = 96 << 20
	MaxMemory = 1 << 40
	MaxCPUs   = 64
)

// Spec is what a person asked for. It never changes by itself; what is known of a machine is Status.
type Spec struct {
	Name      string            `json:"name"`
	ID        ID                `json:"id"`
	Image     string            `json:"image"`    // the image's name when the machine was made
	ImageID   string            `json:"image_id"` // the image's content address
	Memory    uint64            `json:"memory_bytes"`
	CPUs      int               `json:"cpus"`
	Publish   []Publish         `json:"publish,omitempty"`
	Net       Net               `json:"net"`
	Identity  Identity          `json:"identity,omitzero"`
	Additions []string          `json:"additions,omitempty"`
	Owner     string            `json:"owner,omitempty"`
	Purpose   string            `json:"purpose,omitempty"`
	Expires   time.Time         `json:"expires,omitzero"`
	Labels    map[string]string `json:"labels,omitempty"`
	Probe     string            `json:"probe,omitempty"`  // auto where empty
	Record    bool              `json:"record,omitempty"` // each run is recorded, so that it can be replayed
	Keep      Keep              `json:"keep,omitzero"`    // what of its input is kept
	Created   time.Time         `json:"created"`
}

// Has reports whether the addition is switched on.
func (s *Spec) Has(addition string) bool {
	for _, a := range s.Additions {
		if a == addition {
			return true
		}
	}
	return false
}

// Additions known to this version. Exec connects the guest agent for commands and copies.
const AdditionExec = "exec"

// ParseAddition accepts the name of an addition.
func ParseAddition(s string) (string, error) {
	if s != AdditionExec {
		return "", fmt.Errorf("%w: addition %q: known additions: exec", ErrInvalid, s)
	}
	return s, nil
}

// How it is found out what processes do: by a plugin in QEMU where that is possible, never, or not without it.
const (
	ProbeAuto = "auto"
	ProbeOff  = "off"
	ProbeOn   = "on"
)

// Check reports the first thing wrong with the spec.
func (s *Spec) Check() error {
	if _, err := ParseName(s.Name); err != nil {
		return err
	}
	if s.Memory < MinMemory || s.Memory > MaxMemory {
		return fmt.Errorf("%w: memory %s: use %s to %s", ErrInvalid, FormatSize(s.Memory), FormatSize(MinMemory), FormatSize(MaxMemory))
	}
	if s.Memory%(2<<20) != 0 {
		return fmt.Errorf("%w: memory %s: use a multiple of 2 MiB", ErrInvalid, FormatSize(s.Memory))
	}
	if s.CPUs < 1 || s.CPUs > MaxCPUs {
		return fmt.Errorf("%w: cpus %d: use 1 to %d", ErrInvalid, s.CPUs, MaxCPUs)
	}
	if err := checkText("owner", s.Owner); err != nil {
		return err
	}
	if err := checkText("purpose", s.Purpose); err != nil {
		return err
	}
	if s.Probe != "" && s.Probe != ProbeAuto && s.Probe != ProbeOff && s.Probe != ProbeOn {
		return fmt.Errorf("%w: probe %q: use auto, off or on", ErrInvalid, s.Probe)
	}
	for _, a := range s.Additions {
		if _, err := ParseAddition(a); err != nil {
			return err
		}
	}
	if err := s.Keep.Check(); err != nil {
		return err
	}
	if s.Record && s.CPUs != 1 {
		return fmt.Errorf("%w: cpus %d: a machine that is recorded has one", ErrInvalid, s.CPUs)
	}
	if s.Record && len(s.Additions) > 0 {
		return fmt.Errorf("%w: additions: what comes through them is not recorded: leave them out, or --record", ErrInvalid)
	}
	for k, v := range s.Labels {
		if _, err := ParseName(k); err != nil {
			return fmt.Errorf("label: %w", err)
		}
		if err := checkText("label "+k, v); err != nil {
			return err
		}
	}
	seen := map[string]bool{}
	for _, p := range s.Publish {
		key := p.Protocol + p.Host.String()
		if p.Host.Port() != 0 && seen[key] {
			return fmt.Errorf("%w: publish %s: the host port is named twice", ErrInvalid, p)
		}
		seen[key] = true
	}
	if err := s.Identity.Check(); err != nil {
		return err
	}
	return s.Net.Check()
}

// checkText keeps free text short and on one line, so that it can stand in a table and in an event.
func checkText(what, s string) error {
	if len(s) > 200 {
		return fmt.Errorf("%w: %s: %d bytes, use at most 200", ErrInvalid, what, len(s))
	}
	for _, r := range s {
		if r < 0x20 || r == 0x7f {
			return fmt.Errorf("%w: %s: has a control character", ErrInvalid, what)
		}
	}
	return nil
}
