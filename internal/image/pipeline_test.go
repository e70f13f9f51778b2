package image

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"vigia/internal/volume"
	"vigia/internal/volume/ext4"
)

// TestBuild runs the whole pipeline but for mmdebstrap, in whose place a script gives a small root.
func TestBuild(t *testing.T) {
	fakeMmdebstrap(t, `printf '%s\n' "$@" >"$(dirname "$root")/args"; echo 'I: installing essential packages...'; cp "$root" "$tar"`)
	s := openStore(t)
	s.opts.Cache = filepath.Join(t.TempDir(), "a cache")
	var said []string
	img, err := s.Build(t.Context(), testRecipe(t), "mine", func(step string, _, _ int64) { said = append(said, step) })
	if err != nil {
		t.Fatal(err)
	}
	if img.Name != "mine" || img.Kernel != "6.1.0-10" || img.Disk != 64<<20 || img.Root != "LABEL=root" {
		t.Errorf("%+v", img)
	}
	for _, word := range []string{"root=LABEL=root", "rootfstype=ext4", "rw", "console=ttyS0"} {
		if !strings.Contains(" "+img.Cmdline+" ", " "+word+" ") {
			t.Errorf("command line %q lacks %s", img.Cmdline, word)
		}
	}
	if kernel, err := os.ReadFile(img.Path(PartKernel)); err != nil || string(kernel) != "new kernel" {
		t.Errorf("kernel %q %v", kernel, err)
	}
	if got := readFromImage(t, &img, "/usr/bin/busybox"); got != "#!busybox" {
		t.Errorf("the disk holds %q", got)
	}
	if got, ok := s.FindRecipe(img.Digest); !ok || got.ID != img.ID {
		t.Error("not found by its recipe")
	}
	if !strings.Contains(strings.Join(said, ","), "installing the base") || !strings.Contains(strings.Join(said, ","), "hashing disk.layer") {
		t.Errorf("progress %q", said)
	}
	again, err := s.Build(t.Context(), testRecipe(t), "", nil)
	if err != nil || again.Name != "test" {
		t.Fatalf("%v %v", again.Info, err)
	}
	leftovers(t, s)
}

