package test

import (
	"fmt"
	"os"
	"strings"
	"testing"
	"time"
)

// TestKilledAtEveryStep kills the daemon at instants all through a start, a stop, a removal and the build of an image, and
// counts what the next daemon finds and leaves: a machine runs whole or not at all, and can be used.
func TestKilledAtEveryStep(t *testing.T) {
	h := newHost(t)
	h.serve()
	h.must("run", "tiny", "one", "--memory", "128M", "--publish", "0:22", "--additions", "exec")
	h.must("stop", "one", "--force")
	begin := time.Now()
	h.must("start", "one")
	whole := time.Since(begin)
	h.must("stop", "one", "--force")
	const instants = 20
	// A bit longer than the whole takes, so that some instants lie behind the end of it.
	at := func(i int) time.Duration { return whole * 6 / 5 * time.Duration(i) / instants }
	states := map[string]int{}
	t.Run("start", func(t *testing.T) {
		h := h.on(t)
		for i := range instants {
			h.interrupted(at(i), "start", "one")
			states[h.wholeOrNot("one")]++
			if h.show("one").text("state") == "running" {
				h.must("stop", "one", "--force")
			}
			h.wholeOrNot("one")
		}
	})
	t.Run("stop", func(t *testing.T) {
		h := h.on(t)
		for i := range 8 {
			if h.show("one").text("state") != "running" {
				h.must("start", "one")
			}
			h.interrupted(time.Duration(i)*40*time.Millisecond, "stop", "one", "--force")
			states[h.wholeOrNot("one")]++
		}
	})
	t.Run("run and rm", func(t *testing.T) {
		h := h.on(t)
		for i := range 8 {
			h.interrupted(at(2*i), "run", "tiny", "two", "--memory", "128M", "--net", "off")
			if strings.Contains(h.must("ls"), "two") {
				states["two "+h.wholeOrNot("two")]++
				h.interrupted(time.Duration(i)*25*time.Millisecond, "rm", "two", "--force")
			}
			if strings.Contains(h.must("ls"), "two") {
				h.wholeOrNot("two")
				h.must("rm", "two", "--force")
			}
			if n := len(dirEntries(h.path("machines"))); n != 1 {
				t.Errorf("%d machines have files, not 1", n)
			}
		}
	})
	t.Run("image build", func(t *testing.T) {
		h := h.on(t)
		h.must("image", "ls")
		for i := range 4 {
			h.interrupted(time.Duration(1+4*i)*time.Second, "image", "build", "tiny", "--name", "again")
			if left := dirEntries(h.path("images", ".tmp")); len(left) > 0 {
				t.Errorf("a build that was cut short left %v", left)
			}
			h.only()
		}
	})
	t.Logf("found: %v", states)
	h.vigia("stop", "one", "--force") // if it runs
	h.must("start", "one")
	h.guest("one").ready()
	r := h.vigia("ledger", "verify")
	if r.status != 0 {
		t.Error(r)
	}
}

// on is the same host for a subtest.
func (h *host) on(t *testing.T) *host {
	on := *h
	on.t = t
	return &on
}

// interrupted begins a command, kills the daemon after a while, and starts the next.
func (h *host) interrupted(after time.Duration, args ...string) {
	h.t.Helper()
	cmd := h.command(args...)
	if err := cmd.Start(); err != nil {
		h.t.Fatal(err)
	}
	time.Sleep(after)
	h.killDaemon()
	cmd.Wait()
	h.serve()
}

// wholeOrNot sees that a machine has all of its processes or none, and nothing else is there. It returns its state.
func (h *host) wholeOrNot(name string) string {
	h.t.Helper()
	m := h.show(name)
	state := m.text("state")
	for state == "stopping" {
		time.Sleep(50 * time.Millisecond)
		m = h.show(name)
		state = m.text("state")
	}
	if state != "running" && state != "stopped" && state != "failed" {
		h.t.Errorf("machine %s is %s", name, state)
	}
	h.only()
	return state
}

