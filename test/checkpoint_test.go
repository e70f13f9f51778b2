package test

import (
	"encoding/binary"
	"fmt"
	"io"
	"os"
	"runtime"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// TestCheckpoint takes a machine through its past: saved while it works, put back, gone on from as another; with
// everything killed in between, nothing is lost and nothing is left.
func TestCheckpoint(t *testing.T) {
	h := newHost(t)
	h.mountCheckpoints()
	h.serve()
	g := h.run("one", "--publish", "0:22")
	for _, step := range []struct {
		name string
		f    func(*guest)
	}{
		{"memory and disk come back", comesBack},
		{"a clone is another machine", clonesGoOn},
		{"a paused machine is saved and stays paused", savedPaused},
		{"clones are made ahead, and nobody's", madeAhead},
		{"keeper, guard and daemon are killed", survivesSaving},
		{"a full disk refuses, and harms nobody", fullDisk},
		{"memory is copied where it can't be protected", copiedMemory},
		{"what is removed harms nobody", removedCheckpoints},
		{"damage is named", damagedCheckpoint},
	} {
		if !t.Run(step.name, func(t *testing.T) { step.f(g.on(t)) }) {
			t.FailNow()
		}
	}
}

// save takes a checkpoint and returns its id.
func (g *guest) save(args ...string) string {
	g.t.Helper()
	c := g.json(append([]string{"checkpoint", g.name}, args...)...)
	g.t.Logf("%s: pause %.1f ms, on disk after %.0f ms, %.0f bytes, %s", c.text("id"), c.number("pause_ms"), c.number("took_ms"), c.number("bytes"), c.text("how"))
	return c.text("id")
}

// comesBack writes to memory and disk between checkpoints, and goes back and forth.
func comesBack(g *guest) {
	g.sh("mkdir -p /run/t; echo one > /run/t/mem; echo one > /root/disk; sync; X=one")
	one := g.save("--label", "first")
	g.sh("echo two > /run/t/mem; echo two > /root/disk; sync; X=two; dd if=/dev/urandom of=/run/t/big bs=1M count=20 2>/dev/null; md5sum /run/t/big > /run/t/sum")
	two := g.save("--stable")
	g.sh("rm /root/disk /run/t/big; sync; X=three")
	for _, to := range []struct{ id, says string }{{two, "two"}, {one, "one"}, {two, "two"}, {"", "two"}} {
		args := []string{"rollback", g.name}
		if to.id != "" {
			args = append(args, to.id)
		}
		g.hangUp()
		g.must(args...)
		g.ready()
		if got := g.sh("echo $X $(cat /run/t/mem /root/disk)"); got != strings.Repeat(to.says+" ", 2)+to.says {
			g.t.Fatalf("after going back to %s: %q", to.says, got)
		}
		if to.says == "two" {
			if got := g.sh("md5sum -c /run/t/sum >/dev/null && echo right"); got != "right" {
				g.t.Fatal("a file in memory is not as it was")
			}
		}
	}
	behind := g.untilEvent(g.name, "clock.behind", time.Minute, func(e event) bool { return e.Fields.text("checkpoint") == two })
	if real := g.behind().Seconds(); behind.Fields["measured"] != true || behind.Fields.number("behind") > real+2 {
		g.t.Errorf("its clock is told to be %.1f s behind, and is %.1f s later", behind.Fields.number("behind"), real)
	}
	g.untilEvent(g.name, "random.reused", time.Minute, func(e event) bool { return e.Fields.text("checkpoint") == two })
	g.sh("echo 1 > /proc/sys/vm/drop_caches; cat /root/disk >/dev/null; dmesg | grep -i 'ext4.*error' && echo BAD; true")
	if g.vigia("ps", g.name).status != 0 {
		g.until("ps answers", time.Minute, func() bool { return g.vigia("ps", g.name).status == 0 })
	}
	g.until("the published port answers again", time.Minute, func() bool { return banner(g.port(0)) != "" })
}

// clonesGoOn has two clones of one checkpoint and the machine itself write different things.
func clonesGoOn(g *guest) {
	id := g.save()
	g.must("clone", g.name+"@"+id, "two")
	g.must("clone", g.name+"@"+id[:6], "three", "--connect", "--purpose", "a trial")
	g.must("clone", g.name, "four")
	clones := map[string]*guest{}
	for _, name := range []string{"two", "three", "four"} {
		c := g.host.guest(name)
		clones[name] = c
		c.ready()
		if got := c.sh("echo $X $(cat /root/disk)"); got != "two two" {
			g.t.Errorf("%s begins with %q", name, got)
		}
		c.sh("X=%s; echo %s > /root/disk; sync; head -c 8000000 /dev/zero | tr '\\0' x > /run/t/own", name, name)
	}
	if s := g.show("two").text("state"); s != "quarantined" {
		g.t.Errorf("a clone is %s", s)
	}
	if s := g.show("three").text("state"); s != "running" {
		g.t.Errorf("a connected clone is %s", s)
	}
	for name, c := range clones {
		if got := c.sh("echo $X $(cat /root/disk)"); got != name+" "+name {
			g.t.Errorf("%s has %q", name, got)
		}
		if ps := g.vigia("ps", name); ps.status != 0 || !strings.Contains(ps.stdout, "sshd") {
			g.t.Errorf("ps of %s: %s", name, ps)
		}
	}
	if got := g.sh("echo $X $(cat /root/disk)"); got != "two two" {
		g.t.Errorf("the machine has %q", got)
	}
	c := clones["two"]
	saved := c.save()
	c.sh("X=lost")
	c.hangUp()
	g.must("rollback", "two", saved)
	c.ready()
	if got := c.sh("echo $X"); got != "two" {
		g.t.Errorf("a clone that was rolled back has %q", got)
	}
	g.refused(1, []string{"clone"}, "rollback", g.name, saved)
	for name, c := range clones {
		c.hangUp()
		g.must("rm", name, "--force")
	}
}

// madeAhead has a daemon keep a clone ready: it is a machine like any other once it is asked for, and before that nobody's, who is
// gone with the daemon however that ends.
func madeAhead(g *guest) {
	id := g.save()
	g.hangUp()
	g.stopDaemon()
	g.serve("--spares", "1")
	g.must("clone", g.name+"@"+id, "first")
	emulators := func() (n int) {
		for _, p := range g.state.processes() {
			if strings.Contains(p, "-name guest=") {
				n++
			}
		}
		return n
	}
	g.until("a clone is ready ahead", time.Minute, func() bool { return emulators() == 3 })
	if n := len(g.list("ls")); n != 2 {
		g.t.Errorf("%d machines are listed, 2 were made", n)
	}
	time.Sleep(time.Second) // it may not be loaded yet: then this is a clone as any other
	c := g.host.guest("second")
	g.must("clone", g.name+"@"+id, "second", "--connect", "--purpose", "a trial")
	c.ready()
	c.sh("echo second > /root/disk; sync; X=second")
	if got := c.sh("echo $X $(cat /root/disk)"); got != "second second" {
		g.t.Errorf("it has %q", got)
	}
	if s := c.show("second"); s.text("state") != "running" || s.text("purpose") != "a trial" {
		g.t.Errorf("it is %s, for %q", s.text("state"), s.text("purpose"))
	}
	if ps := g.vigia("ps", "second"); ps.status != 0 || !strings.Contains(ps.stdout, "sshd") {
		g.t.Errorf("ps: %s", ps)
	}
	g.until("another is ready ahead", time.Minute, func() bool { return emulators() == 4 })
	time.Sleep(time.Second)
	c.hangUp()
	g.killDaemon()
	g.until("what was nobody's is gone with its daemon", 20*time.Second, func() bool { return emulators() == 3 })
	g.serve()
	for _, name := range []string{g.name, "first", "second"} {
		g.untilState(name, map[bool]string{true: "quarantined", false: "running"}[name == "first"], time.Minute)
	}
	if got := c.sh("echo $X"); got != "second" {
		g.t.Errorf("after the daemon's death it has %q", got)
	}
	c.hangUp()
	g.must("rm", "first", "--force")
	g.must("rm", "second", "--force")
}

func savedPaused(g *guest) {
	g.must("pause", g.name)
	id := g.save()
	if s := g.show(g.name).text("state"); s != "paused" {
		g.t.Errorf("it is %s", s)
	}
	g.must("resume", g.name)
	if got := g.sh("echo $X"); got != "two" {
		g.t.Errorf("it has %q", got)
	}
	g.must("checkpoint", "rm", id)
}

// survivesSaving kills what takes part, at different instants; the guest goes on, and a checkpoint is there or it is not.
func survivesSaving(g *guest) {
	before := len(g.list("checkpoints", g.name))
	for i := range 4 {
		cmd := g.command("checkpoint", g.name)
		cmd.Start()
		time.Sleep(time.Duration(20+60*i) * time.Millisecond)
		for _, pid := range keepers(g.host) {
			syscall.Kill(pid, syscall.SIGKILL)
		}
		cmd.Wait()
		g.sh("echo %d > /root/n; sync", i)
	}
	g.save()
	for i := range 3 {
		g.hangUp()
		g.interrupted(time.Duration(10+50*i)*time.Millisecond, "checkpoint", g.name)
		g.untilState(g.name, "running", time.Minute)
		if got := g.sh("echo $X; echo %d > /root/n; sync; cat /root/n", i); !strings.HasPrefix(got, "two") {
			g.t.Errorf("after the daemon's death it has %q", got)
		}
	}
	last := g.save()
	for i := range 2 {
		cmd := g.command("checkpoint", g.name)
		cmd.Start()
		time.Sleep(time.Duration(30+40*i) * time.Millisecond)
		old := g.kill("guard")[0]
		cmd.Wait()
		g.replaced("guard", old)
		if got := g.sh("echo $X"); got != "two" {
			g.t.Errorf("after the guard's death it has %q", got)
		}
	}
	for i := range 3 { // the next guard finds the new overlay in its place before it is asked to put it there
		old := g.kill("guard")[0]
		if i == 2 {
			g.replaced("guard", old)
		}
		r := g.vigia("checkpoint", g.name)
		g.t.Logf("saved with no guard: %d %s", r.status, strings.TrimSpace(r.stderr))
		if i < 2 {
			g.replaced("guard", old)
		}
		g.sh("echo kept-%d > /root/n; sync", i)
		g.replaced("guard", g.kill("guard")[0])
		if got := g.sh("echo 3 > /proc/sys/vm/drop_caches; cat /root/n"); got != "kept-"+itoa(i) {
			g.t.Errorf("what the guest had flushed is gone: %q", got)
		}
	}
	if n := len(g.list("checkpoints", g.name)); n < before+2 {
		g.t.Errorf("%d checkpoints, there were %d", n, before)
	}
	for _, e := range dirEntries(g.path("checkpoints")) {
		if strings.HasPrefix(e, ".") {
			g.t.Errorf("left behind: %s", e)
		}
	}
	g.hangUp()
	g.interrupted(300*time.Millisecond, "rollback", g.name, last)
	for s := g.show(g.name).text("state"); s != "running"; s = g.show(g.name).text("state") {
		if s == "stopped" || s == "failed" {
			g.must("start", g.name)
		}
		time.Sleep(100 * time.Millisecond)
	}
	g.ready()
}

// keepers are the processes that hold machines' memory.
func keepers(h *host) (pids []int) {
	for _, s := range []stateDir{h.state} {
		for _, p := range s.processes() {
			var pid int
			if n, _ := fmt.Sscanf(p, "process %d:", &pid); n == 1 && strings.Contains(p, "keeper") {
				pids = append(pids, pid)
			}
		}
	}
	return pids
}

func removedCheckpoints(g *guest) {
	g.sh("X=last; echo last > /root/disk; sync")
	last := g.save()
	for _, c := range g.list("checkpoints", g.name) {
		if c.text("id") != last {
			g.must("checkpoint", "rm", c.text("id"))
		}
	}
	g.sh("X=later")
	g.hangUp()
	g.must("rollback", g.name, last[:8])
	g.ready()
	if got := g.sh("echo $X $(cat /root/disk)"); got != "last last" {
		g.t.Errorf("it has %q", got)
	}
}

// damagedCheckpoint breaks each part of a checkpoint in each way. It is refused by name, and the machine goes on as it is; mended,
// it is as good as ever.
func damagedCheckpoint(g *guest) {
	g.sh("X=good; echo good > /root/disk; sync")
	id := ""
	layers := g.layersBy(func() { id = g.save() })
	if len(layers) != 1 {
		g.t.Fatalf("a checkpoint made %d layers", len(layers))
	}
	g.sh("X=now")
	dir, layer := g.path("checkpoints", id), g.path("layers", layers[0])
	flip := func(at int) func([]byte) []byte {
		return func(b []byte) []byte { b[(len(b)+at)%len(b)] ^= 4; return b }
	}
	cut := func(n int) func([]byte) []byte { return func(b []byte) []byte { return b[:max(0, len(b)-n)] } }
	for _, d := range []struct {
		name, file string
		harm       func([]byte) []byte // nil: the file is gone
	}{
		{"a page of memory", dir + "/memory", flip(64 + 20)},
		{"the last page of memory", dir + "/memory", func(b []byte) []byte { b[int(binary.LittleEndian.Uint64(b[len(b)-56:]))-5] ^= 4; return b }},
		{"memory's index", dir + "/memory", flip(-200)},
		{"memory's header", dir + "/memory", flip(30)},
		{"memory's trailer", dir + "/memory", flip(-20)},
		{"memory is short", dir + "/memory", cut(4096)},
		{"memory is empty", dir + "/memory", cut(1 << 30)},
		{"memory is gone", dir + "/memory", nil},
		{"the devices", dir + "/devices", flip(100)},
		{"the devices are short", dir + "/devices", cut(10)},
		{"the devices are gone", dir + "/devices", nil},
		{"the disk's layer", layer, func(b []byte) []byte { clear(b[:2*4096]); return b }},
		{"the disk's layer is short", layer, cut(1)},
		{"the disk's layer is gone", layer, nil},
	} {
		g.whileDamaged(d.file, d.harm, func() {
			g.refused(1, []string{id, "damaged"}, "rollback", g.name, id, "--at-once")
			g.refused(1, []string{id, "damaged"}, "clone", g.name+"@"+id, "never")
			if got := g.sh("echo $X"); got != "now" {
				g.t.Errorf("%s: the machine has %q", d.name, got)
			}
		})
	}
	if strings.Contains(g.must("ls"), "never") {
		g.t.Error("a clone of a damaged checkpoint is there")
	}
	damagedRecord(g, id)
	g.hangUp()
	g.must("rollback", g.name, id, "--at-once")
	if got := g.sh("echo $X $(cat /root/disk)"); got != "good good" {
		g.t.Errorf("mended, it has %q", got)
	}
}

// damagedRecord is for what a daemon reads when it starts.
func damagedRecord(g *guest, id string) {
	g.hangUp()
	g.whileDamaged(g.path("checkpoints", id, "record.json"), func(b []byte) []byte { b[len(b)/2] ^= 1; return b }, func() {
		g.stopDaemon()
		g.serve()
		g.refused(1, []string{id, "damaged"}, "rollback", g.name, id, "--at-once")
		if list := g.must("checkpoints"); !strings.Contains(list, id) || !strings.Contains(list, "damaged") {
			g.t.Errorf("a damaged record is not listed as one: %s", list)
		}
		if got := g.sh("echo $X"); got != "now" {
			g.t.Errorf("the machine has %q", got)
		}
		g.hangUp()
	})
	g.stopDaemon()
	g.serve()
}

// whileDamaged puts a harmed copy in a file's place, of a large one its beginning, and the file itself back after f.
func (g *guest) whileDamaged(path string, harm func([]byte) []byte, f func()) {
	g.t.Helper()
	away := path + ".away"
	if err := os.Rename(path, away); err != nil {
		g.t.Fatal(err)
	}
	if harm != nil {
		good, err := os.Open(away)
		if err != nil {
			g.t.Fatal(err)
		}
		head, err := io.ReadAll(io.LimitReader(good, 128<<20))
		good.Close()
		if err == nil {
			err = os.WriteFile(path, harm(head), 0o600)
		}
		if err != nil {
			g.t.Fatal(err)
		}
	}
	f()
	if err := os.Rename(away, path); err != nil {
		g.t.Fatal(err)
	}
}

// layersBy are the names of the layers that f makes.
func (g *guest) layersBy(f func()) (made []string) {
	before := dirEntries(g.path("layers"))
	f()
	for _, l := range dirEntries(g.path("layers")) {
		if !slices.Contains(before, l) {
			made = append(made, l)
		}
	}
	return made
}

// mountCheckpoints gives checkpoints a disk of their own, which can be made full.
func (h *host) mountCheckpoints() {
	if os.Getuid() != 0 {
		return
	}
	dir := h.path("checkpoints")
	if err := os.Mkdir(dir, 0o700); err != nil {
		h.t.Fatal(err)
	}
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, "size=2g,mode=700"); err != nil {
		h.t.Logf("no disk of their own for checkpoints: %v", err)
		return
	}
	h.t.Cleanup(func() { unix.Unmount(dir, unix.MNT_DETACH) })
}

