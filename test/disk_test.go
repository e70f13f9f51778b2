package test

import (
	"bytes"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"vigia/internal/volume"
)

// watchRules are an owner's rules: they make a path of their own a watched one, and answer each of its accesses.
const watchRules = `
id: dossier-read
title: The dossier is read
severity: medium
on: disk.read
when: event.path == "/root/dossier"
respond: [alert]
---
id: motd-changed
title: The message of the day is another
severity: low
on: file.changed
when: event.path == "/etc/motd"
respond: [alert]
`

// TestDisk looks at what a guest's disk holds after deaths of all kinds, and at what vigia tells of it.
func TestDisk(t *testing.T) {
	h := newHost(t)
	if err := os.MkdirAll(h.path("rules"), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(h.path("rules", "watch.yaml"), []byte(watchRules), 0o600); err != nil {
		t.Fatal(err)
	}
	h.serve()
	g := h.run("one", "--net", "off")
	for _, step := range []struct {
		name string
		f    func(*guest)
	}{
		{"a read of the password file is named", diskReadNamed},
		{"a watched file that is replaced is told", diskReplaced},
		{"what was flushed is there after QEMU was killed", diskKillQEMU},
		{"what was flushed is there after all were killed", diskKillAll},
		{"the file system is whole", diskWhole},
		{"the volume is sound, and damage is found", diskCheck},
	} {
		if !t.Run(step.name, func(t *testing.T) { step.f(g.on(t)) }) {
			t.FailNow()
		}
	}
}

const dropCaches = "sync; echo 3 >/proc/sys/vm/drop_caches; "

func diskReadNamed(g *guest) {
	if files := g.show("one").object("disk").text("files"); !strings.Contains(files, "named (ext4)") {
		g.t.Errorf("show: files are %q", files)
	}
	before := time.Now()
	g.sh(dropCaches + "cat /etc/shadow >/dev/null")
	e := g.untilEvent("one", "disk.read", 20*time.Second, func(e event) bool {
		return e.Fields.text("path") == "/etc/shadow" && e.Fields["watched"] == true && e.Time.After(before)
	})
	if inside := number(g.sh("stat -c %%i /etc/shadow")); inside != int(e.Fields.number("inode")) || e.Fields.number("bytes") <= 0 {
		g.t.Errorf("the inode is %d, the event tells %s", inside, e)
	}
	g.sh("head -c 100000 /dev/urandom >/root/dossier; " + dropCaches + "cat /root/dossier >/dev/null")
	g.untilEvent("one", "policy.alert", 20*time.Second, func(e event) bool { return e.Fields.text("rule") == "dossier-read" })
	// What nobody watches is counted.
	g.untilEvent("one", "disk.write", 30*time.Second, func(e event) bool { return e.Fields["watched"] == false })
}

func diskReplaced(g *guest) {
	g.sh("echo hello >/etc/motd.new; mv /etc/motd.new /etc/motd; sync")
	e := g.untilEvent("one", "file.changed", 30*time.Second, func(e event) bool { return e.Fields.text("path") == "/etc/motd" })
	if e.Fields.text("change") == "" {
		g.t.Error(e)
	}
	g.untilEvent("one", "policy.alert", 20*time.Second, func(e event) bool { return e.Fields.text("rule") == "motd-changed" })
}

// flushed makes files in the guest, each flushed, and returns what must be there later.
func flushed(g *guest, name string) string {
	g.sh("mkdir -p /root/%s; for i in $(seq 40); do head -c $((i*1000)) /dev/urandom >/root/%[1]s/$i; sync /root/%[1]s/$i; done; sync /root/%[1]s /root", name)
	return g.sh("cd /root/%s && md5sum *", name)
}

func (g *guest) has(name, sums string) {
	g.t.Helper()
	if now := g.sh("cd /root/%s && md5sum *", name); now != sums {
		g.t.Errorf("of what was flushed, this is there now:\n%s\nand not this:\n%s", now, sums)
	}
	if out := g.sh("dmesg | grep -iE 'ext4.*error|I/O error' || true"); out != "" {
		g.t.Errorf("the guest's kernel complains: %s", out)
	}
}

func diskKillQEMU(g *guest) {
	sums := flushed(g, "a")
	g.kill("qemu")
	g.untilState("one", "failed", time.Minute)
	g.must("start", "one")
	g.ready()
	g.has("a", sums)
}

func diskKillAll(g *guest) {
	sums := flushed(g, "b")
	qemu, guard := g.pid("qemu"), g.pid("guard")
	g.sh("(while :; do dd if=/dev/zero of=/root/busy bs=64k count=64 conv=fsync 2>/dev/null; done) & disown")
	time.Sleep(time.Second)
	syscall.Kill(guard, syscall.SIGKILL)
	g.daemon.Process.Kill()
	syscall.Kill(qemu, syscall.SIGKILL)
	g.waitDaemon()
	g.serve()
	if m := g.show("one"); m.text("ended") != "qemu-died" {
		g.t.Errorf("ended %s (%s)", m.text("ended"), m.text("reason"))
	}
	g.must("start", "one")
	g.ready()
	g.has("b", sums)
}

// diskWhole kills the machine once more while it writes, and lets e2fsck look at its whole disk.
func diskWhole(g *guest) {
	g.sh("(while :; do cp -r /etc /root/copy; sync; rm -rf /root/copy; done) & disown")
	time.Sleep(2 * time.Second)
	g.kill("guard", "qemu")
	g.untilState("one", "failed", time.Minute)
	raw := g.exported("one")
	fsck := func(how string) (string, int) {
		cmd := exec.Command("e2fsck", "-f", how, raw)
		cmd.Env = append(os.Environ(), "PATH="+os.Getenv("PATH")+":/usr/sbin:/sbin")
		out, _ := cmd.CombinedOutput()
		return string(out), cmd.ProcessState.ExitCode()
	}
	// The journal is replayed as at a mount; whatever else there was to mend would be a loss.
	if out, code := fsck("-p"); code > 1 {
		g.t.Fatalf("e2fsck -p ended with %d:\n%s", code, out)
	}
	if out, code := fsck("-n"); code != 0 {
		g.t.Errorf("after the journal's replay e2fsck -fn ends with %d:\n%s", code, out)
	}
}

// overlay is the machine's own part of its disk.
func (g *guest) overlay(name string) string {
	return g.path("machines", g.show(name).text("id"), "overlay.vol")
}

// exported writes the whole disk, as the guest has left it, into a file. A copy of the overlay is read, so that the reader
// changes nothing of the machine's.
func (g *guest) exported(name string) string {
	g.t.Helper()
	dir := g.t.TempDir()
	copied, raw := filepath.Join(dir, "overlay.vol"), filepath.Join(dir, "disk.raw")
	if out, err := exec.Command("cp", "--sparse=always", g.overlay(name), copied).CombinedOutput(); err != nil {
		g.t.Fatalf("%v: %s", err, out)
	}
	layer, err := os.Open(g.path("images", g.show(name).text("image_id"), "disk.layer"))
	if err != nil {
		g.t.Fatal(err)
	}
	overlay, err := os.OpenFile(copied, os.O_RDWR, 0)
	if err != nil {
		g.t.Fatal(err)
	}
	v, err := volume.Open([]*os.File{layer}, overlay, volume.Options{})
	if err != nil {
		g.t.Fatal(err)
	}
	defer v.Close()
	out, err := os.Create(raw)
	if err != nil {
		g.t.Fatal(err)
	}
	defer out.Close()
	buf, zeros := make([]byte, 1<<20), make([]byte, 1<<20)
	for off := int64(0); off < v.Size(); off += int64(len(buf)) {
		n := min(int64(len(buf)), v.Size()-off)
		if _, err := v.ReadAt(buf[:n], off); err != nil {
			g.t.Fatal(err)
		}
		if bytes.Equal(buf[:n], zeros[:n]) {
			continue
		}
		if _, err := out.WriteAt(buf[:n], off); err != nil {
			g.t.Fatal(err)
		}
	}
	if err := out.Truncate(v.Size()); err != nil {
		g.t.Fatal(err)
	}
	return raw
}

func diskCheck(g *guest) {
	id := g.show("one").text("id")
	r := g.vigia("volume", "check", id)
	if r.status != 0 || !strings.Contains(r.stdout, "sound") {
		g.t.Error(r)
	}
	damaged := filepath.Join(g.t.TempDir(), "damaged.vol")
	if err := copyFile(g.overlay("one"), damaged, 0o600); err != nil {
		g.t.Fatal(err)
	}
	f, err := os.OpenFile(damaged, os.O_RDWR, 0)
	if err != nil {
		g.t.Fatal(err)
	}
	if _, err := f.WriteAt(bytes.Repeat([]byte{0xfe}, 64<<10), 0); err != nil {
		g.t.Fatal(err)
	}
	f.Close()
	if r := g.vigia("volume", "check", damaged); r.status != 3 && r.status != 1 {
		g.t.Errorf("a damaged volume: %s", r)
	}
	if r := g.vigia("volume", "check", g.path("serve.log")); r.status != 3 && r.status != 1 {
		g.t.Errorf("a file that is no volume: %s", r)
	}
	g.refused(1, []string{"none.vol"}, "volume", "check", "none.vol")
}
