package link

import (
	"encoding/json"
	"net/netip"
	"time"

	"vigia/internal/vm"
)

// The calls between the daemon and its workers. Files go along in the order that the body's Files names them.
const (
	// Both workers, from the daemon.
	CallHello     = "hello"     // → Hello
	CallConfigure = "configure" // GuardConfig or GateConfig, once in a worker's life
	CallAck       = "ack"       // Ack: events up to here are in the ledger

	CallDrain  = "drain"  // returns once every event is delivered
	CallEnding = "ending" // tells what was held back, once QEMU is gone; of a guard → machine.Ending

	// Both workers, to the daemon.
	CallEvents = "events" // Events

	CallKeepInputs = "keep-inputs" // KeepInputs: what enters from now on is kept; once
	CallPlay       = "play"        // gives again what had entered another machine, until all is given → Played. Of a guard with Play

	// Guard.
	CallRun         = "run"   // waits for QEMU's monitor, then lets the guest go
	CallWatch       = "watch" // Watch: the paths whose every access is an event
	CallCPU         = "cpu"   // CPU: descriptors of the vCPU threads' schedstat files
	CallPause       = "pause"
	CallResume      = "resume"
	CallPowerDown   = "powerdown"
	CallQuit        = "quit"
	CallReplace     = "replace"   // with a frozen layer, which takes the place of those it is made of → Replaced
	CallHold        = "hold"      // a guest that stands still after a panic is not ended yet
	CallGuardStatus = "status"    // → GuardStatus
	CallRAM         = "ram"       // → the RAM file's descriptor, for a guard to come
	CallProcesses   = "processes" // the views, each with a pipe for its rows: ReadRows (rows.go, views.go)
	CallModules     = "modules"
	CallSockets     = "sockets"
	CallFiles       = "files"          // OfProcess
	CallMaps        = "maps"           // OfProcess
	CallKernel      = "kernel"         // → System; no pipe
	CallCheck       = "check"          // all checks, now → CheckReport
	CallSchedule    = "check-schedule" // CheckSchedule
	CallConsole     = "console"        // with a connected socket, which becomes the serial line
	CallShown       = "shown"          // what went over the card of a machine that is recorded or replayed, once QEMU is gone → Shown
	CallStopAt      = "stop-at"        // Until: where a replay is to stop by itself, instead of where it was to before
	CallReached     = "reached"        // → Reached, once it has
	CallTrace       = "trace"          // Trace, with a pipe to write lines of JSON to, until it is given up
	CallExec        = "exec"           // Exec, with pipes for standard output and error → ExecResult
	CallCopyIn      = "copy-in"        // Copy, with a pipe to read from → Copied
	CallCopyOut     = "copy-out"       // Copy, with a pipe to write to → Copied

	// Gate.
	CallQuarantine = "quarantine" // Quarantine → Quarantined
	CallSettled    = "settled"    // returns once no checkpoint is under way
	CallName       = "name"       // Name: what the machine that was made ahead is called
	CallFrames     = "frames"     // a connected socket to QEMU's network card, or two: one for what it sends, one for what it is sent
	CallRules      = "rules"      // Rules
	CallCapture    = "capture"    // Capture, with a pipe to write pcapng to
	CallGateStatus = "gate-status"
)

// Hello is what a worker says of itself to a daemon that connects to it.
type Hello struct {
	Source     string    `json:"source"` // of its events' ids
	PID        int       `json:"pid"`
	Version    string    `json:"version"`
	Configured bool      `json:"configured"`
	InForce    []Measure `json:"in_force"`
}

// Measure is one piece of confinement and whether it holds.
type Measure struct {
	Name    string `json:"name"`
	InForce bool   `json:"in_force"`
	Detail  string `json:"detail,omitempty"`
}

// Events carries a batch of events as event.Marshal wrote them.
type Events struct {
	Events []json.RawMessage `json:"events"`
}

// Ack names the last sequence number that is in the ledger.
type Ack struct {
	Seq uint64 `json:"seq"`
}

// Replaced says how many layers the disk's chain is shorter by.
type Replaced struct {
	Fewer int `json:"fewer"`
}

