package link

import "time"

// The rows of views, as the introspector found them. Text in them is the guest's, made printable and cut. What could not
// be read is in Unknown, by the name of its field in the API.

// Process is one row of `ps`.
type Process struct {
	PID        int64     `json:"pid"`
	PPID       int64     `json:"ppid"`
	UID        uint32    `json:"uid"`
	EUID       uint32    `json:"euid"`
	SUID       uint32    `json:"suid"`
	FSUID      uint32    `json:"fsuid"`
	GID        uint32    `json:"gid"`
	EGID       uint32    `json:"egid"`
	SGID       uint32    `json:"sgid"`
	FSGID      uint32    `json:"fsgid"`
	Comm       string    `json:"comm"`
	Cmdline    string    `json:"cmdline"`
	Exe        string    `json:"exe"`
	CPUSeconds float64   `json:"cpu_seconds"`
	Start      time.Time `json:"start"`
	Booted     float64   `json:"start_seconds"`
	State      string    `json:"state"`
	Threads    int       `json:"threads"`
	Kernel     bool      `json:"kernel"`

	Groups       []uint32     `json:"groups,omitempty"`
	Capabilities Capabilities `json:"capabilities"`
	Namespaces   Namespaces   `json:"namespaces"`
	NamespacePID int64        `json:"namespace_pid"`
	Cgroup       string       `json:"cgroup,omitempty"`
	Container    string       `json:"container,omitempty"`
	Runtime      string       `json:"container_runtime,omitempty"`
	Unit         string       `json:"unit,omitempty"`
	Unknown      []string     `json:"unknown,omitempty"`
}

// Capabilities are sets of bits, as the kernel numbers them.
type Capabilities struct {
	Effective   uint64 `json:"effective"`
	Permitted   uint64 `json:"permitted"`
	Inheritable uint64 `json:"inheritable"`
	Bounding    uint64 `json:"bounding"`
	Ambient     uint64 `json:"ambient"`
}

// Namespaces are inode numbers.
type Namespaces struct {
	PID    uint64 `json:"pid"`
	Mnt    uint64 `json:"mnt"`
	Net    uint64 `json:"net"`
	UTS    uint64 `json:"uts"`
	IPC    uint64 `json:"ipc"`
	User   uint64 `json:"user"`
	Cgroup uint64 `json:"cgroup"`
	Time   uint64 `json:"time"`
}

// Module is one row of `modules`.
type Module struct {
	Name    string `json:"name"`
	Address uint64 `json:"address"`
	Size    uint64 `json:"size"`
}

// OfProcess asks for what belongs to one process; 0, where it is allowed, for all.
type OfProcess struct {
	PID int64 `json:"pid"`
}

// Socket is one row of `sockets`.
type Socket struct {
	Protocol string   `json:"protocol"`
	Local    string   `json:"local"`
	Remote   string   `json:"remote"`
	State    string   `json:"state"`
	PID      int64    `json:"pid"`
	Comm     string   `json:"comm"`
	FD       int      `json:"fd"`
	Owner    string   `json:"owner"`
	UID      uint32   `json:"uid"`
	Inode    uint64   `json:"inode"`
	Net      uint64   `json:"net_namespace"`
	Unknown  []string `json:"unknown,omitempty"`
}

// File is one row of `files`.
type File struct {
	PID        int64    `json:"pid"`
	Comm       string   `json:"comm"`
	FD         int      `json:"fd"`
	Type       string   `json:"type"`
	Path       string   `json:"path"`
	Mode       string   `json:"mode"`
	Position   int64    `json:"position"`
	Deleted    bool     `json:"deleted"`
	Filesystem string   `json:"filesystem"`
	Inode      uint64   `json:"inode"`
	Unknown    []string `json:"unknown,omitempty"`
}

// Region is one row of `maps`.
type Region struct {
	Start       uint64   `json:"start"`
	End         uint64   `json:"end"`
	Permissions string   `json:"permissions"`
	Offset      uint64   `json:"offset"`
	File        string   `json:"file"`
	Inode       uint64   `json:"inode"`
	Kind        string   `json:"kind"`
	Marks       []string `json:"marks,omitempty"`
	Unknown     []string `json:"unknown,omitempty"`
}

// System is `kernel`.
type System struct {
	Banner    string    `json:"banner"`
	Version   string    `json:"version"`
	Phys      uint64    `json:"physical_base"`
	Slide     uint64    `json:"virtual_slide"`
	Levels    int       `json:"paging_levels"`
	Cmdline   string    `json:"command_line"`
	Taint     uint64    `json:"taint"`
	Taints    []string  `json:"taints,omitempty"`
	Uptime    float64   `json:"uptime_seconds"`
	Time      time.Time `json:"time"`
	Forks     uint64    `json:"total_forks"`
	Processes int       `json:"processes"`
	Missing   []string  `json:"missing,omitempty"`
	Unknown   []string  `json:"unknown,omitempty"`
}