// only sees that nothing but the daemon and the machines that run is on this host.
func (h *host) only() {
	h.t.Helper()
	want := 1 // the daemon
	running := map[string]bool{}
	for _, m := range h.list("ls") {
		if m.number("pid") > 0 {
			running[m.text("id")] = true
			want += 2
			if m.text("net") != "off" {
				want++
			}
		}
	}
	var got []string
	for deadline := time.Now().Add(4 * time.Second); time.Now().Before(deadline); time.Sleep(100 * time.Millisecond) {
		got = h.state.processes()
		if h.user == nil { // /proc/PID/cmdline of a jailed QEMU shows its stage too: each is counted once by its pid
			if len(got) == want {
				break
			}
		}
	}
	if len(got) != want {
		h.t.Errorf("%d processes, want %d:\n  %s", len(got), want, strings.Join(got, "\n  "))
	}
	for _, dir := range []string{h.path("run"), "/dev/shm/" + h.state.tag()} {
		for _, e := range dirEntries(dir) {
			if e == "daemon.tally" { // the daemon's own, while it runs
				continue
			}
			if !running[strings.TrimSuffix(e, ".ram")] || strings.HasSuffix(e, ".ram") {
				h.t.Errorf("%s/%s is left", dir, e)
			}
		}
	}
	for _, base := range h.state.groups() {
		for _, e := range dirEntries(base) {
			id, worker, ok := strings.Cut(e, "-")
			if ok && (worker == "qemu" || worker == "guard" || worker == "gate") && !running[id] {
				h.t.Errorf("control group %s/%s is left", base, e)
			}
		}
	}
}

func dirEntries(dir string) (names []string) {
	entries, _ := os.ReadDir(dir)
	for _, e := range entries {
		names = append(names, e.Name())
	}
	return names
}

// TestLeavingCallers leaves while a machine is started: what was begun is undone. A stop that was asked for goes on.
func TestLeavingCallers(t *testing.T) {
	h := newHost(t)
	h.serve()
	for i := range 6 {
		name := fmt.Sprintf("gone-%d", i)
		cmd := h.command("run", "tiny", name, "--memory", "128M")
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		time.Sleep(time.Duration(50+80*i) * time.Millisecond)
		cmd.Process.Signal(os.Interrupt)
		cmd.Wait()
		h.until("the start is undone or done", 20*time.Second, func() bool {
			for _, m := range h.list("ls") {
				if s := m.text("state"); s != "running" {
					return false
				}
			}
			return true
		})
		h.only()
		for _, m := range h.list("ls") {
			h.must("rm", m.text("name"), "--force")
		}
	}
	g := h.run("one", "--net", "off")
	g.deaf() // it does not hear its button
	cmd := h.command("stop", "one", "--timeout", "4s")
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	h.untilState("one", "stopping", 10*time.Second)
	cmd.Process.Signal(os.Interrupt)
	cmd.Wait()
	if m := h.untilState("one", "stopped", 30*time.Second); m.text("ended") != "forced" {
		t.Errorf("ended %s", m.text("ended"))
	}
	// A forced stop does not wait for a graceful one, and gives a start up.
	h.must("start", "one")
	g.hangUp()
	g.deaf()
	slow := h.command("stop", "one", "--timeout", "10m")
	if err := slow.Start(); err != nil {
		t.Fatal(err)
	}
	h.untilState("one", "stopping", 10*time.Second)
	before := time.Now()
	h.must("stop", "one", "--force")
	if took := time.Since(before); took > 20*time.Second {
		t.Errorf("a forced stop took %s", took)
	}
	slow.Wait()
	start := h.command("start", "one")
	if err := start.Start(); err != nil {
		t.Fatal(err)
	}
	h.until("it starts", 10*time.Second, func() bool { return h.show("one").text("state") != "stopped" })
	h.must("rm", "one", "--force")
	start.Wait()
	h.only()
}