// Names of the descriptors in a GuardConfig. Layers are "layer0", "layer1", … from the bottom.
const (
	FileOverlay     = "overlay"
	FileLayer       = "layer"
	FileNBD         = "nbd"          // listening socket
	FileQMP         = "qmp"          // connected
	FileConsole     = "console"      // connected
	FileConsoleLog  = "console-log"  // the first 16 MiB, opened for writing
	FileConsoleTail = "console-tail" // with 0 or 1 behind it: the last of what came after, in turns
	FileAgent       = "agent"        // connected; only with the exec addition
	FileFrames      = "frames"       // connected; only where the machine is recorded or replayed
	FileRAM         = "ram"          // read-only
	FileProfile     = "profile"
	FileProbe       = "probe"     // the page shared with QEMU's plugin; only where it is loaded
	FileReference   = "reference" // of the kernel's code; absent from older images
	FileModules     = "modules"   // the kernel's modules; likewise
)

// Run is what CallRun takes.
type Run struct {
	Stays bool `json:"stays"` // the guest is not let go: it had panicked when it was saved
}

// GuardConfig is all a guard needs to know of its machine.
type GuardConfig struct {
	ID       vm.ID         `json:"id"`
	Name     string        `json:"name"`
	Memory   uint64        `json:"memory_bytes"`
	CPUs     int           `json:"cpus"`
	Watch    []string      `json:"watch"`
	Probe    string        `json:"probe"`           // why there is no FileProbe
	Recorded bool          `json:"recorded"`        // what enters the machine is recorded
	Running  bool          `json:"running"`         // QEMU runs already: this guard replaces one that died
	Stands   bool          `json:"stands"`          // and its guest is known to stand still in a panic
	Replays  bool          `json:"replays"`         // the machine replays a recording: it may be asked to stop somewhere
	Until    *Until        `json:"until,omitempty"` // where it is to stop
	Check    CheckSchedule `json:"check"`
	// PrivateRAM: QEMU has its memory for itself; CallMemory says where, once it runs.
	PrivateRAM bool `json:"private_ram"`
	// Ahead: nobody has asked for this machine yet. Until CallRun it ends with its daemon's connection, and ends QEMU.
	Ahead bool     `json:"ahead"`
	Files []string `json:"files"`
}

// Watch replaces the watched paths.
type Watch struct {
	Paths []string `json:"paths"`
}

// GuardStatus is what `show` prints of a guard's side.
type GuardStatus struct {
	QEMU          string `json:"qemu"` // its run state
	DiskSize      uint64 `json:"disk_size"`
	DiskUsed      uint64 `json:"disk_used"`
	Reads         uint64 `json:"reads"`
	Writes        uint64 `json:"writes"`
	Flushes       uint64 `json:"flushes"`
	Layers        int    `json:"layers"`
	Top           string `json:"top"`   // the overlay's id
	Files         string `json:"files"` // "named (ext4)", or why not
	Stalled       string `json:"stalled"`
	Introspection string `json:"introspection"`
	Instructions  int64  `json:"instructions"` // executed, where the machine is recorded or replayed
	Probe         string `json:"probe"`        // how it is known what processes do
}

// CheckSchedule says how often a guard looks for what should not be in the guest's memory; 0 is never.
type CheckSchedule struct {
	Every     time.Duration `json:"every"`      // the cheap checks
	FullEvery time.Duration `json:"full_every"` // all of them
}

// CheckReport is the outcome of all checks.
type CheckReport struct {
	Findings []Finding     `json:"findings"`
	Dropped  int           `json:"dropped"` // findings for which there was no room
	Views    []CheckedView `json:"views"`
	TookMS   float64       `json:"took_ms"`
}

// Finding is something in the guest's memory that should not be so.
type Finding struct {
	Kind     string     `json:"kind"`
	Subject  string     `json:"subject"`
	Detail   string     `json:"detail"`
	Severity string     `json:"severity"`
	Evidence []Evidence `json:"evidence,omitempty"`
	Listed   []string   `json:"listed,omitempty"`
	Missing  []string   `json:"missing,omitempty"`
	PID      int64      `json:"pid,omitempty"`
	Comm     string     `json:"comm,omitempty"`
	Exe      string     `json:"exe,omitempty"`
}

