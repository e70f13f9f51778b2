package jail

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

// tagVariable marks a process in its environment, which the kernel keeps as it was at execve unless the process itself
// overwrites it. A process in a control group is found by that too, whatever it does.
const tagVariable = "VIGIA_TAG"

// Leftover is a thing of a dead machine, or of a start that a crash cut short.
type Leftover struct {
	Kind string // process, cgroup or file
	Name string // a process's tag, a group's name, a file's base name
	PID  int    // of a process
	Path string // of a group or a file

	start uint64
}

func (l Leftover) String() string {
	if l.Kind == "process" {
		return fmt.Sprintf("process %d (%s)", l.PID, l.Name)
	}
	return l.Kind + " " + l.Path
}

// Search says what to look for: what starts with State and is not known. Mounts need no search: they live in the
// namespaces of their process and go with it.
type Search struct {
	State string                         // tags and file names begin with it
	Tree  *Tree                          // may be nil
	Files []string                       // directories that hold a machine's files by names that begin with State: /dev/shm
	Known func(tag string, pid int) bool // processes that have been adopted
	Keep  func(name string) bool         // groups and files of living machines
}

// Leftovers lists, processes first, so that what they hold is free when its turn comes.
func Leftovers(s Search) ([]Leftover, error) {
	found, err := s.processes()
	if err != nil {
		return nil, err
	}
	if s.Tree != nil {
		groups, err := s.groups()
		if err != nil {
			return nil, err
		}
		found = append(found, groups...)
	}
	for _, dir := range s.Files {
		entries, err := os.ReadDir(dir)
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return nil, err
		}
		for _, e := range entries {
			if strings.HasPrefix(e.Name(), s.State) && !s.Keep(e.Name()) {
				found = append(found, Leftover{Kind: "file", Name: e.Name(), Path: filepath.Join(dir, e.Name())})
			}
		}
	}
	return found, nil
}

func (s Search) processes() ([]Leftover, error) {
	entries, err := os.ReadDir("/proc")
	if err != nil {
		return nil, err
	}
	var found []Leftover
	for _, e := range entries {
		pid, err := strconv.Atoi(e.Name())
		if err != nil || pid == os.Getpid() {
			continue
		}
		tag, ok := tagOf(pid)
		if !ok || !strings.HasPrefix(tag, s.State+"/") || s.Known(tag, pid) {
			continue
		}
		if start, err := startTime(pid); err == nil {
			found = append(found, Leftover{Kind: "process", Name: tag, PID: pid, start: start})
		}
	}
	return found, nil
}

// tagOf reads a tag; not every process may be read, and one that ends meanwhile has none.
func tagOf(pid int) (string, bool) {
	raw, err := readBounded("/proc/" + strconv.Itoa(pid) + "/environ")
	if err != nil {
		return "", false
	}
	for _, v := range bytes.Split(raw, []byte{0}) {
		if tag, ok := bytes.CutPrefix(v, []byte(tagVariable+"=")); ok {
			return string(tag), true
		}
	}
	return "", false
}

// groups lists the groups under the tree's directory, and the processes that are in those of no living machine.
func (s Search) groups() ([]Leftover, error) {
	var processes, groups []Leftover
	for _, base := range s.Tree.bases() {
		top := filepath.Join(base, s.Tree.dir)
		entries, err := os.ReadDir(top)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return nil, err
		}
		for _, e := range entries {
			if !e.IsDir() || s.Keep(e.Name()) {
				continue
			}
			dir := filepath.Join(top, e.Name())
			groups = append(groups, Leftover{Kind: "cgroup", Name: e.Name(), Path: dir})
			raw, _ := readBounded(filepath.Join(dir, "cgroup.procs"))
			for _, pid := range numbers(strings.Fields(string(raw))) {
				if start, err := startTime(pid); err == nil {
					processes = append(processes, Leftover{Kind: "process", Name: e.Name(), PID: pid, start: start})
				}
			}
		}
	}
	return append(processes, groups...), nil
}

// Remove removes it. One that is gone already is no error.
func (l Leftover) Remove() error {
	switch l.Kind {
	case "process":
		return l.kill()
	case "cgroup":
		return removeGroup(l.Path)
	case "file":
		if err := os.Remove(l.Path); !errors.Is(err, fs.ErrNotExist) {
			return err
		}
		return nil
	}
	return fmt.Errorf("no way to remove a %s", l.Kind)
}

func (l Leftover) kill() error {
	p, err := Adopt(l.PID, l.start)
	if errors.Is(err, ErrGone) {
		return nil
	}
	if err != nil {
		return err
	}
	defer p.Close()
	if err := p.Signal(syscall.SIGKILL); err != nil {
		return err
	}
	<-p.Done()
	return nil
}

// bases are the directories of our own group, once each.
func (t *Tree) bases() []string {
	seen := map[string]bool{}
	var bases []string
	for _, b := range t.base {
		if !seen[b] {
			seen[b] = true
			bases = append(bases, b)
		}
	}
	return bases
}

// Remove removes the directory of all groups, when the last machine is gone.
func (t *Tree) Remove() error {
	var errs []error
	for _, b := range t.bases() {
		err := os.Remove(filepath.Join(b, t.dir))
		if err != nil && !errors.Is(err, fs.ErrNotExist) && !errors.Is(err, unix.EBUSY) {
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}
