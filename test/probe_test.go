package test

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// TestProbes lets a guest do what a probe tells of, and looks at whether all of it was told, under the plugin and without it.
func TestProbes(t *testing.T) {
	h := newHost(t)
	h.serve()
	g := h.run("one", "--cpus", "2")
	if _, err := os.Stat(filepath.Join(filepath.Dir(program), "vigia-probe-1.so")); err != nil {
		t.Log("no plugin was built on this host: only sampling is tested")
	} else {
		for _, step := range []struct {
			name string
			f    func(*guest)
		}{
			{"short processes", probesShort},
			{"ends", probesEnds},
			{"credentials, modules, sockets", probesDeeds},
			{"a cached password file", probesCached},
			{"a trace", probesTrace},
			{"a guard that is killed", probesKilled},
			{"a reboot", probesReboot},
		} {
			if !t.Run(step.name, func(t *testing.T) { step.f(g.on(t)) }) {
				t.FailNow()
			}
		}
	}
	h.must("rm", "one", "--force")
	t.Run("without the plugin", func(t *testing.T) { sampledOnly(h.on(t)) })
}

// told waits until the events of a kind that fit are as many as they should be, and returns them.
func (g *guest) told(kind string, want int, fits func(e event) bool) (found []event) {
	g.t.Helper()
	for deadline := time.Now().Add(20 * time.Second); ; time.Sleep(300 * time.Millisecond) {
		found = nil
		for _, e := range g.events(g.name, "--kind", kind) {
			if e.Kind == kind && fits(e) {
				found = append(found, e)
			}
		}
		if len(found) >= want || time.Now().After(deadline) {
			break
		}
	}
	if len(found) < want {
		g.t.Fatalf("%s: %d were told, want %d", kind, len(found), want)
	}
	return found
}

func (g *guest) one(kind string, fits func(f object) bool) event {
	g.t.Helper()
	return g.told(kind, 1, func(e event) bool { return fits(e.Fields) })[0]
}

func (g *guest) missed() (n float64) {
	for _, e := range g.events(g.name, "--kind", "process.missed") {
		n += e.Fields.number("count")
	}
	return n
}

// probesShort runs processes that live for a millisecond. Each is told of once, with its arguments, parent and end.
func probesShort(g *guest) {
	if s := g.show(g.name).text("probe"); s != "probed: complete" {
		g.t.Fatalf("processes are seen: %s", s)
	}
	const many = 250
	shell := g.sh("echo $$")
	g.sh("for i in $(seq %d); do /bin/true short-$i; done", many)
	begun := map[string]float64{}
	for _, e := range g.told("process.started", many, func(e event) bool { return strings.HasPrefix(e.Fields.text("cmdline"), "/bin/true short-") }) {
		line := e.Fields.text("cmdline")
		if _, twice := begun[line]; twice {
			g.t.Errorf("told twice: %s", e)
		}
		begun[line] = e.Fields.number("pid")
		if fmt.Sprint(e.Fields.number("ppid")) != shell || e.Fields.text("exe") != "/usr/bin/true" || e.Fields.number("uid") != 0 {
			g.t.Errorf("a child of the shell %s: %s", shell, e)
		}
	}
	for i := 1; i <= many; i++ {
		if _, ok := begun[fmt.Sprintf("/bin/true short-%d", i)]; !ok {
			g.t.Errorf("number %d was not told", i)
		}
	}
	pids := map[float64]bool{}
	for _, pid := range begun {
		pids[pid] = true
	}
	mine := func(e event) bool { return pids[e.Fields.number("pid")] }
	if n := len(g.told("process.forked", many, mine)); n != many {
		g.t.Errorf("%d forks", n)
	}
	for _, e := range g.told("process.exited", many, mine) {
		if code, ok := e.Fields["exit_code"]; !ok || code != 0.0 {
			g.t.Errorf("it ended well: %s", e)
		}
	}
	if n := g.missed(); n > 0 {
		g.t.Errorf("%v were missed", n)
	}
}

func probesEnds(g *guest) {
	g.sh("sh -c 'exit 7' probe-seven || true; sleep 77 & busybox usleep 500000; kill -9 $!; wait")
	g.one("process.exited", func(f object) bool {
		return strings.HasSuffix(f.text("cmdline"), "probe-seven") && f.number("exit_code") == 7
	})
	g.one("process.exited", func(f object) bool { return f.text("cmdline") == "sleep 77" && f.number("signal") == 9 })
}

func probesDeeds(g *guest) {
	g.sh("su nobody -s /bin/sh -c 'true as-nobody'")
	g.one("process.credentials", func(f object) bool {
		return f.text("comm") == "su" && f.number("uid") == 65534 && f.number("old_uid") == 0 && f["old_uid"] != nil
	})
	g.sh("modprobe dummy")
	g.one("module.loaded", func(f object) bool {
		return f.text("name") == "dummy" && f.text("exe") == "/usr/bin/kmod" && f.number("pid") > 1
	})
	g.sh("busybox nc -l -p 2345 >/dev/null & busybox usleep 500000; echo | busybox nc -w 2 127.0.0.1 2345; wait")
	g.one("socket.listening", func(f object) bool { return strings.HasSuffix(f.text("local"), ":2345") && f.text("comm") == "busybox" })
	g.one("socket.connecting", func(f object) bool { return f.text("remote") == "127.0.0.1:2345" && f.text("comm") == "busybox" })
}