// Evidence is what was read at an address of the guest's kernel, and what should have been there.
type Evidence struct {
	Address  uint64 `json:"address"`
	Bytes    []byte `json:"bytes,omitempty"`
	Expected []byte `json:"expected,omitempty"`
	Note     string `json:"note,omitempty"`
}

// CheckedView is one list that was compared with others.
type CheckedView struct {
	Check   string  `json:"check"`
	Name    string  `json:"name"`
	Count   int     `json:"count"`
	TookMS  float64 `json:"took_ms,omitempty"`
	Unknown string  `json:"unknown,omitempty"`
}

// Until is where a replay stops by itself: at a number of instructions, or at the first event of a kind with such fields.
type Until struct {
	Instruction int64             `json:"instruction,omitempty"`
	Kind        string            `json:"kind,omitempty"`
	Fields      map[string]string `json:"fields,omitempty"` // a value may begin and end with *
}

// Reached says where it has stopped. Exact: there, and not merely as soon as the event was known.
type Reached struct {
	Instruction int64           `json:"instruction"`
	Kind        string          `json:"kind,omitempty"`
	Fields      json.RawMessage `json:"fields,omitempty"`
	Exact       bool            `json:"exact"`
}

// Shown is the digest of all frames that a card gave and was given, in their order. Whole: from the first to the last.
type Shown struct {
	Whole  bool   `json:"whole"`
	Frames int64  `json:"frames"`
	Bytes  int64  `json:"bytes"`
	Sum    string `json:"sum"` // SHA-256, of each frame's length in four bytes, big-endian, and the frame
}

// Trace asks for system calls.
type Trace struct {
	PID int64 `json:"pid"` // 0: of all processes
}

// Exec is a command for the guest agent.
type Exec struct {
	Command []string      `json:"command"`
	Stdin   []byte        `json:"stdin"`
	Timeout time.Duration `json:"timeout"`
}

// ExecResult is how it ended.
type ExecResult struct {
	ExitCode  int  `json:"exit_code"`
	Signal    int  `json:"signal"`
	Truncated bool `json:"truncated"`
}

// Copy names a file in the guest.
type Copy struct {
	Path  string `json:"path"`
	Mode  uint32 `json:"mode"`
	Limit int64  `json:"limit"` // bytes
}

// Copied says how much was copied.
type Copied struct {
	Bytes int64 `json:"bytes"`
}

// GateConfig is all a gate needs to know of its machine.
type GateConfig struct {
	ID          vm.ID            `json:"id"`
	Name        string           `json:"name"`
	MAC         string           `json:"mac"`
	Address     netip.Addr       `json:"address,omitzero"` // the guest's; default: the second of vm.Subnet
	Rules       []vm.NetRule     `json:"rules"`
	Publish     []vm.Publish     `json:"publish"` // Files[i] listens for Publish[i]
	Resolvers   []netip.AddrPort `json:"resolvers"`
	MTU         int              `json:"mtu"`
	Quarantined bool             `json:"quarantined"`
	// Stage: no frame leaves, what is recorded answers. Its files come behind those of Publish.
	Stage *Play `json:"stage,omitempty"`
	Ahead bool  `json:"ahead"` // until CallName it ends with its daemon's connection
}

// Name is a machine's.
type Name struct {
	Name string `json:"name"`
}

// Quarantine switches it.
type Quarantine struct {
	On bool `json:"on"`
}

// Quarantined says what switching it did. FirstDrop is zero while no frame was dropped yet.
type Quarantined struct {
	Flows int       `json:"flows"`
	At    time.Time `json:"at"`
}

// Rules replaces the network rules.
type Rules struct {
	Rules []vm.NetRule `json:"rules"`
}

// Capture bounds a capture. SnapLength 0: whole frames.
type Capture struct {
	SnapLength uint32 `json:"snap_length"`
}

// GateStatus is what `show` prints of a gate's side.
type GateStatus struct {
	FramesIn    uint64    `json:"frames_in"`
	FramesOut   uint64    `json:"frames_out"`
	Dropped     uint64    `json:"dropped"`
	Flows       int       `json:"flows"`
	Quarantined bool      `json:"quarantined"`
	FirstDrop   time.Time `json:"first_drop"` // first frame dropped since the quarantine began
}
