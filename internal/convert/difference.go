package convert

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"slices"

	"vigia/internal/event"
	"vigia/internal/introspect"
	"vigia/internal/inventory/scan"
	"vigia/internal/kernel"
	"vigia/internal/memory"
	"vigia/internal/volume"
	"vigia/internal/volume/ext4"
)

// answerRoom is what a list may take of an answer, in bytes: the rest is for what stands around it.
const answerRoom = MaxAnswer - 64<<10

// diffDisks answers in which files two disks differ.
func diffDisks(text string, file func(n int) *os.File) (scan.Difference, error) {
	var q comparison
	if err := json.Unmarshal([]byte(text), &q); err != nil {
		return scan.Difference{}, err
	}
	if err := q.check(); err != nil {
		return scan.Difference{}, err
	}
	then, err := openDisk(q.Then, false, file)
	if err != nil {
		return scan.Difference{}, fmt.Errorf("the first disk: %w", err)
	}
	defer then.Close()
	now, err := openDisk(q.Now, q.Overlay, func(n int) *os.File { return file(q.Then + n) })
	if err != nil {
		return scan.Difference{}, fmt.Errorf("the second disk: %w", err)
	}
	defer now.Close()
	a, err1 := rootOf(then)
	b, err2 := rootOf(now)
	if err := errors.Join(err1, err2); err != nil {
		return scan.Difference{}, err
	}
	d, err := scan.Compare(a, b, scan.SamePlace(func(off, n int64) bool { return then.Shares(now, off, n) }))
	if err != nil {
		return d, err
	}
	kept := fits(d.Files)
	d.LeftOut += int64(len(d.Files) - kept)
	d.Files = d.Files[:kept]
	return d, nil
}

// fits says how many of a list's first items an answer has room for.
func fits[T any](list []T) int {
	room := answerRoom
	for i, item := range list {
		text, err := json.Marshal(item)
		if room -= len(text) + 1; err != nil || room < 0 {
			return i
		}
	}
	return len(list)
}

// rootOf finds the root file system of a disk.
func rootOf(v *volume.Volume) (*ext4.FS, error) {
	list, err := ext4.Find(v, v.Size())
	if err != nil && !errors.Is(err, ext4.ErrPartitions) {
		return nil, err
	}
	for _, at := range list {
		if !at.Named() {
			continue
		}
		fsys, err := ext4.Open(v, at.Offset, at.Size)
		if err != nil {
			return nil, err
		}
		if _, err := fsys.Stat("/etc/passwd"); err == nil {
			return fsys, nil
		}
	}
	return nil, errors.New("no ext4 file system with an /etc/passwd: what this machine's disk holds can't be told")
}

// Ran is a process of one of two states of a machine.
type Ran struct {
	PID     int64    `json:"pid"`
	PPID    int64    `json:"ppid"`
	UID     uint32   `json:"uid"`
	EUID    uint32   `json:"euid"`
	Comm    string   `json:"comm"`
	Cmdline string   `json:"cmdline"`
	Exe     string   `json:"exe"`
	Change  string   `json:"change"`         // started, ended or changed
	What    []string `json:"what,omitempty"` // of a changed one, as it is later: user, program, parent
}

// Processes is what two states' processes differ in.
type Processes struct {
	List    []Ran `json:"list,omitempty"`
	LeftOut int64 `json:"left_out"`
}

// diffProcesses answers it: two guests' memory, each as large as the question says, and their kernel's profile.
func diffProcesses(text string, file func(n int) *os.File) (Processes, error) {
	var size uint64
	if err := json.Unmarshal([]byte(text), &size); err != nil || size == 0 || size > 1<<44 {
		return Processes{}, fmt.Errorf("memory of %q bytes", text)
	}
	profile, err := kernel.Open(file(2))
	if err != nil {
		return Processes{}, err
	}
	var lists [2][]introspect.Process
	for i := range lists {
		ram, err := memory.Map(file(i), memory.Q35Layout(size))
		if err != nil {
			return Processes{}, err
		}
		g, err := introspect.Attach(ram, profile)
		if err != nil {
			return Processes{}, fmt.Errorf("the guest's kernel: %w", err)
		}
		if lists[i], err = g.Processes(); err != nil {
			return Processes{}, err
		}
	}
	list := changedProcesses(lists[0], lists[1])
	kept := fits(list)
	return Processes{List: list[:kept], LeftOut: int64(len(list) - kept)}, nil
}

// A process is the same in both where number and start are; kernel threads are left out of the telling where they only come and go.
func changedProcesses(then, now []introspect.Process) (list []Ran) {
	type key struct {
		pid   int64
		start uint64
	}
	before := map[key]introspect.Process{}
	for _, p := range then {
		before[key{p.PID, p.StartTime}] = p
	}
	for _, p := range now {
		k := key{p.PID, p.StartTime}
		was, ok := before[k]
		delete(before, k)
		if !ok {
			list = append(list, ran(p, "started", nil))
		} else if what := changedIn(was, p); len(what) > 0 {
			list = append(list, ran(p, "changed", what))
		}
	}
	for _, p := range before {
		list = append(list, ran(p, "ended", nil))
	}
	slices.SortFunc(list, func(a, b Ran) int {
		if a.PID != b.PID {
			return int(a.PID - b.PID)
		}
		return len(a.Change) - len(b.Change) // ended before started
	})
	return list
}

func changedIn(a, b introspect.Process) (what []string) {
	if a.UID != b.UID || a.EUID != b.EUID || a.GID != b.GID || a.EGID != b.EGID {
		what = append(what, "user")
	}
	unknown := func(field string) bool { return slices.Contains(a.Unknown, field) || slices.Contains(b.Unknown, field) }
	if a.Exe != b.Exe && !unknown("exe") {
		what = append(what, "program")
	}
	if a.PPID != b.PPID {
		what = append(what, "parent")
	}
	return what
}

func ran(p introspect.Process, change string, what []string) Ran {
	t := func(s string) string { return event.Text([]byte(s[:min(len(s), 1024)])) }
	return Ran{PID: p.PID, PPID: p.PPID, UID: p.UID, EUID: p.EUID, Comm: t(p.Comm), Cmdline: t(p.Cmdline), Exe: t(p.Exe), Change: change, What: what}
}

// The daemon's words for what is found; it does not import the package that finds it.
type (
	Files     = scan.Difference
	FileState = scan.Node
)

// Differ lists the files that two disks do not have alike.
func (w Worker) Differ(ctx context.Context, d Disks) (found scan.Difference, err error) {
	q := comparison{Then: len(d.Then), Now: len(d.Now)}
	files := slices.Concat(d.Then, d.Now)
	if d.Overlay != nil {
		q.Overlay, q.Now, files = true, q.Now+1, append(files, d.Overlay)
	}
	text, err := json.Marshal(q)
	if err != nil {
		return found, err
	}
	err = w.ask(ctx, &found, []string{"differ", string(text)}, files...)
	return found, err
}

// Processes lists the processes that two guests' memory does not have alike. All files are open for reading.
func (w Worker) Processes(ctx context.Context, size uint64, then, now, profile *os.File) (found Processes, err error) {
	err = w.ask(ctx, &found, []string{"processes", fmt.Sprint(size)}, then, now, profile)
	return found, err
}
