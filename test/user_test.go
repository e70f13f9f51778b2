package test

import (
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// userHost is a daemon of an ordinary user on a state of their own. Links do not do here: the files must be the user's.
func userHost(t *testing.T) *host {
	if os.Geteuid() != 0 {
		return newHost(t) // it is one already
	}
	dir, err := os.MkdirTemp("", "vigia-user-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.Remove(dir) })
	os.Chmod(dir, 0o755)
	bin, state := filepath.Join(dir, "vigia"), filepath.Join(dir, "state")
	if err := copyFile(program, bin, 0o755); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.Remove(bin) })
	os.Mkdir(state, 0o700)
	if err := storeImage(filepath.Join(state, "images"), "tiny", copySparse); err != nil {
		t.Fatal(err)
	}
	err = filepath.WalkDir(state, func(path string, _ fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		return os.Lchown(path, int(nobody.Uid), int(nobody.Gid))
	})
	if err != nil {
		t.Fatal(err)
	}
	// The log is the test's own; it lies in the user's directory.
	h := hostOn(t, state, nobody)
	h.program = bin
	return h
}

// TestOrdinaryUser runs a machine without root.
func TestOrdinaryUser(t *testing.T) {
	h := userHost(t)
	h.serve()
	g := h.run("one", "--publish", "0:22")
	m := h.show("one")
	if s, err := os.Stat("/proc/" + itoa(int(m.number("pid")))); err == nil && os.Geteuid() == 0 {
		var st unix.Stat_t
		unix.Stat("/proc/"+itoa(int(m.number("pid"))), &st)
		if st.Uid == 0 && s != nil {
			// not dumpable: its files in /proc are root's; status tells
			status, _ := os.ReadFile("/proc/" + itoa(int(m.number("pid"))) + "/status")
			if !strings.Contains(string(status), "Uid:\t65534") {
				t.Errorf("QEMU does not run as the user:\n%s", status)
			}
		}
	}
	in, out := map[string]bool{}, map[string]bool{}
	list, _ := m["isolation"].([]any)
	for _, i := range list {
		o := object(i.(map[string]any))
		if o["in_force"] == true {
			in[o.text("subject")+": "+o.text("measure")] = true
			continue
		}
		out[o.text("subject")+": "+o.text("measure")] = true
		if o.text("detail") == "" {
			t.Errorf("%v is not in force, and nothing says why", o)
		}
	}
	if len(in) < 10 || len(out) == 0 {
		t.Errorf("in force: %v\nnot in force: %v", in, out)
	}
	g.sh("sleep 6161 & disown")
	h.until("ps shows it", time.Minute, func() bool { return strings.Contains(h.vigia("ps", "one").stdout, "sleep 6161") })
	h.until("the published port answers", time.Minute, func() bool { return banner(g.port(0)) != "" })
	for _, who := range []string{"guard", "gate"} {
		old := g.kill(who)[0]
		g.replaced(who, old)
	}
	h.killDaemon()
	h.serve()
	g.hangUp()
	g.sh("sleep 7171 & disown")
	h.until("ps shows it with other workers", time.Minute, func() bool { return strings.Contains(h.vigia("ps", "one").stdout, "sleep 7171") })
	// A guard that died with its daemon: the memory comes from QEMU.
	guard := g.pid("guard")
	h.daemon.Process.Kill()
	unix.Kill(guard, unix.SIGKILL)
	h.waitDaemon()
	h.serve()
	g.replaced("guard", guard)
	h.until("ps answers with a guard that another daemon made", time.Minute, func() bool { return h.vigia("ps", "one").status == 0 })
	h.must("stop", "one", "--timeout", "60s")
	if m := h.show("one"); m.text("state") != "stopped" {
		t.Errorf("%s: %s", m.text("state"), m.text("reason"))
	}
}

// TestFullDisk fills the host's disk under a machine: the guest waits, is told nothing, and goes on when there is room.
func TestFullDisk(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root, to mount a small file system")
	}
	state, err := os.MkdirTemp(filepath.Dir(filepath.Dir(images)), "state-")
	if err != nil {
		t.Fatal(err)
	}
	if err := unix.Mount("tmpfs", state, "tmpfs", 0, "size=600m,mode=700"); err != nil {
		os.Remove(state)
		t.Skipf("no file system can be mounted: %v", err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(state, unix.MNT_DETACH); err != nil {
			t.Error(err)
		}
		os.Remove(state)
	})
	if err := storeImage(filepath.Join(state, "images"), "tiny", copySparse); err != nil {
		t.Fatal(err)
	}
	h := hostOn(t, state, nil)
	h.serve()
	g := h.run("one", "--net", "off")
	filler := filepath.Join(state, "filler")
	fill(t, state, filler, 24<<20)
	g.sh("(dd if=/dev/urandom of=/root/big bs=1M count=80 conv=fsync 2>/root/dd.log; echo done $? >/root/dd.done) & disown")
	e := h.untilEvent("one", "disk.stalled", 90*time.Second, nil)
	if reason := e.Fields.text("reason"); !strings.Contains(reason, "space") || !strings.Contains(reason, "make room") {
		t.Errorf("it does not say what to do: %s", e)
	}
	if s := h.show("one").object("disk").text("stalled"); !strings.Contains(s, "space") {
		t.Errorf("show: the disk stands still because of %q", s)
	}
	if err := os.Remove(filler); err != nil {
		t.Fatal(err)
	}
	h.untilEvent("one", "disk.resumed", time.Minute, nil)
	h.until("the guest's write is done", 2*time.Minute, func() bool { return g.sh("cat /root/dd.done 2>/dev/null || true") != "" })
	if out := g.sh("cat /root/dd.done; stat -c %%s /root/big"); out != "done 0\n83886080" {
		t.Errorf("in the guest: %s", out)
	}
	if out := g.sh("dmesg | grep -iE 'I/O error|aborted|remounting' || true"); out != "" {
		t.Errorf("the guest saw: %s", out)
	}
	if s := h.show("one").object("disk").text("stalled"); s != "" {
		t.Errorf("show still says %q", s)
	}
	h.must("ledger", "verify")
}

// fill writes a file until only so much room is left.
func fill(t *testing.T, dir, file string, left uint64) {
	t.Helper()
	f, err := os.Create(file)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	chunk := make([]byte, 1<<20)
	for {
		var fs unix.Statfs_t
		if err := unix.Statfs(dir, &fs); err != nil {
			t.Fatal(err)
		}
		if fs.Bavail*uint64(fs.Bsize) < left+uint64(len(chunk)) {
			return
		}
		if _, err := f.Write(chunk); err != nil {
			return
		}
	}
}
