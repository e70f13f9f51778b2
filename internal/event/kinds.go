package event

import "slices"

// Kind names a sort of event.
type Kind string

// Type is the type of a field.
type Type string

// The types of fields. Times and durations are Float seconds; sizes are Int bytes.
const (
	String Type = "string"
	Int    Type = "int"
	Float  Type = "float"
	Bool   Type = "bool"
	List   Type = "list" // of strings
)

func (t Type) holds(v any) bool {
	switch v.(type) {
	case string:
		return t == String
	case int64:
		return t == Int
	case float64:
		return t == Float
	case bool:
		return t == Bool
	case []string:
		return t == List
	}
	return false
}

// Field describes one field of a kind.
type Field struct {
	Name string
	Type Type
	Doc  string
}

// Schema describes a kind. Claim marks kinds whose fields are a guest's own words.
type Schema struct {
	Doc    string
	Fields []Field
}

// Field looks a field up by name.
func (s Schema) Field(name string) (Field, bool) {
	i := slices.IndexFunc(s.Fields, func(f Field) bool { return f.Name == name })
	if i < 0 {
		return Field{}, false
	}
	return s.Fields[i], true
}

// The kinds.
const (
	MachineCreated  Kind = "machine.created"
	MachineStarted  Kind = "machine.started"
	MachineStopped  Kind = "machine.stopped"
	MachineFailed   Kind = "machine.failed"
	MachinePaused   Kind = "machine.paused"
	MachineResumed  Kind = "machine.resumed"
	MachineRemoved  Kind = "machine.removed"
	MachineRebooted Kind = "machine.rebooted"
	MachinePanicked Kind = "machine.panicked"

	DiskRead    Kind = "disk.read"
	DiskWrite   Kind = "disk.write"
	DiskStalled Kind = "disk.stalled"
	DiskResumed Kind = "disk.resumed"
	FileChanged Kind = "file.changed"
	FileOpened  Kind = "file.opened"

	NetFlow   Kind = "net.flow"
	NetDenied Kind = "net.denied"
	NetDNS    Kind = "net.dns"

	SocketConnecting Kind = "socket.connecting"
	SocketListening  Kind = "socket.listening"

	ProcessForked      Kind = "process.forked"
	ProcessStarted     Kind = "process.started"
	ProcessExited      Kind = "process.exited"
	ProcessCredentials Kind = "process.credentials"
	ProcessHidden      Kind = "process.hidden"
	ProcessMissed      Kind = "process.missed"
	ModuleLoaded       Kind = "module.loaded"
	ModuleHidden       Kind = "module.hidden"
	KernelTampered     Kind = "kernel.tampered"

	CPUUsage    Kind = "cpu.usage"
	ConsoleLine Kind = "console.line"
	GuestLog    Kind = "guest.log"

	CheckpointCreated  Kind = "checkpoint.created"
	CheckpointFailed   Kind = "checkpoint.failed"
	CheckpointRemoved  Kind = "checkpoint.removed"
	CheckpointRestored Kind = "checkpoint.restored"
	CheckpointReopens  Kind = "checkpoint.reopens"
	ReplayStopped      Kind = "replay.stopped"
	ReplayEnded        Kind = "replay.ended"
	ReplayGiven        Kind = "replay.given"
	InputGiven         Kind = "input.given"
	CloneCreated       Kind = "clone.created"

	CloneIdentity Kind = "clone.identity"

	ClockSet       Kind = "clock.set"
	ClockBehind    Kind = "clock.behind"
	RandomReseeded Kind = "random.reseeded"
	RandomReused   Kind = "random.reused"

	PolicyAlert    Kind = "policy.alert"
	ResponseDone   Kind = "response.done"
	ResponseFailed Kind = "response.failed"
	QuarantineOn   Kind = "response.quarantined"
	QuarantineOff  Kind = "response.released"
	AccessCall     Kind = "access.call"
	EventsLost     Kind = "vigia.lost"
	EventsSummed   Kind = "vigia.summed"
	VigiaStarted   Kind = "vigia.started"
	VigiaStopped   Kind = "vigia.stopped"
	WorkerDied     Kind = "vigia.worker_died"
)

