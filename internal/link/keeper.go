package link

import "time"

// The calls of a keeper: the worker that takes and puts back a machine's memory. It has no outbox, speaks on the one socket
// it is given, and ends with its daemon.
const (
	CallKeep    = "keep"    // Keep, with the machine's memory: whose keeper this is
	CallChain   = "chain"   // Chain, with checkpoints' memory files: what was saved last, or is to be put back
	CallBegin   = "begin"   // Begin, with the files named there
	CallFinish  = "finish"  // → Saved, once all is on the disk
	CallAbort   = "abort"   // the checkpoint that was begun is not wanted
	CallRestore = "restore" // Restore, with the files named there: the chain's memory and the devices' state, unpacked

	CallArm = "arm" // from the guard, while the guest stands still: memory is taken as it is now

	// Of a guard.
	CallHand       = "hand"       // with a descriptor, which QEMU gets → Handed
	CallTakeBack   = "take-back"  // Handed: QEMU closes it
	CallCheckpoint = "checkpoint" // Checkpoint, with the files named there → Checkpointed
	CallIncoming   = "incoming"   // with a file of devices' state: QEMU, which waits for it, loads it
	CallArrive     = "arrive"     // Arrive, once the guest that was loaded runs → Arrived
	CallMemory     = "memory"     // Memory, with /proc/PID/mem of a QEMU whose memory is private
)

// Names of the descriptors that go with the calls.
const (
	FileProtector  = "protector"   // a userfaultfd of QEMU; without it memory is copied while the guest stands still
	FileOut        = "out"         // the checkpoint's memory, to be written
	FileDevices    = "devices"     // the devices' state as QEMU writes or reads it
	FileDevicesOut = "devices-out" // the same, packed
	FileKeeper     = "keeper"      // a socket between guard and keeper
)

// Keep says whose memory a keeper keeps. Base is where QEMU has mapped it; Private, that FileRAM is its /proc/PID/mem.
type Keep struct {
	Memory  uint64   `json:"memory_bytes"`
	Base    uint64   `json:"base"`
	Private bool     `json:"private"`
	Files   []string `json:"files"`
}

// Chain is a part of a chain, oldest first; the last one says so. Sums are those of the checkpoints' records.
type Chain struct {
	First bool     `json:"first"`
	Last  bool     `json:"last"`
	Adopt bool     `json:"adopt"` // the machine's last checkpoint is the chain's end
	Sums  []string `json:"sums"`
}

// Begin names a checkpoint and the one it continues, empty for none.
type Begin struct {
	ID     string   `json:"id"`
	Parent string   `json:"parent"`
	Files  []string `json:"files"`
}

// Saved is what a keeper has written.
type Saved struct {
	Pages       int64   `json:"pages"` // in the file
	Same        int64   `json:"same"`  // read, and found as they were
	Bytes       int64   `json:"bytes"`
	Sum         string  `json:"sum"`
	DevicesSum  string  `json:"devices_sum"`
	DevicesSize int64   `json:"devices_size"`
	Seconds     float64 `json:"seconds"` // from the instant until all was on the disk
}

// Restore says what the files must be.
type Restore struct {
	DevicesSum string   `json:"devices_sum"`
	Files      []string `json:"files"`
}

// Handed names a descriptor in QEMU.
type Handed struct {
	FD  int `json:"fd"`
	Set int `json:"set"`
}

// Checkpoint asks for the instant. Files: FileDevices, FileKeeper and, for the disk, FileOverlay, which takes the writes
// from then on. A guest that is paused stays so.
type Checkpoint struct {
	Freeze bool     `json:"freeze"` // its file systems too, where its agent does that
	Files  []string `json:"files"`
}

// Checkpointed says how it went. Swapped is told with an error too: the disk's overlay is frozen, whatever failed then.
type Checkpointed struct {
	PauseSeconds float64   `json:"pause_seconds"` // QEMU stood still for so long
	Swapped      bool      `json:"swapped"`
	Failed       string    `json:"failed"` // why there is no checkpoint; empty: there is
	At           time.Time `json:"at"`     // since when it stood still

	Frozen        bool    `json:"frozen"`         // the guest's file systems were
	NotFrozen     string  `json:"not_frozen"`     // why not, where its agent was asked
	FrozenSeconds float64 `json:"frozen_seconds"` // from asking until they were thawed

	Reseeds *int64 `json:"reseeds"` // how often the guest's kernel had drawn its randomness anew; nil: that can't be read
}

// Arrive is told of a guest that goes on from a checkpoint.
type Arrive struct {
	Frozen   bool      `json:"frozen"`   // it was saved with its file systems held still
	Identify *Identify `json:"identify"` // what it shall be called; nil: as it is
	Reseeds  *int64    `json:"reseeds"`  // its kernel had drawn its randomness anew so often; nil: nobody knows
}

// Identify is a name and addresses of a guest's own; what is empty stays as it is.
type Identify struct {
	OldMAC   string `json:"old_mac"`
	MAC      string `json:"mac"`
	Address  string `json:"address"` // with its prefix
	Gateway  string `json:"gateway"`
	Hostname string `json:"hostname"`
}

// Arrived says what was done for it.
type Arrived struct {
	Thawed bool `json:"thawed"`

	Identified  bool   `json:"identified"`
	IdentifyWhy string `json:"identify_why"` // why not, where it was asked for

	ClockSet   bool     `json:"clock_set"`   // by the guest's agent
	ClockWhy   string   `json:"clock_why"`   // why not
	Behind     *float64 `json:"behind"`      // seconds that its clock is behind, read in its memory; nil: that can't be read
	ReseededBy string   `json:"reseeded_by"` // vmgenid or additions; empty: by nobody
	ReseedSeen bool     `json:"reseed_seen"` // it was, in the kernel's memory; else it is the agent's word
	ReseedWhy  string   `json:"reseed_why"`  // why by nobody
}

// Who makes a guest draw its randomness anew.
const (
	ByVMGenID   = "vmgenid"   // its own kernel, told by a device
	ByAdditions = "additions" // its agent, asked to
)

// Memory says where QEMU has mapped its guest's memory.
type Memory struct {
	Base uint64 `json:"base"`
}
