// Package host finds out what this host can do for vigia, by trying where trying is possible: a device that opens, a
// file that exists or a flag that is set are not yet a feature that works.
//
// [Host.Inspect] is vigia doctor: one [Finding] per question, each with what was seen, what follows, and how to get what
// is missing on the hosts in mind (Debian 12 and 13, Ubuntu 24.04). [Host.Accelerator] and [Host.QEMU] answer the two
// questions of every machine's start; they are quick and remember their answer.
//
// A Finding's status is ok, degraded (vigia works, with less speed or fewer walls; the consequence says which) or missing
// (what the consequence names does not work).
//
// Sources: Documentation/virt/kvm/api.rst, cgroups(7), landlock(7), user_namespaces(7), Ubuntu's "restricted
// unprivileged user namespaces", proc(5).
package host

import (
	"context"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"text/tabwriter"
)

// Status says how well a thing is there.
type Status string

// The statuses.
const (
	OK       Status = "ok"
	Degraded Status = "degraded"
	Missing  Status = "missing"
)

// Finding is the answer to one question about the host.
type Finding struct {
	Name        string `json:"name"`
	Status      Status `json:"status"`
	Seen        string `json:"seen"`                  // what was found
	Consequence string `json:"consequence,omitempty"` // what follows, where not all is well
	Remedy      string `json:"remedy,omitempty"`      // how to get it on this distribution
}

// Findings are all answers, in the order in which a person wants them.
type Findings []Finding

// Worst is the worst status among them.
func (fs Findings) Worst() Status {
	worst := OK
	for _, f := range fs {
		if f.Status == Missing || f.Status == Degraded && worst == OK {
			worst = f.Status
		}
	}
	return worst
}

// Write prints a table for people: name, status, what was seen, and below it what follows and what to do.
func (fs Findings) Write(w io.Writer) error {
	t := tabwriter.NewWriter(w, 0, 8, 2, ' ', 0)
	for _, f := range fs {
		fmt.Fprintf(t, "%s\t%s\t%s\n", f.Name, f.Status, f.Seen)
		if f.Consequence != "" {
			fmt.Fprintf(t, "\t\t→ %s\n", f.Consequence)
		}
		if f.Remedy != "" {
			fmt.Fprintf(t, "\t\thint: %s\n", f.Remedy)
		}
	}
	return t.Flush()
}

// Wall is one part of the confinement that a process of vigia got in a real try; package jail makes them, and the caller
// hands the trying over, since packages of one level do not know each other.
type Wall struct {
	Name    string
	InForce bool
	Detail  string
	Why     string
}

// Host is the host under inspection. The zero value with a State is this one.
type Host struct {
	State  string                                // directory whose disk space is asked for
	Binary string                                // QEMU, if not the first in the path
	Try    func(context.Context) ([]Wall, error) // confines a throwaway process for real; nil: not tried

	root string        // prefix of every path: a test's own host
	kvm  func() error  // runs a little code in a virtual machine
	path func() string // the search path
	abi  func() (int, error)

	mu    sync.Mutex
	qemus map[string]knownQEMU
}

// question is one row of doctor.
type question struct {
	name string
	ask  func(*Host, context.Context) Finding
}

var questions = []question{
	{"qemu", (*Host).findQEMU},
	{"qemu devices", (*Host).findDevices},
	{"acceleration", (*Host).findAcceleration},
	{"memory", (*Host).findMemory},
	{"shared memory", (*Host).findShared},
	{"disk space", (*Host).findSpace},
	{"huge pages", (*Host).findHugePages},
	{"user namespaces", (*Host).findUserNamespaces},
	{"landlock", (*Host).findLandlock},
	{"seccomp", (*Host).findSeccomp},
	{"control groups", (*Host).findGroups},
	{"confinement", (*Host).findConfinement},
	{"ptrace scope", (*Host).findPtrace},
	{"checkpoints", (*Host).findProtection},
	{"probe plugin", (*Host).findPluginHere},
	{"image tools", (*Host).findTools},
	{"subordinate ids", (*Host).findSubIDs},
}

// Inspect asks all questions.
func (h *Host) Inspect(ctx context.Context) Findings {
	fs := make(Findings, 0, len(questions))
	for _, q := range questions {
		f := q.ask(h, ctx)
		f.Name = q.name
		fs = append(fs, f)
	}
	return fs
}

// at is a path of the host under inspection.
func (h *Host) at(path string) string { return filepath.Join(h.root, path) }

// maxRead bounds what is read of a file of /proc or /sys.
const maxRead = 1 << 20

func (h *Host) read(path string) (string, error) {
	f, err := os.Open(h.at(path))
	if err != nil {
		return "", err
	}
	defer f.Close()
	b, err := io.ReadAll(io.LimitReader(f, maxRead))
	return strings.TrimSpace(string(b)), err
}

// distribution is "debian 12" or the like.
func (h *Host) distribution() (id, version string) {
	text, _ := h.read("/etc/os-release")
	for line := range strings.Lines(text) {
		key, value, _ := strings.Cut(strings.TrimSpace(line), "=")
		value = strings.Trim(value, `"`)
		switch key {
		case "ID":
			id = value
		case "VERSION_ID":
			version = value
		}
	}
	return id, version
}

// packages is the remedy of installing something.
func (h *Host) packages(names ...string) string {
	id, _ := h.distribution()
	switch id {
	case "debian", "ubuntu":
		return "apt-get install " + strings.Join(names, " ")
	}
	return "install what Debian calls " + strings.Join(names, ", ")
}

func bytesOf(n uint64) string {
	const unit = 1024
	if n < unit {
		return fmt.Sprintf("%d B", n)
	}
	div, exp := uint64(unit), 0
	for m := n / unit; m >= unit && exp < 4; m /= unit {
		div *= unit
		exp++
	}
	return fmt.Sprintf("%.1f %ciB", float64(n)/float64(div), "KMGTP"[exp])
}
