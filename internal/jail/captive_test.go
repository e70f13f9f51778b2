package jail

import (
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
)

// captive is the program of testdata/captive, built without cgo as vigia is.
var captive string

func TestMain(m *testing.M) {
	if len(os.Args) > 1 && os.Args[1] == StageCommand { // started by a Start in this very process
		if err := Stage(); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	os.Exit(runTests(m))
}

func runTests(m *testing.M) int {
	dir, err := os.MkdirTemp("", "vigia-jail")
	if err != nil {
		panic(err)
	}
	defer os.RemoveAll(dir)
	os.Chmod(dir, 0o755) // an ordinary user is to execute it
	captive = filepath.Join(dir, "captive")
	build := exec.Command("go", "build", "-o", captive, "./testdata/captive")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		fmt.Fprintf(os.Stderr, "build captive: %v\n%s", err, out)
		return 1
	}
	return m.Run()
}

// outcome mirrors the captive's.
type outcome struct {
	Error    string
	Measures []Measure
	Compared []Measure
	Seen     *Observation
	Said     json.RawMessage
	Exit     string
	Log      string
}

// caller is who the daemon is: root, giving each process its own user, or an ordinary user.
type caller struct {
	name string
	uid  int // the daemon's
	give string
}

func callers() []caller {
	if os.Getuid() != 0 {
		return []caller{{"user", os.Getuid(), "-1"}}
	}
	return []caller{{"root", 0, "1879048193"}, {"user", 65534, "-1"}}
}

// command makes the captive run as the daemon.
func (c caller) command(args ...string) *exec.Cmd {
	cmd := exec.Command(captive, args...)
	cmd.Dir = "/"
	if c.uid != os.Getuid() {
		cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: uint32(c.uid), Gid: uint32(c.uid)}}
	}
	return cmd
}

func (c caller) drive(t *testing.T, profile, refusal string, attempts ...string) map[string]outcome {
	t.Helper()
	cmd := c.command(append([]string{"drive", profile, c.give, refusal}, attempts...)...)
	var log strings.Builder
	cmd.Stderr = &log
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("%s: %v: %s%s", cmd, err, out, log.String())
	}
	var outcomes map[string]outcome
	if err := json.Unmarshal(out, &outcomes); err != nil {
		t.Fatalf("%s: %v: %s", cmd, err, out)
	}
	return outcomes
}

// lacking are the measures that are not in force, by name.
func lacking(ms []Measure) map[string]string {
	l := map[string]string{}
	for _, m := range ms {
		if !m.InForce {
			l[m.Name] = m.Why
		}
	}
	return l
}