// probesCached reads the password file where the disk sees nothing, and lets the rule find it. What a login reads is no
// beginning of an attack.
func probesCached(g *guest) {
	g.sh("su nobody -s /bin/sh -c true; su nobody -s /bin/sh -c true") // into the page cache
	reads := len(g.events(g.name, "--kind", "disk.read"))
	g.sh("cat /etc/shadow >/dev/null")
	opened := g.one("file.opened", func(f object) bool { return f.text("path") == "/etc/shadow" && f.text("exe") == "/usr/bin/cat" })
	if opened.Fields.number("pid") <= 1 || opened.Fields["write"] != false {
		g.t.Errorf("%s", opened)
	}
	for _, e := range g.events(g.name, "--kind", "disk.read")[reads:] {
		if e.Fields.text("path") == "/etc/shadow" {
			g.t.Errorf("the file was not in the cache: %s", e)
		}
	}
	g.dies("timeout 60 sh -c 'while :; do :; done'")
	alert := g.untilEvent(g.name, "policy.alert", 90*time.Second, func(e event) bool { return e.Fields.text("rule") == "password-cracking" })
	if ids, _ := alert.Fields["events"].([]any); len(ids) == 0 || ids[0] != opened.ID {
		g.t.Errorf("the alert does not begin with the open %s: %s", opened.ID, alert)
	}
	g.must("release", g.name)
	g.hangUp()
	g.sh("busybox killall -q timeout; true")
}

// probesTrace follows the system calls of one process, which is not alone.
func probesTrace(g *guest) {
	shell := g.sh("echo $$")
	g.sh("(while :; do /bin/true; done) & disown")
	var out strings.Builder
	cmd := g.command("trace", g.name, "--pid", shell, "--for", "8s", "-o", "json")
	cmd.Stdout = &out
	if err := cmd.Start(); err != nil {
		g.t.Fatal(err)
	}
	time.Sleep(2 * time.Second)
	g.sh("cd /run; echo hi >/run/traced; cd /")
	if err := cmd.Wait(); err != nil {
		g.t.Error(err)
	}
	found := map[string]bool{}
	for line := range strings.Lines(out.String()) {
		var c struct {
			PID    int64
			Name   string
			Path   string
			Result int64
		}
		if err := json.Unmarshal([]byte(line), &c); err != nil || fmt.Sprint(c.PID) != shell {
			g.t.Errorf("not of process %s: %s%v", shell, line, err)
		}
		if c.Result >= 0 {
			found[strings.TrimSpace(c.Name+" "+c.Path)] = true
		}
	}
	for _, want := range []string{"chdir /run", "openat /run/traced", "write", "read"} {
		if !found[want] {
			g.t.Errorf("%s is not in the trace: %v", want, found)
		}
	}
	g.sh("busybox killall -q bash; true")
	g.hangUp()
	g.ready()
}

// probesKilled kills the guard while processes come and go: the guest goes on at once, and the next guard tells.
func probesKilled(g *guest) {
	g.sh("(i=0; while :; do i=$((i+1)); /bin/true after-$i; echo $i >/run/after; done) & disown")
	for range 3 {
		old := g.kill("guard")[0]
		before := number(g.sh("cat /run/after"))
		g.until("the guest goes on", 20*time.Second, func() bool { return number(g.sh("cat /run/after")) > before })
		g.replaced("guard", old)
		g.until("the new guard tells", 30*time.Second, func() bool { return g.show(g.name).text("probe") == "probed: complete" })
		now := number(g.sh("cat /run/after"))
		g.told("process.started", 1, func(e event) bool { return e.Fields.text("cmdline") == fmt.Sprintf("/bin/true after-%d", now+20) })
	}
	g.sh("busybox killall -q bash; true")
	g.hangUp()
	g.ready()
}

func probesReboot(g *guest) {
	g.dies("echo b >/proc/sysrq-trigger")
	g.untilEvent(g.name, "machine.rebooted", time.Minute, func(event) bool { return true })
	g.hangUp()
	g.ready()
	g.sh("/bin/true after-the-reboot")
	g.one("process.started", func(f object) bool { return f.text("cmdline") == "/bin/true after-the-reboot" })
}

// sampledOnly is a program without the plugin beside it: what is too short to be seen is counted.
func sampledOnly(h *host) {
	h.stopDaemon()
	h.program = copyProgram(h.t)
	h.serve()
	h.refused(1, []string{"plugin", "doctor"}, "run", "tiny", "two", "--memory", "256M", "--probe", "on")
	g := h.run("two", "--net", "off")
	if s := h.show("two").text("probe"); !strings.HasPrefix(s, "sampled: ") || !strings.Contains(s, "plugin") {
		h.t.Errorf("processes are seen: %s", s)
	}
	g.sh("sleep 0.5 long-enough || true; sh -c 'sleep 1; exit 3' || true")
	g.one("process.exited", func(f object) bool { return f.text("cmdline") == "sh -c sleep 1; exit 3" })
	before := g.missed()
	const many = 200
	g.sh("for i in $(seq %d); do (:); done", many)
	g.until("all are seen or counted", 20*time.Second, func() bool {
		seen := 0.0
		for _, kind := range []string{"process.forked", "process.started"} {
			seen += float64(len(g.events("two", "--kind", kind)))
		}
		return seen+g.missed()-before >= many
	})
	if g.missed() == before {
		h.t.Error("none of them was too short")
	}
}
