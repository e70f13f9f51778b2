package test

import (
	"strconv"
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
		{"clock and randomness are made new", newClockAndRandomness},
		{"a clone is called as it is told", ownIdentity},
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

// newClockAndRandomness goes back by some seconds, and has two clones give out random numbers.
func newClockAndRandomness(g *guest) {
	id := g.save()
	time.Sleep(3 * time.Second)
	g.hangUp()
	g.must("rollback", g.name, id, "--at-once")
	set := g.untilEvent(g.name, "clock.set", time.Minute, func(e event) bool { return e.Fields.text("checkpoint") == id })
	g.t.Logf("the clock is %.3f s behind", set.Fields.number("behind"))
	if behind := g.behind(); behind > time.Second || behind < -time.Second {
		g.t.Errorf("the guest's clock is %s behind", behind)
	}
	e := g.untilEvent(g.name, "random.reseeded", time.Minute, func(e event) bool { return e.Fields.text("checkpoint") == id })
	if e.Fields.text("by") != "additions" || e.Fields["seen"] != true {
		g.t.Errorf("reseeded by %s", e.Fields.text("by"))
	}
	if show := g.must("show", g.name); !strings.Contains(show, "set by the guest's agent") || !strings.Contains(show, "reseeded by additions") {
		g.t.Errorf("show does not tell: %s", show)
	}
	got := map[string]bool{}
	for _, name := range []string{"two", "three"} {
		g.must("clone", g.name+"@"+id, name)
		c := g.host.guest(name)
		for _, word := range strings.Fields(c.sh("head -c 64 /dev/urandom | od -An -v -w8 -tx8 | tr -d ' '")) {
			if got[word] {
				g.t.Errorf("two clones gave out the same random number %s", word)
			}
			got[word] = true
		}
		c.hangUp()
		g.must("rm", name, "--force")
	}
}

// ownIdentity has a clone take a name, a card's address and an address of its own, and be reached at them.
func ownIdentity(g *guest) {
	id := g.save()
	g.must("clone", g.name+"@"+id, "two", "--own-name", "--mac", "52:54:00:0a:0b:0c", "--address", "10.77.0.99", "--publish", "0:22", "--connect")
	e := g.untilEvent("two", "clone.identity", time.Minute, func(event) bool { return true })
	if e.Fields["done"] != true {
		g.t.Errorf("not done: %s", e.Fields.text("why"))
	}
	c := g.host.guest("two")
	c.ready()
	if got := c.sh("hostname; cat /sys/class/net/eth0/address; ip -4 -o addr show dev eth0"); !strings.HasPrefix(got, "two\n52:54:00:0a:0b:0c\n") || !strings.Contains(got, " 10.77.0.99/24 ") {
		g.t.Errorf("it has %q", got)
	}
	c.until("the published port answers", time.Minute, func() bool { return banner(c.port(0)) != "" })
	if show := c.json("show", "two"); show.text("address") != "10.77.0.99" || show.text("hostname") != "two" {
		g.t.Errorf("show: %v", show)
	}
	if got := g.sh("hostname"); got == "two" {
		g.t.Error("the machine itself is called so")
	}
	c.hangUp()
	g.must("rm", "two", "--force")
	for _, wrong := range [][]string{{"--mac", "1"}, {"--address", "10.77.0.1"}, {"--address", "x"}, {"--publish", "x"}} {
		g.refused(2, []string{"use"}, append([]string{"clone", g.name + "@" + id, "three"}, wrong...)...)
	}
}

// behind is how far the guest's clock is behind this host's.
func (g *guest) behind() time.Duration {
	g.t.Helper()
	asked := time.Now()
	ns, err := strconv.ParseInt(g.sh("date +%%s%%N"), 10, 64)
	if err != nil {
		g.t.Fatal(err)
	}
	return asked.Add(time.Since(asked) / 2).Sub(time.Unix(0, ns))
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
