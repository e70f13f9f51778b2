package jail

import (
	"bufio"
	"bytes"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
)

// Observation is what /proc says of a process, seen from outside: the process has no part in it. The kernel does not
// show landlock there; that is known from the process's start alone.
type Observation struct {
	PID          int               `json:"pid"`
	UIDs         []int             `json:"uids"` // real, effective, saved, file system
	GIDs         []int             `json:"gids"`
	Groups       []int             `json:"groups"`
	Capabilities uint64            `json:"capabilities"` // the union of all five sets
	NoNewPrivs   bool              `json:"no_new_privs"`
	Filters      int               `json:"filters"`    // seccomp filters in force
	Namespaces   map[string]string `json:"namespaces"` // kind → identity
	Own          []string          `json:"own"`        // the kinds that are not the observer's, sorted
	Mounts       []Mount           `json:"mounts"`
	Limits       map[string]uint64 `json:"limits"` // hard, by the kernel's name; ^0 is unlimited
	Descriptors  map[int]string    `json:"descriptors"`
}

// Mount is one line of mountinfo.
type Mount struct {
	Root    string   `json:"root"` // what of its file system it shows
	Target  string   `json:"target"`
	Type    string   `json:"type"`
	Source  string   `json:"source"`
	Options []string `json:"options"` // of the mount, not of the file system
}

// Has says whether a mount carries an option.
func (m Mount) Has(option string) bool { return slices.Contains(m.Options, option) }

// maxProcFile bounds what is read of one file of /proc.
const maxProcFile = 4 << 20

// Observe reads /proc. It needs the rights of a debugger over the process, which the daemon has over what it started.
func Observe(pid int) (Observation, error) {
	o := Observation{PID: pid, Namespaces: map[string]string{}, Descriptors: map[int]string{}}
	dir := filepath.Join("/proc", strconv.Itoa(pid))
	if err := o.status(dir); err != nil {
		return o, fmt.Errorf("observe process %d: %w", pid, err)
	}
	for _, read := range []func(string) error{o.namespaces, o.mounts, o.limits, o.descriptors} {
		if err := read(dir); err != nil {
			return o, fmt.Errorf("observe process %d: %w", pid, err)
		}
	}
	return o, nil
}

func readBounded(path string) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	return io.ReadAll(io.LimitReader(f, maxProcFile))
}

func (o *Observation) status(dir string) error {
	raw, err := readBounded(filepath.Join(dir, "status"))
	if err != nil {
		return err
	}
	return o.parseStatus(raw)
}

// parseStatus reads the fields of proc_pid_status(5) that tell of confinement.
func (o *Observation) parseStatus(raw []byte) error {
	seen := 0
	for line := range bytes.Lines(raw) {
		key, value, ok := strings.Cut(strings.TrimRight(string(line), "\n"), ":")
		if !ok {
			continue
		}
		words := strings.Fields(value)
		switch key {
		case "Uid":
			o.UIDs = numbers(words)
			seen++
		case "Gid":
			o.GIDs = numbers(words)
			seen++
		case "Groups":
			o.Groups = numbers(words)
		case "CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb":
			set, err := strconv.ParseUint(strings.TrimSpace(value), 16, 64)
			if err != nil {
				return fmt.Errorf("%s: %w", key, err)
			}
			o.Capabilities |= set
			seen++
		case "NoNewPrivs":
			o.NoNewPrivs = slices.Equal(words, []string{"1"})
		case "Seccomp_filters":
			if n := numbers(words); len(n) == 1 {
				o.Filters = n[0]
			}
		}
	}
	if seen != 7 || len(o.UIDs) != 4 || len(o.GIDs) != 4 {
		return fmt.Errorf("status lacks fields")
	}
	return nil
}

func numbers(words []string) []int {
	var n []int
	for _, w := range words {
		if i, err := strconv.Atoi(w); err == nil {
			n = append(n, i)
		}
	}
	return n
}

func (o *Observation) namespaces(dir string) error {
	for _, kind := range []string{"cgroup", "ipc", "mnt", "net", "pid", "user", "uts"} {
		id, err := os.Readlink(filepath.Join(dir, "ns", kind))
		if err != nil {
			return err
		}
		o.Namespaces[kind] = id
		if mine, err := os.Readlink("/proc/self/ns/" + kind); err == nil && mine != id {
			o.Own = append(o.Own, kind)
		}
	}
	return nil
}

func (o *Observation) mounts(dir string) error {
	raw, err := readBounded(filepath.Join(dir, "mountinfo"))
	if err != nil {
		return err
	}
	o.Mounts, err = parseMountinfo(raw)
	return err
}

// parseMountinfo reads proc_pid_mountinfo(5).
func parseMountinfo(raw []byte) ([]Mount, error) {
	var mounts []Mount
	for line := range bytes.Lines(raw) {
		words := strings.Fields(string(line))
		dash := slices.Index(words, "-")
		if len(words) < 7 || dash < 6 || len(words) < dash+3 {
			return nil, fmt.Errorf("mountinfo line %q is not understood", line)
		}
		mounts = append(mounts, Mount{
			Root: unescape(words[3]), Target: unescape(words[4]), Options: strings.Split(words[5], ","),
			Type: words[dash+1], Source: unescape(words[dash+2]),
		})
	}
	return mounts, nil
}

// unescape undoes the kernel's \ooo of space, tab, newline and backslash.
func unescape(s string) string {
	var b strings.Builder
	for i := 0; i < len(s); i++ {
		if s[i] == '\\' && i+3 < len(s) {
			if c, err := strconv.ParseUint(s[i+1:i+4], 8, 8); err == nil {
				b.WriteByte(byte(c))
				i += 3
				continue
			}
		}
		b.WriteByte(s[i])
	}
	return b.String()
}

func (o *Observation) limits(dir string) error {
	raw, err := readBounded(filepath.Join(dir, "limits"))
	if err != nil {
		return err
	}
	o.Limits = map[string]uint64{}
	lines := bufio.NewScanner(bytes.NewReader(raw))
	for lines.Scan() {
		line := lines.Text()
		if len(line) < 56 || strings.HasPrefix(line, "Limit") { // columns are fixed: name 26, soft 21, hard 21
			continue
		}
		words := strings.Fields(line[47:])
		if len(words) == 0 {
			continue
		}
		hard, err := strconv.ParseUint(words[0], 10, 64)
		if err != nil {
			hard = ^uint64(0)
		}
		o.Limits[strings.TrimSpace(line[:26])] = hard
	}
	return lines.Err()
}

func (o *Observation) descriptors(dir string) error {
	entries, err := os.ReadDir(filepath.Join(dir, "fd"))
	if err != nil {
		return err
	}
	for _, e := range entries {
		n, err := strconv.Atoi(e.Name())
		if err != nil {
			continue
		}
		if to, err := os.Readlink(filepath.Join(dir, "fd", e.Name())); err == nil {
			o.Descriptors[n] = to
		}
	}
	return nil
}
