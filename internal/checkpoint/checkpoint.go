// Package checkpoint keeps the checkpoints of machines: the records, their tree, their files.
//
// A checkpoint is a machine at one instant: its memory, the state of its devices, and its disk as a chain of frozen layers.
// Each lies in a directory named by its id:
//
//	STATE/checkpoints/ID/record.json   what it is, and the sums of the others; see doc/checkpoint-format.md
//	STATE/checkpoints/ID/memory        pages that differ from the parent's (package page)
//	STATE/checkpoints/ID/devices       the state of the devices, compressed
//	STATE/checkpoints/.new-ID/         one that is being made
//	STATE/layers/NAME.vol              the disk's layers, shared by machines and checkpoints
//
// A directory appears under its name when all in it is on the disk, and not before: whatever is killed leaves a .new-
// directory, which the next start removes. The parent of a checkpoint is the one on which its memory lies. One that is
// removed while others lie on it is only marked: it is not listed any more, and goes when the last of them does.
//
// This package reads records, which the daemon wrote. What a guest had a hand in, memory and devices, is read by the keeper
// alone; its package page is kept out of the daemon.
package checkpoint

import (
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"regexp"
	"time"

	"vigia/internal/vm"
)

// ID names a checkpoint for ever: 16 lower-case hexadecimal digits.
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
		return "", fmt.Errorf("%w: checkpoint %q: an id has 16 hexadecimal digits", vm.ErrInvalid, s)
	}
	return ID(s), nil
}

// How a checkpoint's memory was taken.
const (
	Protected = "protected" // protected at the instant, copied while the guest ran on
	Copied    = "copied"    // copied while the guest stood still
)

// What its disk is like.
const (
	CrashConsistent = "crash-consistent" // as after a power cut: what was flushed is there
	Frozen          = "frozen"           // by the guest's own agent, and by the disk: all that it wrote is there
)

// Record is what is known of a checkpoint.
type Record struct {
	ID        ID        `json:"id"`
	Machine   vm.ID     `json:"machine"`
	Name      string    `json:"name"` // of the machine, then
	Parent    ID        `json:"parent,omitempty"`
	Time      time.Time `json:"time"`
	Label     string    `json:"label,omitempty"`
	Stable    bool      `json:"stable,omitempty"` // a state to fall back to
	Removed   bool      `json:"removed,omitempty"`
	Scheduled bool      `json:"scheduled,omitempty"` // made by the machine's rule
	Panicked  bool      `json:"panicked,omitempty"`  // its guest stood still in a panic
	How       string    `json:"how"`
	Why       string    `json:"why,omitempty"` // why it was copied
	Disk      string    `json:"disk"`
	DiskWhy   string    `json:"disk_why,omitempty"` // why the guest's agent, which was asked, did not freeze it

	FrozenSeconds float64 `json:"frozen_seconds,omitempty"` // for how long the guest could not write

	Reseeds      *int64  `json:"reseeds,omitempty"` // how often its kernel had drawn its random numbers' state anew; nil: not known
	PauseSeconds float64 `json:"pause_seconds"`
	Seconds      float64 `json:"seconds"` // until all was on the disk
	MemoryBytes  int64   `json:"memory_bytes"`
	DevicesBytes int64   `json:"devices_bytes"`
	DiskBytes    int64   `json:"disk_bytes"` // of the layer that was frozen
	Pages        int64   `json:"pages"`
	MemorySum    string  `json:"memory_sum"`
	DevicesSum   string  `json:"devices_sum"`

	Spec        vm.Spec  `json:"spec"`
	Origin      vm.ID    `json:"origin"` // whose hardware it is
	Accelerator string   `json:"accelerator"`
	QEMU        string   `json:"qemu"`   // its version: another may not load the devices
	Layers      []string `json:"layers"` // of the disk, over the image's, the lowest first
}

// Bytes is what the checkpoint takes on the disk.
func (r *Record) Bytes() int64 { return r.MemoryBytes + r.DevicesBytes + r.DiskBytes }

// Errors of this package.
var (
	ErrNotFound = errors.New("no such checkpoint")
	ErrDamaged  = errors.New("checkpoint is damaged")
)

// The sub-commands of the processes that work on a machine's memory (package keeper), and what QEMU needs for a moment so
// that its memory can be protected.
const (
	KeeperCommand = "keeper"
	PlantCommand  = "plant"
	Device        = "/dev/userfaultfd"
)