// fullDisk has no room for a checkpoint: it is refused with the reason, nothing of it is left, and all that was there is good.
func fullDisk(g *guest) {
	dir := g.path("checkpoints")
	var fs unix.Statfs_t
	if err := unix.Statfs(dir, &fs); err != nil || fs.Type != unix.TMPFS_MAGIC {
		g.t.Skip("checkpoints have no disk of their own: mounting one needs root")
	}
	g.sh("X=before; echo before > /root/disk; sync")
	good := g.save()
	resize := func(size uint64) {
		if err := unix.Mount("tmpfs", dir, "tmpfs", unix.MS_REMOUNT, fmt.Sprintf("size=%d", size)); err != nil {
			g.t.Fatal(err)
		}
	}
	if err := unix.Statfs(dir, &fs); err != nil {
		g.t.Fatal(err)
	}
	resize((fs.Blocks-fs.Bfree)*uint64(fs.Bsize) + 4<<20)
	g.sh("X=full; dd if=/dev/urandom of=/run/t/much bs=1M count=24 2>/dev/null")
	for range 2 {
		g.refused(1, []string{"no space left on device"}, "checkpoint", g.name)
		if got := g.sh("echo $X $(cat /root/disk)"); got != "full before" {
			g.t.Errorf("the machine has %q", got)
		}
		for _, e := range dirEntries(dir) {
			if strings.HasPrefix(e, ".") {
				g.t.Errorf("left behind: %s", e)
			}
		}
	}
	g.untilEvent(g.name, "checkpoint.failed", 10*time.Second, func(e event) bool { return strings.Contains(e.Fields.text("reason"), "no space") })
	resize(2 << 30)
	full := g.save()
	for to, says := range map[string]string{good: "before", full: "full"} {
		g.hangUp()
		g.must("rollback", g.name, to, "--at-once")
		if got := g.sh("echo $X"); got != says {
			g.t.Errorf("after the disk was full, going back gives %q and not %q", got, says)
		}
	}
	g.sh("rm -f /run/t/much")
}

