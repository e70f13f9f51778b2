package test

import (
	"bytes"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"
)

// TestLife takes one machine through what a person does with it.
func TestLife(t *testing.T) {
	h := newHost(t)
	h.serve()
	g := h.run("one", "--additions", "exec", "--owner", "ana", "--purpose", "a test", "--label", "team=red", "--ttl", "2h", "--cpus", "1")
	for _, step := range []struct {
		name string
		f    func(*guest)
	}{
		{"show", lifeShow},
		{"views", lifeViews},
		{"console", lifeConsole},
		{"exec", lifeExec},
		{"copies", lifeCopies},
		{"pause", lifePause},
		{"reboot", lifeReboot},
		{"stop and start keep the disk", lifeStopStart},
		{"a guest that does not listen is forced", lifeForced},
		{"power-off from inside", lifePowerOff},
		{"panic", lifePanic},
		{"QEMU dies", lifeQEMUDies},
		{"expiry", lifeExpiry},
		{"rm", lifeRemove},
	} {
		if !t.Run(step.name, func(t *testing.T) { step.f(g.on(t)) }) {
			t.FailNow()
		}
	}
}

func lifeShow(g *guest) {
	m := g.show("one")
	for key, want := range map[string]string{"name": "one", "state": "running", "accelerator": "tcg", "image": "tiny", "owner": "ana", "purpose": "a test"} {
		if m.text(key) != want {
			g.t.Errorf("show: %s is %q, want %q", key, m.text(key), want)
		}
	}
	if m.number("memory_bytes") != 256<<20 || m.number("cpus") != 1 || m.number("pid") < 2 {
		g.t.Errorf("show: memory_bytes %v, cpus %v, pid %v", m["memory_bytes"], m["cpus"], m["pid"])
	}
	for _, key := range []string{"created", "expires"} {
		if _, err := time.Parse(time.RFC3339Nano, m.text(key)); err != nil {
			g.t.Errorf("show: %s: %v", key, err)
		}
	}
	list, _ := m["isolation"].([]any)
	told := map[string]bool{}
	for _, i := range list {
		i := object(i.(map[string]any))
		told[i.text("subject")] = true
		if i.text("measure") == "" || (i["in_force"] == false && i.text("detail") == "") {
			g.t.Errorf("isolation: %v", i)
		}
	}
	if !told["qemu"] || !told["guard"] || !told["gate"] {
		g.t.Errorf("isolation tells of %v only", told)
	}
	if _, ok := m["publish"].([]any); !ok {
		g.t.Errorf("show: publish is %v", m["publish"])
	}
	found := g.list("ls")
	if len(found) != 1 || found[0].text("name") != "one" || found[0].text("state") != "running" {
		g.t.Errorf("ls: %v", found)
	}
	if text := g.must("show", "one"); !strings.Contains(text, "ana") || !strings.Contains(text, "no isolation boundary") {
		g.t.Errorf("show in words does not tell the owner, or that TCG is no isolation boundary:\n%s", text)
	}
}

func lifeViews(g *guest) {
	g.sh("sleep 4242 & disown")
	var ours object
	g.untilSays(time.Minute, "sleep 4242", "ps", "one", "-o", "json")
	list := g.list("ps", "one")
	if i := slices.IndexFunc(list, func(p object) bool { return p.text("cmdline") == "sleep 4242" }); i >= 0 {
		ours = list[i]
	}
	if ours == nil || ours.text("comm") != "sleep" || ours.text("exe") != "/usr/bin/sleep" || ours.number("uid") != 0 || ours.number("ppid") < 1 {
		g.t.Errorf("ps: %v", ours)
	}
	if inside := g.sh("pgrep -x sleep"); number(inside) != int(ours.number("pid")) {
		g.t.Errorf("ps says pid %v, the guest %s", ours["pid"], inside)
	}
	if len(list) < 30 { // with its kernel's threads
		g.t.Errorf("ps: only %d processes", len(list))
	}
	inside := strings.Fields(g.sh("cut -d' ' -f1 /proc/modules"))
	var outside []string
	for _, m := range g.list("modules", "one") {
		outside = append(outside, m.text("name"))
		if m.number("size") <= 0 {
			g.t.Errorf("module %v", m)
		}
	}
	slices.Sort(inside)
	slices.Sort(outside)
	if !slices.Equal(inside, outside) || len(inside) == 0 {
		g.t.Errorf("modules: outside %v, inside %v", outside, inside)
	}
}

