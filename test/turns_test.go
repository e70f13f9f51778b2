package test

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

const turnRules = `
id: said-back
title: The console says the word
severity: low
on: console.line
when: event.line.contains("xyzzy42")
every: 1s
respond: [rollback]
---
id: said-again
title: The console says another word
severity: low
on: console.line
when: event.line.contains("xyzzy43")
every: 1s
respond: [restart]
---
id: panic-back
title: A panic is kept and undone
severity: medium
on: machine.panicked
every: 1s
respond: [checkpoint, rollback]
---
id: list-first
title: A rollback would let somebody in again
severity: high
on: checkpoint.reopens
when: event.high + event.critical > 0
respond: [%s]
`

// TestRulesTurnBack: a rule rolls a machine back, and goes the way that a person's rollback goes: the present is saved, what comes back
// is told, and another rule forbids it or cuts the machine off. So does a panic, whose state is kept; for ever it is not done.
func TestRulesTurnBack(t *testing.T) {
	h := newHost(t)
	rules := h.path("rules", "own.yaml")
	if err := os.MkdirAll(filepath.Dir(rules), 0o700); err != nil {
		t.Fatal(err)
	}
	write := func(answer string) {
		if err := os.WriteFile(rules, []byte(strings.Replace(turnRules, "%s", answer, 1)), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	write("refuse")
	h.serve()
	g := h.run("one")
	g.sh("useradd -m eve && usermod -p '$6$salt$%s' eve && sync", strings.Repeat("h", 86))
	stable := g.save("--stable")
	g.sh("usermod -L eve; sync; X=now")
	say := func(word string) { g.dies("echo xyz$((0))zy" + word + " | tr -d 0") }

	say("42")
	h.untilEvent("one", "response.failed", time.Minute, func(e event) bool {
		return e.Fields.text("response") == "rollback" && strings.Contains(e.Fields.text("reason"), "list-first")
	})
	left := h.untilEvent("one", "checkpoint.reopens", time.Second, nil).Fields.text("left")
	if left == "" || left == stable {
		t.Errorf("what would have been left is not saved: %q", left)
	}
	if got := g.sh("echo $X"); got != "now" {
		t.Fatalf("a refused rollback has happened: %q", got)
	}

	write("quarantine")
	h.must("policy", "reload")
	g.dies("echo c >/proc/sysrq-trigger")
	saved := h.untilEvent("one", "checkpoint.created", time.Minute, func(e event) bool { return e.Fields.text("label") == "rule panic-back" })
	h.untilEvent("one", "checkpoint.restored", time.Minute, func(e event) bool { return e.Fields.text("reason") == "rule panic-back" })
	g.hangUp()
	h.untilState("one", "quarantined", time.Minute)
	if got := g.sh("echo .$X"); got != "." {
		t.Errorf("it is not as it was: %q", got)
	}
	h.must("release", "one")
	h.untilState("one", "running", 10*time.Second)
	if ids := h.must("checkpoints", "one"); !strings.Contains(ids, saved.Fields.text("id")) {
		t.Errorf("the panic's state is not there:\n%s", ids)
	}

	h.must("clone", "one@"+saved.Fields.text("id"), "post-mortem")
	if m := h.show("post-mortem"); m.text("state") != "paused" {
		t.Errorf("a clone of a guest in panic is %s", m.text("state"))
	}
	h.until("its processes are seen", 30*time.Second, func() bool { return strings.Contains(h.vigia("ps", "post-mortem").stdout, "init") })
	h.must("rm", "--force", "post-mortem")

	g.sh("echo kept >/root/kept; sync; X=gone")
	say("43")
	h.untilEvent("one", "response.done", time.Minute, func(e event) bool { return e.Fields.text("response") == "restart" })
	g.hangUp()
	g.ready()
	if got := g.sh("echo $X$(cat /root/kept)"); got != "kept" {
		t.Errorf("started again it has %q", got)
	}

	g.dies("echo c >/proc/sysrq-trigger")
	h.untilEvent("one", "response.failed", time.Minute, func(e event) bool {
		return e.Fields.text("response") == "rollback" && strings.Contains(e.Fields.text("reason"), "times in")
	})
	if m := h.untilState("one", "failed", time.Minute); m.text("ended") != "panic" {
		t.Errorf("ended %s (%s)", m.text("ended"), m.text("reason"))
	}
}
