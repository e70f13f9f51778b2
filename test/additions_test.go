package test

import (
	"strings"
	"testing"
	"time"
)

// TestGuestsHelp: what the guest's own agent does for checkpoints, rollbacks and clones, and that nothing depends on it.
func TestGuestsHelp(t *testing.T) {
	h := newHost(t)
	h.serve()
	g := h.run("one", "--additions", "exec")
	g.until("the agent answers", bootTime, func() bool { return g.vigia("exec", "one", "--", "true").status == 0 })
	for _, step := range []struct {
		name string
		f    func(*guest)
	}{
		{"file systems are frozen for a checkpoint", frozenAround},
		{"a rollback and a clone thaw them", thawedAfter},
		{"a guard that dies leaves none frozen", thawedByTheNext},
		{"an agent that hangs costs a second", hangingAgent},
	} {
		if !t.Run(step.name, func(t *testing.T) { step.f(g.on(t)) }) {
			t.FailNow()
		}
	}
}

// writes checks that the guest can write to its disk.
func (g *guest) writes() {
	g.t.Helper()
	if got := g.sh("echo yes > /root/written && sync && cat /root/written"); got != "yes" {
		g.t.Errorf("the guest's disk can't be written: %q", got)
	}
}

func frozenAround(g *guest) {
	c := g.json("checkpoint", g.name)
	if c.text("disk") != "frozen" || c.number("frozen_ms") <= c.number("pause_ms") || c.text("disk_why") != "" {
		g.t.Errorf("the disk of the checkpoint is %s %s, frozen for %.0f ms", c.text("disk"), c.text("disk_why"), c.number("frozen_ms"))
	}
	g.t.Logf("pause %.1f ms, frozen %.0f ms", c.number("pause_ms"), c.number("frozen_ms"))
	g.writes()
	g.untilEvent(g.name, "checkpoint.created", 10*time.Second, func(e event) bool {
		return e.Fields.text("id") == c.text("id") && e.Fields.text("disk") == "frozen"
	})
	if list := g.must("checkpoints", g.name); !strings.Contains(list, "frozen") {
		g.t.Errorf("the list does not tell: %s", list)
	}
	if c := g.json("checkpoint", g.name, "--as-it-is"); c.text("disk") != "crash-consistent" || c.number("frozen_ms") != 0 {
		g.t.Errorf("unasked, the disk is %s", c.text("disk"))
	}
	g.must("checkpoint", "rm", g.json("checkpoint", g.name).text("id"))
}

func thawedAfter(g *guest) {
	id := g.save("--stable")
	g.hangUp()
	g.must("rollback", g.name, id, "--at-once")
	g.writes()
	g.must("clone", g.name+"@"+id, "two")
	c := g.host.guest("two")
	c.writes()
	c.hangUp()
	g.must("rm", "two", "--force")
}

func thawedByTheNext(g *guest) {
	for i := range 3 {
		cmd := g.command("checkpoint", g.name)
		cmd.Start()
		time.Sleep(time.Duration(40+60*i) * time.Millisecond)
		old := g.kill("guard")[0]
		cmd.Wait()
		g.replaced("guard", old)
		g.writes()
	}
}

// hangingAgent stops the agent's process, as a guest that is busy or hostile may; and lets it go on.
func hangingAgent(g *guest) {
	g.sh("kill -STOP $(pidof qemu-ga)")
	began := time.Now()
	c := g.json("checkpoint", g.name)
	if c.text("disk") != "crash-consistent" || !strings.Contains(c.text("disk_why"), "in 1s") {
		g.t.Errorf("the disk is %s: %s", c.text("disk"), c.text("disk_why"))
	}
	g.t.Logf("it took %s", time.Since(began))
	g.writes()
	g.sh("kill -CONT $(pidof qemu-ga)")
	g.writes()
	g.until("the agent answers again", time.Minute, func() bool { return g.vigia("exec", "one", "--", "true").status == 0 })
	if g.json("checkpoint", g.name).text("disk") != "frozen" {
		g.t.Error("an agent that answers again is not asked")
	}
}
