package test

import (
	"bytes"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

// TestRefusals asks for what can't be: each is refused by name, with what to do, and leaves everything as it was.
func TestRefusals(t *testing.T) {
	h := newHost(t)
	h.refused(1, []string{"no vigia daemon runs", " serve"}, "ls")
	h.serve()
	long := strings.Repeat("x", 64)
	busy, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer busy.Close()
	_, port, _ := net.SplitHostPort(busy.Addr().String())
	dir := t.TempDir()
	file := func(name, text string) string {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	for _, c := range []struct {
		status int
		words  []string
		args   []string
	}{
		{2, []string{"a-z"}, []string{"run", "tiny", "Bad_Name"}},
		{2, []string{"a-z"}, []string{"run", "tiny", long}},
		{2, []string{"a-z"}, []string{"run", "tiny", "../up"}},
		{2, []string{"a-z"}, []string{"run", "tiny", ""}},
		{1, []string{"none", "tiny"}, []string{"run", "none", "m"}},
		{2, []string{"96"}, []string{"run", "tiny", "m", "--memory", "1M"}},
		{2, []string{"memory"}, []string{"run", "tiny", "m", "--memory", "lots"}},
		{2, []string{"cpus"}, []string{"run", "tiny", "m", "--cpus", "65"}},
		{2, []string{"cpus"}, []string{"run", "tiny", "m", "--cpus", "-1"}},
		{2, []string{"publish"}, []string{"run", "tiny", "m", "--publish", "99999:22"}},
		{2, []string{"publish"}, []string{"run", "tiny", "m", "--publish", "x"}},
		{1, []string{port, "in use", "ss -lntup"}, []string{"run", "tiny", "m", "--publish", port + ":22"}},
		{2, []string{"published"}, []string{"run", "tiny", "m", "--net", "off", "--publish", "0:22"}},
		{2, []string{"bridge"}, []string{"run", "tiny", "m", "--net", "bridge"}},
		{2, []string{"teleport", "exec"}, []string{"run", "tiny", "m", "--additions", "teleport"}},
		{2, []string{"soon"}, []string{"run", "tiny", "m", "--ttl", "soon"}},
		{2, []string{"fly"}, []string{"run", "tiny", "m", "--rule", "fly out any"}},
		{1, []string{"MiB are free"}, []string{"run", "tiny", "m", "--memory", "900G"}},
		{1, []string{`"none"`, "vigia ls"}, []string{"start", "none"}},
		{1, []string{`"none"`, "vigia ls"}, []string{"console", "none"}},
		{2, []string{"disk.reed"}, []string{"events", "--kind", "disk.reed"}},
		{1, []string{"no-such.yaml"}, []string{"image", "build", filepath.Join(dir, "no-such.yaml")}},
		{2, []string{"debian", "tiny"}, []string{"image", "build", "gentoo"}},
		{2, []string{"key.yaml:2", "sizes"}, []string{"image", "build", file("key.yaml", "suite: bookworm\nsizes: 1G\n")}},
		{2, []string{"syntax.yaml"}, []string{"image", "build", file("syntax.yaml", "suite: [\n")}},
		{1, []string{"trunc.qcow2"}, []string{"image", "import", file("trunc.qcow2", "QFI\xfb\x00\x00\x00\x03")}},
		{1, []string{"empty.raw"}, []string{"image", "import", file("empty.raw", "")}},
		{1, []string{"junk.raw"}, []string{"image", "import", file("junk.raw", strings.Repeat("junk", 300_000))}},
		{1, []string{"none.raw"}, []string{"image", "import", filepath.Join(dir, "none.raw")}},
		{3, []string{"bad.yaml:"}, []string{"policy", "check", file("bad.yaml", "id: x\ntitle: X\non: disk.reed\n")}},
		{1, []string{"none.yaml"}, []string{"policy", "check", filepath.Join(dir, "none.yaml")}},
		{2, []string{"frobnicate"}, []string{"frobnicate"}},
		{2, []string{"yaml"}, []string{"ls", "-o", "yaml"}},
	} {
		t.Run(strings.Join(c.args, " ")[:min(60, len(strings.Join(c.args, " ")))], func(t *testing.T) {
			on := *h
			on.t = t
			on.refused(c.status, c.words, c.args...)
		})
	}
	if list := h.list("ls"); len(list) != 0 {
		t.Errorf("a machine was made: %v", list)
	}
	if dirs, _ := os.ReadDir(h.path("machines")); len(dirs) != 0 {
		t.Errorf("files of machines are left: %v", dirs)
	}
	h.refused(1, []string{"runs already", fmt.Sprint(h.daemon.Process.Pid)}, "serve")
	damagedImages(h)
}

// damagedImages damages the image in ways that a disk does, in a copy, and tries to run each.
func damagedImages(h *host) {
	h.t.Helper()
	id := strings.TrimSpace(string(must(os.ReadFile(h.path("images", "names", "tiny")))))
	image := h.path("images", id)
	for _, c := range []struct {
		part   string
		change func(path string) error
	}{
		{"disk.layer", func(p string) error { return os.Truncate(p, 1<<20) }},
		{"disk.layer", func(p string) error { return os.Truncate(p, 0) }},
		{"vmlinuz", os.Remove},
		{"image.json", func(p string) error { return os.WriteFile(p, []byte("{"), 0o600) }},
	} {
		path := filepath.Join(image, c.part)
		kept := path + ".kept"
		if err := os.Rename(path, kept); err != nil {
			h.t.Fatal(err)
		}
		if c.part != "disk.layer" {
			if err := copyFile(kept, path, 0o600); err != nil {
				h.t.Fatal(err)
			}
		} else { // its beginning is enough: it is cut anyway
			head := make([]byte, 2<<20)
			f := must(os.Open(kept))
			f.Read(head)
			f.Close()
			if err := os.WriteFile(path, head, 0o600); err != nil {
				h.t.Fatal(err)
			}
		}
		if err := c.change(path); err != nil {
			h.t.Fatal(err)
		}
		h.refused(1, []string{"tiny"}, "run", "tiny", "m", "--memory", "256M")
		os.Remove(path)
		if err := os.Rename(kept, path); err != nil {
			h.t.Fatal(err)
		}
	}
	if list := h.list("ls"); len(list) != 0 {
		h.t.Errorf("a machine was made of a damaged image: %v", list)
	}
	h.must("image", "verify", "tiny")
}

func must[T any](v T, err error) T {
	if err != nil {
		panic(err)
	}
	return v
}

var nobody = &syscall.Credential{Uid: 65534, Gid: 65534}

// TestStateRefused starts daemons on states that can't be used.
func TestStateRefused(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root, to be somebody else")
	}
	dir, err := os.MkdirTemp("", "vigia-test-") // where everybody gets to
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(dir)
	os.Chmod(dir, 0o755)
	bin := filepath.Join(dir, "vigia")
	if err := copyFile(program, bin, 0o755); err != nil {
		t.Fatal(err)
	}
	serve := func(t *testing.T, state string, user *syscall.Credential, env ...string) result {
		h := &host{t: t, state: stateDir{state, os.Getuid()}, program: bin, user: user, env: env}
		return h.vigia("serve")
	}
	t.Run("no rights", func(t *testing.T) {
		state := filepath.Join(dir, "closed")
		os.Mkdir(state, 0o700)
		wantRefusal(t, serve(t, state, nobody), state, "--state")
	})
	t.Run("another's", func(t *testing.T) {
		state := filepath.Join(dir, "others")
		os.Mkdir(state, 0o777)
		os.Chmod(state, 0o777)
		wantRefusal(t, serve(t, state, nobody), state)
	})
	t.Run("a file", func(t *testing.T) {
		state := filepath.Join(dir, "file")
		os.WriteFile(state, nil, 0o644)
		wantRefusal(t, serve(t, state, nil), state)
	})
	t.Run("no room", func(t *testing.T) {
		state := filepath.Join(dir, "small")
		os.Mkdir(state, 0o700)
		if err := unix.Mount("tmpfs", state, "tmpfs", 0, "size=16m,mode=700"); err != nil {
			t.Skipf("no tmpfs can be mounted: %v", err)
		}
		defer unix.Unmount(state, unix.MNT_DETACH)
		wantRefusal(t, serve(t, state, nil), state, "free")
	})
	t.Run("no QEMU", func(t *testing.T) {
		empty := filepath.Join(dir, "empty")
		os.Mkdir(empty, 0o755)
		r := serve(t, filepath.Join(dir, "s1"), nil, "PATH="+empty)
		wantRefusal(t, r, "QEMU", "install")
	})
	t.Run("an old QEMU", func(t *testing.T) {
		old := filepath.Join(dir, "old")
		os.Mkdir(old, 0o755)
		script := "#!/bin/sh\necho 'QEMU emulator version 6.2.0 (Debian 1:6.2+dfsg-2)'\n"
		if err := os.WriteFile(filepath.Join(old, "qemu-system-x86_64"), []byte(script), 0o755); err != nil {
			t.Fatal(err)
		}
		r := serve(t, filepath.Join(dir, "s2"), nil, "PATH="+old+":/usr/bin:/bin")
		wantRefusal(t, r, "6.2.0", "7.2")
	})
}

func wantRefusal(t *testing.T, r result, words ...string) {
	t.Helper()
	if r.status != 1 || strings.Contains(r.stderr, "goroutine ") {
		t.Errorf("want status 1 and no panic: %s", r)
	}
	for _, w := range words {
		if !bytes.Contains([]byte(r.stderr), []byte(w)) {
			t.Errorf("want %q in: %s", w, r)
		}
	}
}