var processFields = []Field{
	{"pid", Int, "process id in the guest's first pid namespace"},
	{"ppid", Int, "its parent"},
	{"uid", Int, "its real user id"},
	{"euid", Int, "its effective user id"},
	{"comm", String, "the kernel's name of the task"},
	{"exe", String, "path of its executable"},
	{"cmdline", String, "its command line: the guest's own words"},
}

// findingFields are those of all that a check finds.
func findingFields(views string) []Field {
	return []Field{
		{"views", List, views},
		{"missing", List, "the views that do not"},
		{"finding", String, "its kind, as `vigia check` prints it"},
		{"subject", String, "what it is about"},
		{"detail", String, "what was found, in a sentence"},
		{"severity", String, "low, medium, high or critical"},
		{"count", Int, "how many like it, where coalesced"},
	}
}

// joinedFields are those of events of which a guest can make as many as it likes.
var joinedFields = append(processFields[:len(processFields):len(processFields)], Field{"count", Int, "how many like it, where a flood of them is joined"})

var flowFields = []Field{
	{"protocol", String, "tcp, udp or icmp"},
	{"direction", String, "out: the guest began it; in: the outside did"},
	{"local", String, "the guest's end, address:port"},
	{"remote", String, "the far end, address:port"},
	{"name", String, "the DNS name under which the guest had resolved the far end, if it did"},
}