// copiedMemory has a machine whose QEMU somebody else traces: its memory can't be protected. It is copied, and that is said.
func copiedMemory(g *guest) {
	if how := g.how(); how != "protected" {
		g.t.Skipf("memory is not protected here at all: %s", how)
	}
	for _, pid := range keepers(g.host) {
		syscall.Kill(pid, syscall.SIGKILL)
	}
	g.sh("X=copied; echo copied > /root/disk; sync")
	release := traced(g.t, g.pid("qemu"))
	c := g.json("checkpoint", g.name)
	if c.text("how") != "copied" || !strings.Contains(c.text("why"), "trace") {
		g.t.Errorf("with QEMU traced by another, memory is %s: %s", c.text("how"), c.text("why"))
	}
	g.sh("X=later")
	second := g.json("checkpoint", g.name)
	release()
	g.hangUp()
	g.must("rollback", g.name, c.text("id"), "--at-once")
	if got := g.sh("echo $X $(cat /root/disk)"); got != "copied copied" {
		g.t.Errorf("back at a copied checkpoint it has %q", got)
	}
	if how := g.how(); how != "protected" {
		g.t.Errorf("a new QEMU's memory is %s", how)
	}
	g.must("checkpoint", "rm", second.text("id"))
}

// how saves the machine and returns how its memory was taken.
func (g *guest) how() string { return g.json("checkpoint", g.name).text("how") }

// traced traces a process, which nobody else may do then, until release is called.
func traced(t *testing.T, pid int) (release func()) {
	t.Helper()
	begun, end, ended := make(chan error), make(chan struct{}), make(chan struct{})
	go func() { // tracing is bound to a thread
		defer close(ended)
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		_, _, errno := unix.Syscall6(unix.SYS_PTRACE, unix.PTRACE_SEIZE, uintptr(pid), 0, 0, 0, 0)
		if errno != 0 {
			begun <- errno
			return
		}
		begun <- nil
		<-end
		unix.Syscall6(unix.SYS_PTRACE, unix.PTRACE_INTERRUPT, uintptr(pid), 0, 0, 0, 0)
		unix.Wait4(pid, nil, unix.WALL, nil)
		unix.PtraceDetach(pid)
	}()
	if err := <-begun; err != nil {
		t.Skipf("a process can't be traced here: %v", err)
	}
	var once sync.Once
	release = func() { once.Do(func() { close(end); <-ended }) }
	t.Cleanup(release)
	return release
}
