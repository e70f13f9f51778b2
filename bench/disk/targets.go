package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"vigia/internal/volume"
)

// target is one way to the disk.
type target struct {
	name string
	url  string
	pid  int // of the server; 0: there is none
}

// targets are the three, over the same content.
type targets struct {
	list  []target
	procs []*exec.Cmd
}

func setUp(ctx context.Context, dir string, size int64) (*targets, error) {
	raw, nbd := filepath.Join(dir, "raw"), filepath.Join(dir, "nbd")
	for _, name := range []string{raw, nbd} {
		if err := writeRandom(name, size); err != nil {
			return nil, err
		}
	}
	base, over := filepath.Join(dir, "base"), filepath.Join(dir, "overlay")
	if err := makeLayers(raw, base, over, size); err != nil {
		return nil, err
	}
	t := new(targets)
	ours, theirs := filepath.Join(dir, "ours.sock"), filepath.Join(dir, "theirs.sock")
	self, err := os.Executable()
	if err != nil {
		return nil, err
	}
	p1, err := t.start(ctx, ours, self, "serve", ours, base, over)
	if err != nil {
		return t, errors.Join(err, t.tearDown())
	}
	p2, err := t.start(ctx, theirs, "qemu-nbd", "-t", "-f", "raw", "-k", theirs, nbd)
	if err != nil {
		return t, errors.Join(err, t.tearDown())
	}
	t.list = []target{{"raw file", raw, 0}, {"vigia", "nbd+unix:///?socket=" + ours, p1}, {"qemu-nbd", "nbd+unix:///?socket=" + theirs, p2}}
	return t, nil
}

func writeRandom(name string, size int64) error {
	f, err := os.Create(name)
	if err != nil {
		return err
	}
	w := bufio.NewWriterSize(f, 1<<20)
	r := rand.NewChaCha8([32]byte{1})
	buf := make([]byte, 1<<20)
	for n := int64(0); n < size; n += int64(len(buf)) {
		r.Read(buf)
		w.Write(buf)
	}
	return errors.Join(w.Flush(), f.Close())
}

func makeLayers(raw, base, over string, size int64) error {
	src, err := os.Open(raw)
	if err != nil {
		return err
	}
	defer src.Close()
	b, err := os.Create(base)
	if err != nil {
		return err
	}
	defer b.Close()
	id, err := volume.ImportRaw(b, src, size, nil)
	if err != nil {
		return err
	}
	o, err := os.Create(over)
	if err != nil {
		return err
	}
	defer o.Close()
	return volume.Create(o, volume.CreateOptions{Size: size, Parent: id})
}

// start runs a server and waits for its socket.
func (t *targets) start(ctx context.Context, socket string, name string, args ...string) (int, error) {
	cmd := exec.CommandContext(ctx, name, args...)
	cmd.Stderr = os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := cmd.Start(); err != nil {
		return 0, err
	}
	t.procs = append(t.procs, cmd)
	for range 500 {
		if _, err := os.Stat(socket); err == nil {
			return cmd.Process.Pid, nil
		}
		time.Sleep(10 * time.Millisecond)
	}
	return 0, fmt.Errorf("%s did not make its socket", name)
}

func (t *targets) tearDown() error {
	for _, p := range t.procs {
		p.Process.Signal(syscall.SIGTERM)
		p.Wait()
	}
	return nil
}

// cpuTime is what a process has used so far, in ticks of 10 ms.
func cpuTime(pid int) time.Duration {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return 0
	}
	f := strings.Fields(string(b)[strings.LastIndexByte(string(b), ')')+1:])
	u, _ := strconv.Atoi(f[11])
	s, _ := strconv.Atoi(f[12])
	return time.Duration(u+s) * 10 * time.Millisecond
}

func load() string {
	b, _ := os.ReadFile("/proc/loadavg")
	f := strings.Fields(string(b))
	if len(f) == 0 {
		return "unknown"
	}
	return f[0]
}
