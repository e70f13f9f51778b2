// Package image makes and keeps images: read-only roots that machines start from.
//
// # The idea
//
// An image is everything a machine needs to boot, fixed for ever: a disk layer, a kernel, an initrd, the kernel's
// command line, and the profile of that kernel by which guest memory is understood. It never changes: what a machine
// writes goes into an overlay of its own, so all machines on an image share it, and a name that is given to a newer
// image leaves the machines on the older one as they were.
//
// An image is named by what it holds. Its id is the SHA-256 of a short text that lists its parts with their sizes and
// SHA-256s (see manifest.go); equal contents have one id and are kept once, and a changed bit is found by Verify.
//
//	images/
//	  3f1a…/            an image: the directory is the id
//	    image.json      what it is (versioned; doc/image-format.md)
//	    disk.layer      a frozen layer of the volume format
//	    vmlinuz         the kernel, as the boot protocol has it
//	    initrd          absent where the kernel needs none
//	    profile         what package kernel read from vmlinuz
//	    reference       vmlinuz's code as it must be in memory
//	    modules         its modules, for the same purpose
//	  names/debian      one line: the id
//	  .tmp/             images in the making; what is left of a crash is swept at Open
//
// # Where images come from
//
// Build runs a Recipe: mmdebstrap makes a Debian root, mke2fs puts it on a disk, and the initrd is written here.
// Import takes a disk somebody else made. A built root comes from signed packages and is trusted like the host; an
// imported disk is hostile, so its bytes are read only by a Worker, which the daemon runs in a confined process, and
// by a confined qemu-img: the Store moves descriptors and never looks inside.
//
// # Sources
//
// mmdebstrap(1), mke2fs(8), the kernel's Documentation/arch/x86/boot.rst and early-userspace/buffer-format.rst,
// QEMU's docs/interop/qcow2.rst.
package image

import (
	"errors"
	"time"
)

// What can be wrong with images. Each is wrapped with the name of the image or file and what to do.
var (
	ErrUnknown   = errors.New("no such image")
	ErrCorrupt   = errors.New("image is damaged")
	ErrNoKernel  = errors.New("image has no kernel in /boot")
	ErrNoRoot    = errors.New("disk has no ext4 root file system")
	ErrFormat    = errors.New("disk format")
	ErrTool      = errors.New("tool is missing")
	ErrPrivilege = errors.New("images cannot be built as this user")
)

// Names of the parts, which are the names of their files.
const (
	PartDisk    = "disk.layer"
	PartKernel  = "vmlinuz"
	PartInitrd  = "initrd"
	PartProfile = "profile"
	// PartReference is the kernel's code as it must be; images made before there was one lack it.
	PartReference = "reference"
	// PartModules are the kernel's modules, for the same purpose.
	PartModules = "modules"
)

// parts in the order in which the manifest lists them.
var parts = []string{PartDisk, PartInitrd, PartKernel, PartProfile, PartReference, PartModules}

// Info describes an image without opening it.
type Info struct {
	Name    string    `json:"name"` // empty: it has lost its name to a newer one
	ID      string    `json:"id"`
	Bytes   uint64    `json:"bytes"` // what it takes on the host's disk, all parts
	Created time.Time `json:"created"`
	Recipe  string    `json:"recipe"` // name of the recipe, or of the file it was imported from
	Digest  string    `json:"digest"` // Recipe.Digest of the recipe, empty for an import
	Kernel  string    `json:"kernel"` // its version
	Disk    uint64    `json:"disk_bytes"`
}

// Progress is told how a long operation goes on: the step in words, and how much of it is done where total is not 0.
type Progress func(step string, done, total int64)

// progressEvery is how often a step that goes on is reported again.
const progressEvery = 100 * time.Millisecond

// throttled passes on the beginning and the end of each step, and between them what is worth a look.
func (p Progress) throttled() Progress {
	if p == nil {
		return nil
	}
	var last string
	var at time.Time
	return func(step string, done, total int64) {
		if step == last && done != total && time.Since(at) < progressEvery {
			return
		}
		last, at = step, time.Now()
		p(step, done, total)
	}
}

func (p Progress) step(s string) {
	if p != nil {
		p(s, 0, 0)
	}
}