func lifeConsole(g *guest) {
	g.hangUp()
	r := g.vigiaWith(strings.NewReader("echo cons$((40+2))ole\n"), "console", "one", "--wait", "6s")
	if r.status != 0 || !strings.Contains(r.stdout, "cons42ole") {
		g.t.Errorf("console: %s", r)
	}
	log := g.must("console", "one", "--log")
	if !strings.Contains(log[:min(len(log), 2000)], "SeaBIOS") && !strings.Contains(log[:min(len(log), 4000)], "Linux version") {
		g.t.Errorf("the log does not begin with the first bytes: %.400q", log)
	}
	if !strings.Contains(log, "cons42ole") {
		g.t.Error("the log lacks what was just printed")
	}
	// Two may be attached at once, and both see the same.
	a, b := g.on(g.t), g.on(g.t)
	if a.sh("echo he$((1))ard") != "he1ard" || b.sh("echo he$((2))ard") != "he2ard" {
		g.t.Error("two attached consoles do not both answer")
	}
}

func lifeExec(g *guest) {
	r := g.vigia("exec", "one", "--", "sh", "-c", "echo out; echo err >&2; exit 7")
	if r.status != 7 || r.stdout != "out\n" || r.stderr != "err\n" {
		g.t.Errorf("exec: %s", r)
	}
	if r := g.vigiaWith(strings.NewReader("given"), "exec", "one", "--", "cat"); r.stdout != "given" {
		g.t.Errorf("exec passes its standard input: %s", r)
	}
	if r := g.vigia("exec", "one", "--", "no-such-program"); r.status == 0 {
		g.t.Errorf("exec of a program that is not there: %s", r)
	}
}

func lifeCopies(g *guest) {
	dir := g.t.TempDir()
	data := bytes.Repeat([]byte("0123456789abcdef\x00\xff"), 20_000)
	from, back := filepath.Join(dir, "from"), filepath.Join(dir, "back")
	if err := os.WriteFile(from, data, 0o640); err != nil {
		g.t.Fatal(err)
	}
	g.must("cp", from, "one:/root/copied")
	g.must("cp", "one:/root/copied", back)
	if got, err := os.ReadFile(back); err != nil || !bytes.Equal(got, data) {
		g.t.Errorf("%d bytes went in, %d came back, %v", len(data), len(got), err)
	}
	if size := g.sh("stat -c %%s /root/copied"); size != "360000" {
		g.t.Errorf("in the guest it has %s bytes", size)
	}
	g.refused(1, []string{"/root/none"}, "cp", "one:/root/none", back)
}

// lifePause sees the guest stand still: a counter in it does not go on.
func lifePause(g *guest) {
	g.sh("(while :; do echo $((n+=1)) > /run/count; busybox usleep 100000; done) & disown")
	g.must("pause", "one")
	if s := g.show("one").text("state"); s != "paused" {
		g.t.Errorf("state %s after pause", s)
	}
	pid := int(g.show("one").number("pid"))
	before := cpuTime(g.t, pid)
	time.Sleep(2 * time.Second)
	if used := cpuTime(g.t, pid) - before; used > 20 { // hundredths of a second: QEMU's own timers
		g.t.Errorf("a paused machine used %d ticks of CPU in 2 s", used)
	}
	if r := g.vigia("pause", "one"); r.status != 0 && r.status != 1 {
		g.t.Errorf("pause twice: %s", r)
	}
	g.must("resume", "one")
	if s := g.show("one").text("state"); s != "running" {
		g.t.Errorf("state %s after resume", s)
	}
	first := number(g.sh("cat /run/count"))
	time.Sleep(time.Second)
	if second := number(g.sh("cat /run/count")); second <= first {
		g.t.Errorf("the guest does not go on: %d, then %d", first, second)
	}
	for _, kind := range []string{"machine.paused", "machine.resumed"} {
		if e := g.untilEvent("one", kind, 10*time.Second, nil); e.Fields.text("reason") == "" {
			g.t.Errorf("%s without a reason", e)
		}
	}
}

// cpuTime is a process's user and system time in clock ticks, as proc(5) says.
func cpuTime(t *testing.T, pid int) int {
	stat, err := os.ReadFile(filepath.Join("/proc", itoa(pid), "stat"))
	if err != nil {
		t.Fatal(err)
	}
	f := strings.Fields(string(stat[bytes.LastIndexByte(stat, ')')+1:]))
	return number(f[11]) + number(f[12])
}

