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
	name   string
	url    string
	server *exec.Cmd // nil: there is none
}

// serverOf is a target that a program serves on a socket.
func serverOf(ctx context.Context, what, socket, program string, args ...string) (target, error) {
	cmd := exec.CommandContext(ctx, program, args...)
	cmd.Stderr = os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	os.Remove(socket)
	if err := cmd.Start(); err != nil {
		return target{}, err
	}
	t := target{what, "nbd+unix:///?socket=" + socket, cmd}
	for range 500 {
		if _, err := os.Stat(socket); err == nil {
			return t, nil
		}
		time.Sleep(10 * time.Millisecond)
	}
	t.stop()
	return target{}, fmt.Errorf("%s did not make its socket", program)
}

func (t *target) stop() {
	if t.server != nil {
		t.server.Process.Signal(syscall.SIGTERM)
		t.server.Wait()
		t.server = nil
	}
}

// cpu is what the server has used so far, in ticks of 10 ms.
func (t *target) cpu() time.Duration {
	if t.server == nil {
		return 0
	}
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", t.server.Process.Pid))
	if err != nil {
		return 0
	}
	f := strings.Fields(string(b)[strings.LastIndexByte(string(b), ')')+1:])
	u, _ := strconv.Atoi(f[11])
	s, _ := strconv.Atoi(f[12])
	return time.Duration(u+s) * 10 * time.Millisecond
}

// targets are raw, ours, socketOnly and theirs, in this order, over the same content.
type targets struct {
	dir  string
	size int64
	self string
	list []target
}

func (t *targets) path(name string) string { return filepath.Join(t.dir, name) }

func setUp(ctx context.Context, dir string, size int64) (*targets, error) {
	self, err := os.Executable()
	if err != nil {
		return nil, err
	}
	t := &targets{dir: dir, size: size, self: self}
	for _, name := range []string{"raw", "nbd"} {
		if err := writeRandom(t.path(name), size); err != nil {
			return nil, err
		}
	}
	if err := importRaw(t.path("raw"), t.path("base"), size); err != nil {
		return nil, err
	}
	alone, err := serverOf(ctx, "socket alone", t.path("alone.sock"), self, "ceiling", t.path("alone.sock"), t.path("raw"))
	if err != nil {
		return nil, err
	}
	qemu, err := serverOf(ctx, "qemu-nbd", t.path("theirs.sock"), "qemu-nbd", "-t", "-f", "raw", "-k", t.path("theirs.sock"), t.path("nbd"))
	t.list = []target{raw: {name: "raw file", url: t.path("raw")}, ours: {name: "vigia"}, socketOnly: alone, theirs: qemu}
	if err != nil {
		t.tearDown()
	}
	return t, err
}

func (t *targets) tearDown() {
	for k := range t.list {
		t.list[k].stop()
	}
}

// prepare gives vigia a new overlay, unless the case goes on with the last one, and settles all files. For
// a case that writes, its own first round fills the caches, of the raw file as of the overlay.
func (t *targets) prepare(ctx context.Context, c benchCase) error {
	if !c.after || t.list[ours].server == nil {
		t.list[ours].stop()
		os.Remove(t.path("overlay"))
		if err := makeOverlay(t.path("base"), t.path("overlay"), t.size); err != nil {
			return err
		}
		var err error
		t.list[ours], err = serverOf(ctx, "vigia", t.path("ours.sock"), t.self, "serve", t.path("ours.sock"), t.path("base"), t.path("overlay"))
		if err != nil {
			return err
		}
	}
	if err := settle(true, t.path("base")); err != nil {
		return err
	}
	return settle(!c.write(), t.path("raw"), t.path("nbd"), t.path("overlay"))
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

func importRaw(raw, base string, size int64) error {
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
	_, err = volume.ImportRaw(b, src, size, nil)
	return err
}

func makeOverlay(base, over string, size int64) error {
	b, err := os.Open(base)
	if err != nil {
		return err
	}
	defer b.Close()
	info, err := volume.ReadInfo(b)
	if err != nil {
		return err
	}
	o, err := os.Create(over)
	if err != nil {
		return err
	}
	defer o.Close()
	return volume.Create(o, volume.CreateOptions{Size: size, Parent: info.ID})
}

func load() string {
	b, _ := os.ReadFile("/proc/loadavg")
	f := strings.Fields(string(b))
	if len(f) == 0 {
		return "unknown"
	}
	return f[0]
}
