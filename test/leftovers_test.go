package test

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"
)

// states are the state directories that tests have used, each with the user that owned it.
var states struct {
	sync.Mutex
	all []stateDir
}

type stateDir struct {
	path string
	uid  int
}

// tag is how vigia marks what belongs to a state: processes by VIGIA_TAG in their environment, control groups and the
// directory in /dev/shm by their names (doc/architecture.md).
func (s stateDir) tag() string {
	sum := sha256.Sum256([]byte(s.path))
	return "vigia-" + strconv.Itoa(s.uid) + "-" + hex.EncodeToString(sum[:4])
}

func remember(s stateDir) {
	states.Lock()
	defer states.Unlock()
	states.all = append(states.all, s)
}

func everyState() []stateDir {
	states.Lock()
	defer states.Unlock()
	return slices.Clone(states.all)
}

// leftovers lists everything on this host that belongs to one of the states: daemons, workers, QEMUs, RAM files, control
// groups, mounts, sockets.
func leftovers(of []stateDir) (found []string) {
	for _, s := range of {
		found = append(found, s.processes()...)
		found = append(found, s.files()...)
		found = append(found, s.groups()...)
	}
	mounts, _ := os.ReadFile("/proc/self/mountinfo")
	for line := range strings.Lines(string(mounts)) {
		for _, s := range of {
			if strings.Contains(line, s.path+"/") {
				found = append(found, "mount "+strings.TrimSpace(line))
			}
		}
	}
	return found
}

func (s stateDir) processes() (found []string) {
	entries, _ := os.ReadDir("/proc")
	for _, e := range entries {
		pid, err := strconv.Atoi(e.Name())
		if err != nil || pid == os.Getpid() {
			continue
		}
		environ, _ := os.ReadFile("/proc/" + e.Name() + "/environ")
		cmdline, _ := os.ReadFile("/proc/" + e.Name() + "/cmdline")
		if len(cmdline) == 0 {
			continue // a zombie, or gone
		}
		if bytes.Contains(environ, []byte("VIGIA_TAG="+s.tag()+"/")) || bytes.Contains(environ, []byte("VIGIA_STATE="+s.path+"\x00")) || bytes.Contains(cmdline, []byte(s.path)) {
			found = append(found, fmt.Sprintf("process %d: %.200q", pid, bytes.ReplaceAll(cmdline, []byte{0}, []byte{' '})))
		}
	}
	return found
}

// files are RAM files, and sockets of machines; the API's socket too.
func (s stateDir) files() (found []string) {
	filepath.WalkDir(filepath.Join("/dev/shm", s.tag()), func(path string, d fs.DirEntry, err error) error {
		if err == nil {
			found = append(found, path)
		}
		return nil
	})
	filepath.WalkDir(s.path, func(path string, d fs.DirEntry, err error) error {
		if err == nil && d.Type()&fs.ModeSocket != 0 {
			found = append(found, "socket "+path)
		}
		return nil
	})
	for _, dir := range []string{"run", "images/.tmp"} {
		entries, _ := os.ReadDir(filepath.Join(s.path, dir))
		for _, e := range entries {
			found = append(found, filepath.Join(s.path, dir, e.Name()))
		}
	}
	return found
}

func (s stateDir) groups() (found []string) {
	filepath.WalkDir("/sys/fs/cgroup", func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return fs.SkipDir
		}
		if d.IsDir() && d.Name() == s.tag() {
			found = append(found, path)
			return fs.SkipDir
		}
		return nil
	})
	return found
}

// wantNothingLeft fails a test whose daemon has left something behind. What ends by itself gets some seconds to do so.
func wantNothingLeft(t *testing.T, s stateDir) bool {
	t.Helper()
	var left []string
	for deadline := time.Now().Add(15 * time.Second); ; time.Sleep(200 * time.Millisecond) {
		if left = leftovers([]stateDir{s}); len(left) == 0 {
			return true
		}
		if time.Now().After(deadline) {
			t.Errorf("left behind:\n  %s", strings.Join(left, "\n  "))
			return false
		}
	}
}