// Kinds is the table of all kinds and their fields. Every field may be absent; a rule reads an absent one as its
// type's zero.
var Kinds = map[Kind]Schema{
	MachineCreated:  {"a machine was made", []Field{{"image", String, "image name"}, {"image_id", String, "image content address"}, {"id", String, "the machine's own id: a name can be used again"}, {"owner", String, "whose it is"}, {"purpose", String, "what it is for"}}},
	MachineStarted:  {"a machine began to run", []Field{{"accelerator", String, "kvm or tcg"}, {"pid", Int, "QEMU's process id on the host"}, {"adopted", Bool, "it was found running by a new daemon"}}},
	MachineStopped:  {"a machine ended as asked, or powered itself off", []Field{{"ended", String, "poweroff, reboot, stopped or forced"}, {"seconds", Float, "how long it ran"}}},
	MachineFailed:   {"a machine ended as nobody asked", []Field{{"ended", String, "panic or qemu-died"}, {"reason", String, "what is known of why"}, {"seconds", Float, "how long it ran"}}},
	MachinePaused:   {"a machine was paused", []Field{{"reason", String, "who or what paused it"}}},
	MachineResumed:  {"a machine goes on", []Field{{"reason", String, "who or what resumed it"}}},
	MachineRemoved:  {"a machine and its disk were deleted", nil},
	MachineRebooted: {"the guest rebooted", []Field{{"count", Int, "how often, where coalesced"}}},
	MachinePanicked: {"the guest's kernel panicked: it stands still until what rules ask for is done, and is ended then", []Field{{"reason", String, "how it was seen"}, {"count", Int, "how many like it, where coalesced"}}},

	DiskRead: {"the guest read disk blocks of a file", []Field{
		{"path", String, "the file; empty in a count of unwatched ones"}, {"inode", Int, "its inode number"}, {"fstype", String, "file system"},
		{"bytes", Int, "bytes read"}, {"requests", Int, "disk requests counted"}, {"watched", Bool, "the path is watched: this event is one access, or where they repeat a second's"},
		{"exe", String, "the program that opened the file last, where a probe saw that"}, {"pid", Int, "its process"}}},
	DiskWrite: {"the guest wrote disk blocks of a file", []Field{
		{"path", String, "the file; empty in a count of unwatched ones"}, {"inode", Int, "its inode number"}, {"fstype", String, "file system"},
		{"bytes", Int, "bytes written"}, {"requests", Int, "disk requests counted"}, {"watched", Bool, "the path is watched"},
		{"pending", Bool, "the owner was not yet known when the blocks were written; it was bound at the journal's commit"}}},
	DiskStalled: {"the host could not carry a disk request out: it is held, and tried again", []Field{{"reason", String, "the host's error, and what to do"}}},
	DiskResumed: {"held disk requests go on", nil},
	FileChanged: {"a watched file's directory entry or inode changed", []Field{{"path", String, "the file"}, {"inode", Int, ""}, {"change", String, "created, removed, renamed, modified, mode or owner"}, {"detail", String, ""}, {"count", Int, "how many like it, where coalesced"}}},
	FileOpened:  {"a watched file was opened", append([]Field{{"path", String, "the file"}, {"write", Bool, "for writing, where it is known"}}, joinedFields...)},

	NetFlow: {"a network flow ended", append(flowFields[:len(flowFields):len(flowFields)],
		Field{"bytes_out", Int, "payload bytes the guest sent"}, Field{"bytes_in", Int, "payload bytes the guest received"},
		Field{"packets_out", Int, "frames the guest sent"}, Field{"packets_in", Int, "frames the guest received"},
		Field{"seconds", Float, "how long it lived"}, Field{"reason", String, "closed, reset, idle, quarantine, denied, stopped"})},
	NetDenied: {"a frame or flow was refused", append(flowFields[:len(flowFields):len(flowFields)], Field{"reason", String, "the rule that refused it, or quarantine"}, Field{"count", Int, "how many like it, where coalesced"})},
	NetDNS:    {"the guest asked for a name", []Field{{"name", String, "the name asked for"}, {"type", String, "A, AAAA, …"}, {"rcode", String, "NOERROR, NXDOMAIN, …"}, {"answers", List, "addresses given"}}},

	SocketConnecting: {"a process connects a TCP socket; the flow itself is net.flow", append(joinedFields[:len(joinedFields):len(joinedFields)], Field{"protocol", String, "tcp or tcp6"}, Field{"local", String, "the guest's end, address:port"}, Field{"remote", String, "the far end, address:port"})},
	SocketListening:  {"a process begins to listen on a TCP socket", append(joinedFields[:len(joinedFields):len(joinedFields)], Field{"protocol", String, "tcp or tcp6"}, Field{"local", String, "address:port; port 0: one that the kernel chooses"})},

	ProcessForked:      {"a process was made; it is a copy of its parent still", joinedFields},
	ProcessStarted:     {"a process began a program", joinedFields},
	ProcessExited:      {"a process ended", append(joinedFields[:len(joinedFields):len(joinedFields)], Field{"exit_code", Int, "where it is known and it ended by itself"}, Field{"signal", Int, "that ended it"})},
	ProcessCredentials: {"a process changed its credentials", append(joinedFields[:len(joinedFields):len(joinedFields)], Field{"old_uid", Int, "real user id before"}, Field{"old_euid", Int, "effective user id before"})},
	ProcessHidden:      {"a process is missing from a view that should list it", append(processFields[:len(processFields):len(processFields)], findingFields("the views that do list it")...)},
	ProcessMissed:      {"processes lived and ended unseen", []Field{{"count", Int, "how many"}, {"threads", Bool, "some of them may have been threads of other processes"}, {"reason", String, "why they were not seen"}}},
	ModuleLoaded:       {"a kernel module was loaded", append([]Field{{"name", String, ""}, {"size", Int, "bytes"}, {"address", String, "of its text"}}, joinedFields...)},
	ModuleHidden:       {"a kernel module is missing from a view that should list it", append([]Field{{"name", String, "the module's name"}}, findingFields("the views that do list it")...)},
	KernelTampered:     {"the kernel's code or data is not what it should be", append(processFields[:len(processFields):len(processFields)], findingFields("")[2:]...)},

	CPUUsage: {"how busy a machine is, sampled", []Field{
		{"percent", Float, "of one host core: 200 is two virtual CPUs busy. Time ready but waiting for the host counts as busy"},
		{"cpus", Int, "virtual CPUs"}, {"pid", Int, "the guest's busiest process"}, {"process", String, "its name"}, {"exe", String, "its executable"},
		{"cmdline", String, "its command line"}, {"process_percent", Float, "its share, of one virtual CPU"}}},
	ConsoleLine: {"a line on the serial console", []Field{{"line", String, "the guest's own words"}, {"skipped", Int, "lines that were not told since the last event, in a flood"}}},
	GuestLog:    {"a line from the guest's log", []Field{{"line", String, "the guest's own words"}}},

	CheckpointCreated: {"a machine was saved", []Field{{"id", String, "the checkpoint"}, {"label", String, "what it was called"}, {"scheduled", Bool, "by the machine's rule, at its time"}, {"parent", String, "the checkpoint on whose memory it lies"},
		{"pause", Float, "how long the guest stood still"}, {"seconds", Float, "until all of it was on the disk"}, {"bytes", Int, "on the disk"},
		{"how", String, "protected: copied while the guest ran; copied: while it stood still"}, {"disk", String, "crash-consistent, or frozen: held still by the guest's agent"},
		{"disk_why", String, "why the agent, which was asked, did not freeze it"}, {"frozen", Float, "for how long the guest could not write"},
		{"sum", String, "of its memory's index: a checkpoint without this sum is another"}}},
	CheckpointFailed:   {"a machine could not be saved; it goes on", []Field{{"reason", String, "why not"}}},
	CheckpointRemoved:  {"a checkpoint was deleted", []Field{{"id", String, "the checkpoint"}, {"reason", String, "who or what asked for it"}}},
	CheckpointRestored: {"a machine was put back to a checkpoint: memory, devices and disk", []Field{{"id", String, "the checkpoint"}, {"label", String, "what it was called"}, {"taken", Float, "how long ago the checkpoint was taken: by so much the guest's clock is behind"}, {"seconds", Float, "from the call until the guest ran"}, {"reason", String, "who or what asked for it"}}},
	ReplayStopped: {"a replay stopped by itself, where it was to", []Field{{"of", String, "the machine that was recorded"}, {"instruction", Int, "how many it has executed"}, {"event", String, "what it stopped for, in a line; absent where that was an instruction or a time"},
		{"exact", Bool, "it stands there; else it went on until the event was known"}, {"recorded", String, "when that was, by the host's clock while it was recorded, to some seconds"}}},
	ReplayEnded: {"a recording was replayed to its end, or as far as it goes", []Field{{"of", String, "the machine that was recorded"}, {"exact", Bool, "console, disk and network frames are the recording's, byte by byte"}, {"reason", String, "what was compared, or what differs"}, {"seconds", Float, "how long it took"}}},
	ReplayGiven: {"a clone was given all again that had entered the machine since a checkpoint. Not exact: its clock, its random numbers and the order of what it does are its own", []Field{
		{"of", String, "the machine"}, {"checkpoint", String, "the checkpoint"}, {"from", String, "when it was taken"}, {"until", String, "the last of what entered"},
		{"flows_in", Int, "flows that the outside had begun, begun again"}, {"flows_out", Int, "flows that the guest began, answered with what was recorded"}, {"names", Int, "questions for names, answered so"},
		{"typed", Int, "bytes given on the serial line"}, {"calls", Int, "commands and copies through the guest channel"}, {"bytes", Int, "given on flows"}, {"late", Int, "parts of flows that were given though the guest had not sent as much as it had then"},
		{"refused", Int, "flows and names that the guest asked for and nobody had recorded"}, {"unasked", Int, "recorded flows that it did not ask for"}, {"older", Int, "flows that were open at the checkpoint: what came in on them is not given"},
		{"older_bytes", Int, "that came in on those"}, {"gaps", List, "what is not there, in sentences"}, {"seconds", Float, "how long it took"}, {"complete", Bool, "nothing cut it short"}, {"reason", String, "what did"}}},
	InputGiven: {"a clone is given something again that had entered the machine: the beginning of it", []Field{{"source", String, "network, console, command or copy"}, {"recorded", String, "when it had entered"}, {"flow", Int, "its number among what was kept"},
		{"direction", String, "of a flow. in: the outside had begun it; out: the guest began it, and is answered"}, {"protocol", String, "tcp, udp or icmp"}, {"local", String, "the guest's end"}, {"remote", String, "the far end, as it was"},
		{"bytes", Int, "of all of it"}, {"text", String, "the first bytes: the outside's own words"}}},
	CheckpointReopens: {"what a rollback that is about to be done brings back, of what was mended since the checkpoint", []Field{{"id", String, "the checkpoint"}, {"left", String, "the checkpoint of the state that is left"},
		{"critical", Int, "how many things of that severity"}, {"high", Int, "the same"}, {"medium", Int, "the same"}, {"low", Int, "the same"}, {"items", List, "the worst of them: severity, kind, what, how"},
		{"seconds", Float, "how long finding them took"}}},
	CloneIdentity: {"a clone was to be given a name or addresses of its own", []Field{{"hostname", String, "its name; empty: as it was"}, {"mac", String, "of its network card"}, {"address", String, "on its network"},
		{"done", Bool, "by the word of the guest's agent"}, {"why", String, "why not"}}},
	ClockSet: {"the clock of a guest that goes on from a checkpoint was set by its agent", []Field{{"checkpoint", String, "the checkpoint"},
		{"behind", Float, "by how much it is behind still, read in the guest's memory; a guest that rests brings it up to date late"}, {"measured", Bool, "it could be read; else it is the agent's word"}}},
	ClockBehind: {"the clock of a guest that goes on from a checkpoint is behind, or ahead", []Field{{"checkpoint", String, "the checkpoint"}, {"behind", Float, "by how much; less than 0: ahead"},
		{"measured", Bool, "it was read in the guest's memory; else it is the checkpoint's age"}, {"why", String, "why it was not set"}}},
	RandomReseeded: {"a guest that goes on from a checkpoint has drawn its random numbers' state anew", []Field{{"checkpoint", String, "the checkpoint"},
		{"by", String, "vmgenid: its own kernel, told by a device; additions: its agent"}, {"seen", Bool, "in the kernel's memory; else it is the agent's word"}}},
	RandomReused: {"a guest that goes on from a checkpoint may give out the same random numbers as before, or as another clone, until its kernel draws their state anew: keys, tokens, numbers of sequences", []Field{{"checkpoint", String, "the checkpoint"}, {"why", String, "why nobody made it do so"}}},

	CloneCreated: {"a machine was made that goes on from a checkpoint", []Field{{"checkpoint", String, "the checkpoint"}, {"from", String, "the machine it is of"}, {"from_id", String, "that machine's id"}, {"seconds", Float, "from the call until the guest ran"}, {"connected", Bool, "it was let on the network at once"}}},

	PolicyAlert: {"a rule was fulfilled", []Field{{"rule", String, "its id"}, {"title", String, "what it says of itself"}, {"severity", String, "low, medium, high or critical"},
		{"events", List, "ids of the events that fulfilled it"}, {"respond", List, "the responses it asks for"}}},
	ResponseDone:   {"a response was carried out", []Field{{"response", String, "alert, checkpoint, pause, quarantine, restart, rollback or stop"}, {"rule", String, "the rule that asked for it"}, {"seconds", Float, "from the rule's last event to done"}}},
	ResponseFailed: {"a response could not be carried out", []Field{{"response", String, "which one"}, {"rule", String, "the rule that asked for it"}, {"reason", String, "why not"}, {"count", Int, "how many like it, where coalesced"}}},
	QuarantineOn:   {"a machine was cut off the network", []Field{{"rule", String, "the rule, empty where a person did it"}, {"flows", Int, "open flows that were cut"}, {"seconds", Float, "from the rule's last event until the network was cut"}}},
	QuarantineOff:  {"a machine was let back on the network", nil},
	AccessCall:     {"somebody asked vigia for something", []Field{{"call", String, "the API method"}, {"uid", Int, "of the caller"}, {"pid", Int, "of the caller"}, {"subject", String, "the machine or image named"}, {"error", String, "why it was refused or failed"}, {"count", Int, "how many like it, where questions that change nothing are coalesced"}}},
	EventsLost:     {"events could not be kept", []Field{{"count", Int, "how many; absent where that can't be known"}, {"source", String, "whose they were: guard, gate or daemon, or the first part of their ids"}, {"reason", String, ""}}},
	EventsSummed:   {"events of a machine that had spent its day's budget of the ledger: rules saw each, the ledger has their number", []Field{{"kind", String, "theirs"}, {"count", Int, "how many"}, {"seconds", Float, "since the first of them"}}},
	VigiaStarted:   {"the daemon began", []Field{{"version", String, ""}, {"unclean", Bool, "the last one did not say good-bye"}}},
	VigiaStopped:   {"the daemon ended as asked", nil},
	WorkerDied:     {"a guard or gate ended unasked", []Field{{"worker", String, "guard or gate"}, {"reason", String, ""}}},
}