func lifeReboot(g *guest) {
	pid := g.show("one").number("pid")
	g.sh("echo before > /run/gone; echo before > /root/kept; sync")
	g.dies("reboot")
	g.untilEvent("one", "machine.rebooted", bootTime, nil)
	g.hangUp()
	g.until("the guest is up again", bootTime, func() bool {
		out, err := g.try("ls /run/gone 2>/dev/null; cat /root/kept", bootTime)
		return err == nil && out == "before"
	})
	if m := g.show("one"); m.number("pid") != pid || m.text("state") != "running" {
		g.t.Errorf("after a reboot: pid %v (before: %v), %s", m["pid"], pid, m.text("state"))
	}
	g.sh("sleep 5151 & disown")
	g.untilSays(time.Minute, "sleep 5151", "ps", "one", "-o", "json") // the views follow the new kernel
}

func lifeStopStart(g *guest) {
	g.sh("echo stays > /root/stays; sync")
	g.must("stop", "one", "--timeout", "60s")
	m := g.show("one")
	if m.text("state") != "stopped" || m.text("ended") != "stopped" {
		g.t.Errorf("after stop: %s, ended %s (%s)", m.text("state"), m.text("ended"), m.text("reason"))
	}
	e := g.untilEvent("one", "machine.stopped", 10*time.Second, nil)
	if e.Fields.text("ended") != "stopped" {
		g.t.Error(e)
	}
	g.refused(1, []string{"does not run", "vigia start one"}, "ps", "one")
	g.must("start", "one")
	g.ready()
	if out := g.sh("cat /root/stays"); out != "stays" {
		g.t.Errorf("the disk has %q", out)
	}
	g.refused(1, []string{"runs already"}, "start", "one")
}

// lifeForced stops a guest whose power button does nothing, and that has no agent listening.
func lifeForced(g *guest) {
	g.deaf()
	before := time.Now()
	g.must("stop", "one", "--timeout", "3s")
	if took := time.Since(before); took < 3*time.Second || took > 30*time.Second {
		g.t.Errorf("forced after %s, not about 3 s", took)
	}
	if m := g.show("one"); m.text("state") != "stopped" || m.text("ended") != "forced" {
		g.t.Errorf("after a forced stop: %s, ended %s (%s)", m.text("state"), m.text("ended"), m.text("reason"))
	}
	g.must("start", "one")
	g.ready()
}

func lifePowerOff(g *guest) {
	g.dies("poweroff")
	m := g.untilState("one", "stopped", time.Minute)
	if m.text("ended") != "poweroff" {
		g.t.Errorf("ended %s (%s)", m.text("ended"), m.text("reason"))
	}
	g.untilEvent("one", "machine.stopped", 10*time.Second, func(e event) bool { return e.Fields.text("ended") == "poweroff" })
	g.must("start", "one")
	g.ready()
}

func lifePanic(g *guest) {
	g.dies("echo c > /proc/sysrq-trigger")
	m := g.untilState("one", "failed", time.Minute)
	if m.text("ended") != "panic" || !strings.Contains(m.text("reason"), "panicked") {
		g.t.Errorf("ended %s (%s)", m.text("ended"), m.text("reason"))
	}
	g.untilEvent("one", "machine.failed", 10*time.Second, func(e event) bool { return e.Fields.text("ended") == "panic" })
	g.must("start", "one")
	g.ready()
	if out := g.sh("cat /root/stays"); out != "stays" {
		g.t.Errorf("after a panic the disk has %q", out)
	}
}

func lifeQEMUDies(g *guest) {
	syscall.Kill(int(g.show("one").number("pid")), syscall.SIGKILL)
	m := g.untilState("one", "failed", time.Minute)
	if m.text("ended") != "qemu-died" || m.text("reason") == "" {
		g.t.Errorf("ended %s (%s)", m.text("ended"), m.text("reason"))
	}
	g.untilEvent("one", "machine.failed", 10*time.Second, func(e event) bool { return e.Fields.text("ended") == "qemu-died" })
}

// lifeExpiry looks at a machine whose time is over while it runs: it is stopped, and can't be started again.
func lifeExpiry(g *guest) {
	g.must("run", "tiny", "brief", "--memory", "256M", "--ttl", "8s", "--net", "off")
	g.untilState("brief", "stopped", 90*time.Second)
	g.refused(1, []string{"expired"}, "start", "brief")
	g.must("rm", "brief")
}

func lifeRemove(g *guest) {
	g.must("start", "one")
	g.refused(1, []string{"stop it first", "--force"}, "rm", "one")
	id := g.show("one").text("id")
	g.must("rm", "one", "--force")
	if list := g.list("ls"); len(list) != 0 {
		g.t.Errorf("after rm: %v", list)
	}
	if _, err := os.Stat(g.path("machines", id)); err == nil {
		g.t.Error("its files are there")
	}
	g.refused(1, []string{"one", "vigia ls"}, "show", "one")
	g.untilEvent("", "machine.removed", 10*time.Second, func(e event) bool { return e.Machine == "one" })
}