// readFromImage reads a file of an image's disk the way a guest's would be read.
func readFromImage(t *testing.T, img *Image, name string) string {
	t.Helper()
	layers, err := img.OpenDisk()
	if err != nil {
		t.Fatal(err)
	}
	defer layers[0].Close()
	v, err := volume.Open(layers, nil, volume.Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer v.Close()
	fsys, err := ext4.Open(v, 0, v.Size())
	if err != nil {
		t.Fatal(err)
	}
	text, err := fsys.ReadFile(name, 1<<20)
	if err != nil {
		t.Fatal(err)
	}
	return string(text)
}

func TestBuildFails(t *testing.T) {
	for name, c := range map[string]struct{ script, says string }{
		"mmdebstrap":    {`echo "E: Unable to locate package nonesuch" >&2; exit 1`, "Unable to locate package nonesuch"},
		"no kernel":     {`cd "$(dirname "$root")"; mkdir etc; tar -cf "$tar" etc`, `is "linux-image-cloud-amd64" a kernel package?`},
		"no tar":        {`exit 0`, "root.tar"},
		"broken tar":    {`head -c 700 "$root" >"$tar"`, "root.tar"},
		"does not fit":  {`head -c 90000000 /dev/urandom >"$(dirname "$root")/big"; cp "$root" "$tar"; cd "$(dirname "$root")"; tar -rf "$tar" big`, "mke2fs"},
		"noise":         {`yes "a very long line of noise" | head -c 3000000; echo last words >&2; exit 3`, "last words"},
		"not a program": {`exec /nonexistent`, "exit status"},
	} {
		t.Run(name, func(t *testing.T) {
			fakeMmdebstrap(t, c.script)
			s := openStore(t)
			_, err := s.Build(t.Context(), testRecipe(t), "", nil)
			if err == nil || !strings.Contains(err.Error(), c.says) || len(err.Error()) > 10000 {
				t.Errorf("%v", err)
			}
			if list, _ := s.List(); len(list) != 0 {
				t.Errorf("an image came of it: %v", list)
			}
			leftovers(t, s)
		})
	}
}

func TestBuildWithoutTools(t *testing.T) {
	s := openStore(t)
	for _, name := range []string{"", "../x", "Upper"} {
		r := testRecipe(t)
		r.Name = "Bad Name"
		if _, err := s.Build(t.Context(), r, name, nil); err == nil {
			t.Errorf("name %q was taken", name)
		}
	}
	if _, err := findTool("nonesuch-tool", "nonesuch"); !errors.Is(err, ErrTool) || !strings.Contains(err.Error(), "script/setup") || !strings.Contains(err.Error(), "nonesuch") {
		t.Error(err)
	}
}

// TestCancelledBuild ends the context while the root is being made, by a program that has a child of its own.
func TestCancelledBuild(t *testing.T) {
	fakeMmdebstrap(t, `sleep 1000 & echo $! >"$(dirname "$root")/pid"; echo 'I: installing essential packages...'; wait`)
	s := openStore(t)
	ctx, cancel := context.WithCancelCause(t.Context())
	why := errors.New("changed my mind")
	_, err := s.Build(ctx, testRecipe(t), "", func(step string, _, _ int64) {
		if step == "installing the base" {
			cancel(why)
		}
	})
	if !errors.Is(err, why) {
		t.Errorf("%v", err)
	}
	path := strings.SplitN(os.Getenv("PATH"), ":", 2)[0]
	text, err := os.ReadFile(filepath.Join(path, "pid"))
	if err != nil {
		t.Fatal(err)
	}
	pid, _ := strconv.Atoi(strings.TrimSpace(string(text)))
	waitGone(t, pid)
	leftovers(t, s)
}

// waitGone waits until a process is gone or nothing but a zombie.
func waitGone(t *testing.T, pid int) {
	t.Helper()
	for range 500 {
		stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
		if err != nil || strings.Contains(string(stat), ") Z ") {
			return
		}
		time.Sleep(10 * time.Millisecond)
	}
	syscall.Kill(pid, syscall.SIGKILL)
	t.Errorf("process %d is still there", pid)
}

// TestKilledBuild kills a process that builds, as a power cut would, and opens its store again.
func TestKilledBuild(t *testing.T) {
	if dir := os.Getenv("VIGIA_TEST_BUILD_IN"); dir != "" {
		buildForEver(dir)
	}
	fakeMmdebstrap(t, `cp "$root" "$tar"; mkdir -p "${TMPDIR:-/nonexistent}/mmdebstrap.x/etc"; trap '' TERM; echo 'I: installing essential packages...'; while :; do sleep 1; done`)
	dir := filepath.Join(t.TempDir(), "images")
	cmd := exec.Command(os.Args[0], "-test.run=^TestKilledBuild$")
	cmd.Env = append(os.Environ(), "VIGIA_TEST_BUILD_IN="+dir)
	cmd.Stderr = os.Stderr
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	line, err := bufio.NewReader(out).ReadString('\n')
	if err != nil {
		t.Fatal(err)
	}
	child := childOf(t, cmd.Process.Pid)
	grandchild := childOf(t, child)
	other, err := Open(dir, Options{Worker: fakeKernels{}}) // while it runs, nothing of it is swept
	if err != nil {
		t.Fatal(err)
	}
	if left, _ := os.ReadDir(filepath.Join(dir, ".tmp")); len(left) != 1 {
		t.Errorf("after %q the build's directory is not there: %v", line, left)
	}
	cmd.Process.Kill()
	cmd.Wait()
	waitGone(t, child)
	waitGone(t, grandchild)
	s, err := Open(dir, Options{Worker: fakeKernels{}})
	if err != nil {
		t.Fatal(err)
	}
	leftovers(t, s)
	leftovers(t, other)
	if list, err := s.List(); err != nil || len(list) != 0 {
		t.Errorf("%v %v", list, err)
	}
}

func childOf(t *testing.T, pid int) int {
	t.Helper()
	tasks, _ := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/children", pid))
	for _, task := range tasks {
		text, _ := os.ReadFile(task)
		if fields := strings.Fields(string(text)); len(fields) > 0 {
			n, _ := strconv.Atoi(fields[0])
			return n
		}
	}
	t.Fatal("the build runs no program")
	return 0
}

func buildForEver(dir string) {
	s, err := Open(dir, Options{Worker: fakeKernels{}})
	if err == nil {
		var r Recipe
		if r, err = Parse("test.yaml", []byte("size: 64M\n"), nil); err == nil {
			_, err = s.Build(context.Background(), r, "", func(step string, _, _ int64) {
				if step == "installing the base" {
					fmt.Println("building")
				}
			})
		}
	}
	fmt.Println(err)
	os.Exit(1)
}
