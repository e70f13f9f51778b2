package image

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"
)

// Command is a program to run. Files become its descriptors 3, 4, …, which the arguments name by FilePath.
type Command struct {
	Path  string // absolute
	Args  []string
	Env   []string // added to a small fixed environment
	Dir   string
	Files []*os.File

	Stdout, Stderr io.Writer
}

// FilePath is how a Command's arguments name its descriptor fd.
func FilePath(fd int) string { return "/proc/self/fd/" + strconv.Itoa(fd) }

// ArgsAt returns the arguments for a Runner that shows the files by another name, where there is no /proc.
func (c Command) ArgsAt(name func(fd int) string) []string {
	args := slices.Clone(c.Args)
	for fd := 3 + len(c.Files) - 1; fd >= 3; fd-- { // 30 before 3
		for i := range args {
			args[i] = strings.ReplaceAll(args[i], FilePath(fd), name(fd))
		}
	}
	return args
}

// Runner runs a command to its end and returns an error, an *ExitError if it did not exit with 0. A Runner that is
// given to a Store runs programs on hostile input: it is meant to confine them to their Files.
type Runner func(ctx context.Context, c Command) error

// ExitError tells how a command ended: "exit status 1".
type ExitError struct{ Status string }

func (e *ExitError) Error() string { return e.Status }

// grace is how long a program that is told to end may take to clean up.
const grace = 15 * time.Second

// minder is the shell that stands between this process and a program. Its standard input is a pipe of which this
// process has the other end: when that closes without a word, this process is gone, and the whole process group is
// killed. A signal sent to the program's parent alone would not do: mmdebstrap waits for its children then, whatever
// they are doing. A request to end goes to the group; the shell outlives it until the program has cleaned up.
const minder = `exec 9<&0 </dev/null
"$@" 9<&- &
child=$!
(trap '' TERM; read -r _ <&9; kill -KILL 0) &
minder=$!
trap : TERM
wait $child
status=$?
while [ $status -gt 128 ] && kill -0 $child 2>/dev/null; do
	wait $child
	status=$?
done
kill -KILL $minder
exit $status`

// Run runs a command as this process would, in a process group of its own. When the context ends the group is told to
// end and, after a time of grace, is killed; when this process dies, it is killed at once.
func Run(ctx context.Context, c Command) error {
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	cmd := exec.Command("/bin/sh", append([]string{"-c", minder, "sh", c.Path}, c.Args...)...)
	cmd.Env = append([]string{"PATH=/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL=C.UTF-8", "HOME=/nonexistent"}, c.Env...)
	cmd.Dir, cmd.ExtraFiles = c.Dir, c.Files
	cmd.Stdout, cmd.Stderr = c.Stdout, c.Stderr
	cmd.WaitDelay = time.Second
	// As root mmdebstrap mounts the host's /sys, /proc and /dev/shm into the root that it builds. In a mount namespace of
	// its own the mounts go with the last of its processes, however that ends.
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	if os.Geteuid() == 0 && mayUnshare() {
		cmd.SysProcAttr.Unshareflags = syscall.CLONE_NEWNS // Go makes it private
	}
	life, line, err := os.Pipe()
	if err != nil {
		return err
	}
	defer line.Close()
	cmd.Stdin = life
	err = cmd.Start()
	life.Close()
	if err != nil {
		return err
	}
	done := make(chan error, 1)
	go func() { done <- cmd.Wait() }()
	select {
	case err := <-done:
		var exit *exec.ExitError
		if errors.As(err, &exit) {
			return &ExitError{exit.Error()}
		}
		return err
	case <-ctx.Done():
	}
	group := -cmd.Process.Pid
	syscall.Kill(group, syscall.SIGTERM)
	select {
	case <-done:
	case <-time.After(grace):
	}
	syscall.Kill(group, syscall.SIGKILL)
	return context.Cause(ctx)
}

// mayUnshare tries whether root here is one who may have a mount namespace; in a container it may not be.
var mayUnshare = sync.OnceValue(func() bool {
	cmd := exec.Command("/bin/true")
	cmd.SysProcAttr = &syscall.SysProcAttr{Unshareflags: syscall.CLONE_NEWNS}
	return cmd.Run() == nil
})

// findTool finds a program, also where an ordinary user's PATH does not look.
func findTool(name, pkg string) (string, error) {
	if p, err := exec.LookPath(name); err == nil {
		return filepath.Abs(p)
	}
	for _, dir := range []string{"/usr/sbin", "/sbin", "/usr/bin", "/bin"} {
		if p, err := exec.LookPath(filepath.Join(dir, name)); err == nil {
			return p, nil
		}
	}
	return "", fmt.Errorf("%w: %s: run script/setup, or install the package %s", ErrTool, name, pkg)
}

// tail keeps the last lines a program wrote, and passes each whole line on.
type tail struct {
	mu    sync.Mutex
	rest  string
	lines []string
	line  func(string)
}

const tailLines, tailLength = 12, 400

func (t *tail) Write(p []byte) (int, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.rest += string(p)
	for {
		line, rest, ok := strings.Cut(t.rest, "\n")
		if !ok {
			if len(t.rest) > tailLength {
				t.rest = t.rest[:tailLength]
			}
			return len(p), nil
		}
		t.rest = rest
		line = strings.TrimRight(line[strings.LastIndexByte(line, '\r')+1:], " \t")
		if len(line) > tailLength {
			line = line[:tailLength]
		}
		if line == "" {
			continue
		}
		t.lines = append(t.lines, line)
		if len(t.lines) > tailLines {
			t.lines = t.lines[1:]
		}
		if t.line != nil {
			t.line(line)
		}
	}
}

// explain adds what a program last said to the error of running it.
func (t *tail) explain(name string, err error) error {
	if err == nil {
		return nil
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	var exit *ExitError
	if !errors.As(err, &exit) {
		return fmt.Errorf("%s: %w", name, err)
	}
	said := append(t.lines[:len(t.lines):len(t.lines)], strings.TrimSpace(t.rest))
	return fmt.Errorf("%s: %w: it said:\n  %s", name, err, strings.TrimSpace(strings.Join(said, "\n  ")))
}
