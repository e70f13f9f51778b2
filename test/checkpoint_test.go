package test

import (
	"fmt"
	"os"
	"strings"
	"syscall"
	"testing"
	"time"
)

// TestCheckpoint takes a machine through its past: saved while it works, put back, gone on from as another; with
// everything killed in between, nothing is lost and nothing is left.
func TestCheckpoint(t *testing.T) {
	h := newHost(t)
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

func damagedCheckpoint(g *guest) {
	id := g.save()
	path := g.path("checkpoints", id, "memory")
	raw, err := os.ReadFile(path)
	if err != nil {
		g.t.Fatal(err)
	}
	raw[len(raw)-200] ^= 1
	if err := os.WriteFile(path, raw, 0o600); err != nil {
		g.t.Fatal(err)
	}
	g.refused(1, []string{id, "damaged"}, "clone", g.name+"@"+id, "never")
	if strings.Contains(g.must("ls"), "never") {
		g.t.Error("a clone of a damaged checkpoint is there")
	}
}
