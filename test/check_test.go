package test

import (
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"vigia/internal/introspect"
	"vigia/internal/kernel"
	"vigia/internal/memory"
)

// finding is one row of `vigia check -o json`.
type finding struct {
	Kind, Subject, Detail, Severity string
	Listed, Missing                 []string
	PID                             int64
	Evidence                        []struct {
		Address     uint64
		Bytes, Note string
	}
}

// check makes all checks of a guest at once.
func (g *guest) check() (found []finding, status int) {
	g.t.Helper()
	r := g.vigia("check", g.name, "-o", "json")
	var report struct{ Findings []finding }
	if r.status != 0 && r.status != 3 || json.Unmarshal([]byte(r.stdout), &report) != nil {
		g.t.Fatalf("check: %v", r)
	}
	return slices.DeleteFunc(report.Findings, func(f finding) bool { return f.Severity == "info" }), r.status
}

// wantClean sees that nothing is found, now and by the schedule so far.
func (g *guest) wantClean() {
	g.t.Helper()
	if found, status := g.check(); len(found) > 0 || status != 0 {
		g.t.Errorf("status %d: %+v", status, found)
	}
	for _, kind := range []string{"process.hidden", "module.hidden", "kernel.tampered"} {
		for _, e := range g.events(g.name, "--kind", kind) {
			g.t.Errorf("told: %v", e)
		}
	}
}

// TestNothingIsFound: what a guest does in its work is no finding: fork and exec loops, threads, packages put in and taken
// out, modules loaded and unloaded, containers, people who log in and become root as they may. It takes 3 minutes, or as
// many as VIGIA_TEST_CHECK_MINUTES says.
func TestNothingIsFound(t *testing.T) {
	minutes := 3
	if s := os.Getenv("VIGIA_TEST_CHECK_MINUTES"); s != "" {
		fmt.Sscan(s, &minutes)
	}
	h := newHost(t)
	h.serve("--check-every", "200ms", "--check-full-every", "5s")
	g := h.run("busy", "--cpus", "2", "--additions", "exec")
	g.wantClean()
	g.sh("cat > /root/work <<'END'\n%s\nEND\nchmod +x /root/work", strings.ReplaceAll(work, "\n\n", "\n"))
	for _, part := range []string{"forks", "forks", "threads", "modules", "packages", "containers", "users"} {
		g.sh("(setsid /root/work %s >/root/%s.log 2>&1 </dev/null &)", part, part)
	}
	rounds := 0
	for end := time.Now().Add(time.Duration(minutes) * time.Minute); time.Now().Before(end); time.Sleep(2 * time.Second) {
		if found, _ := g.check(); len(found) > 0 {
			t.Errorf("after %d rounds: %+v", rounds, found)
		}
		if rounds++; t.Failed() {
			break
		}
	}
	g.wantClean()
	counts := g.sh("cd /root; for part in forks threads modules packages containers users; do echo $part $(cat $part.count) $(head -c 200 $part.log | head -2 | tr '\\n' ' '); done")
	t.Logf("%d checks in %d minutes, while the guest did:\n%s", rounds, minutes, counts)
	for line := range strings.Lines(counts) {
		if words := strings.Fields(line); len(words) < 2 || words[1] == "0" {
			t.Errorf("the guest did no work of this sort: %s", line)
		}
	}
}

// work is what the guest does, one sort of it a process. Each counts its rounds.
const work = `#!/bin/sh
cd /tmp
n=0
count() { n=$((n + 1)); echo $n > /root/$1.count; }
forks() { for i in 1 2 3 4 5 6 7 8; do (true); /bin/true; (/bin/true &); done; /bin/sh -c 'true | cat | cat >/dev/null'; }
threads() { sort --parallel=4 -S 1M /usr/share/dpkg/* >/dev/null 2>&1; timeout 0.2 busybox yes >/dev/null; xargs -P 4 -n 1 true </etc/passwd >/dev/null 2>&1; true; }
modules() { for m in dummy veth bridge tun; do modprobe $m; done; rmmod tun bridge veth dummy; }
packages() {
	mkdir -p p/DEBIAN p/usr/share/p
	printf 'Package: vigia-test\nVersion: 1.%d\nArchitecture: all\nMaintainer: t <t@example.org>\nDescription: t\n' $n >p/DEBIAN/control
	printf '#!/bin/sh\nldconfig\n' >p/DEBIAN/postinst; chmod 755 p/DEBIAN/postinst
	echo $n >p/usr/share/p/file
	dpkg-deb -b p p.deb >/dev/null && dpkg -i p.deb >/dev/null && dpkg -r vigia-test >/dev/null
}
containers() {
	unshare -pmnuif --mount-proc sh -c 'hostname c; ip link set lo up; mount -t tmpfs t /mnt; ps ax >/dev/null; (sleep 0.1 &); true' &&
	unshare -Ur sh -c 'id -u; unshare -pf true' >/dev/null
	modprobe -q overlay && mkdir -p lower upper work both && chmod 777 lower upper && unshare -m sh -c 'mount -t tmpfs t work && mkdir work/w work/u &&
		chmod 777 work/u && mount -t overlay o -o lowerdir=lower,upperdir=work/u,workdir=work/w both &&
		su nobody -s /bin/sh -c "dd if=/dev/zero of=both/f bs=4k count=500 conv=fsync" 2>/dev/null & dd if=/dev/zero of=lower/g bs=4k count=99 2>/dev/null; wait'
	true
}
users() {
	cp /usr/bin/id /usr/local/bin/rid; chmod 4755 /usr/local/bin/rid
	su nobody -s /bin/sh -c 'rid -u; sleep 0.3; rid' >/dev/null
	setpriv --reuid 33 --clear-groups --inh-caps=+setuid --ambient-caps=+setuid setpriv --reuid 0 id -u >/dev/null
	setpriv --ruid 1000 --euid 0 sh -c 'sleep 0.2; id' >/dev/null
	newgrp </dev/null >/dev/null
	true
}
while $1; do count $1; done
`

// intruder writes a running guest's memory, by the addresses of its kernel, as somebody in that kernel would.
type intruder struct {
	t       *testing.T
	ram     *os.File
	mem     *memory.RAM
	space   *memory.Space
	guest   *introspect.Guest
	profile *kernel.Profile
}

// intrude opens the memory of a machine: 256 MiB, all below the hole.
func (g *guest) intrude() *intruder {
	t := g.t
	t.Helper()
	i := &intruder{t: t, ram: openRAM(t, int(g.show(g.name).number("pid")))}
	t.Cleanup(func() { i.ram.Close() })
	st, err := i.ram.Stat()
	if err != nil {
		t.Fatal(err)
	}
	m, err := memory.Map(i.ram, memory.Q35Layout(uint64(st.Size())))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { m.Close() })
	i.mem = m
	id, err := os.ReadFile(filepath.Join(images, "names", "tiny"))
	if err != nil {
		t.Fatal(err)
	}
	f, err := os.Open(filepath.Join(images, strings.TrimSpace(string(id)), "profile"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if i.profile, err = kernel.Open(f); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { i.profile.Close() })
	if i.guest, err = introspect.Attach(m, i.profile); err != nil {
		t.Fatal(err)
	}
	b := i.guest.Boot()
	i.space = memory.NewSpace(m, b.Phys+i.symbol("init_top_pgt")-i.symbol("_text"), b.Levels)
	return i
}

// openRAM opens the file behind a QEMU's memory for writing: its name is gone, QEMU has it open.
func openRAM(t *testing.T, pid int) *os.File {
	t.Helper()
	for _, e := range dirEntries(fmt.Sprintf("/proc/%d/fd", pid)) {
		name := fmt.Sprintf("/proc/%d/fd/%s", pid, e)
		if target, err := os.Readlink(name); err == nil && strings.Contains(target, ".ram") {
			f, err := os.OpenFile(name, os.O_RDWR, 0)
			if err != nil {
				t.Fatal(err)
			}
			return f
		}
	}
	t.Fatalf("QEMU %d has no memory file open", pid)
	return nil
}

func (i *intruder) symbol(name string) uint64 {
	i.t.Helper()
	v, err := i.profile.Symbol(name)
	if err != nil {
		i.t.Fatal(err)
	}
	return v
}

func (i *intruder) offset(typ, field string) uint64 {
	i.t.Helper()
	v, err := i.profile.Offset(typ, field)
	if err != nil {
		i.t.Fatal(err)
	}
	return v
}

func (i *intruder) get(va uint64) uint64 {
	i.t.Helper()
	i.space.Flush()
	v, err := i.space.U64(va)
	if err != nil {
		i.t.Fatalf("read %#x: %v", va, err)
	}
	return v
}

func (i *intruder) write(va uint64, b []byte) {
	i.t.Helper()
	pa, err := i.space.Translate(va)
	if err == nil {
		_, err = i.ram.WriteAt(b, int64(pa))
	}
	if err != nil {
		i.t.Fatalf("write %#x: %v", va, err)
	}
}

func (i *intruder) put(va, v uint64) {
	i.t.Helper()
	i.write(va, binary.LittleEndian.AppendUint64(nil, v))
}

// unlink takes a node out of its list and returns what puts it back, behind an anchor: its old neighbours may have gone
// meanwhile.
func (i *intruder) unlink(node, anchor uint64) (back func()) {
	i.t.Helper()
	next, prev := i.get(node), i.get(node+8)
	i.put(prev, next)
	i.put(next+8, prev)
	return func() {
		next := i.get(anchor)
		i.put(node, next)
		i.put(node+8, anchor)
		i.put(next+8, node)
		i.put(anchor, node)
	}
}

// process finds a process by its command line.
func (i *intruder) process(cmdline string) introspect.Process {
	i.t.Helper()
	list, err := i.guest.Processes()
	if err != nil {
		i.t.Fatal(err)
	}
	for _, p := range list {
		if p.Cmdline == cmdline {
			return p
		}
	}
	i.t.Fatalf("no process %q", cmdline)
	return introspect.Process{}
}

// attachAgain attaches to a kernel that lacks what it is found by. It is known by its tick alone, and an idle one ticks seldom: so who
// looks for it looks again, as a guard does.
func (i *intruder) attachAgain() {
	i.t.Helper()
	again, err := introspect.Attach(i.mem, i.profile)
	for end := time.Now().Add(30 * time.Second); errors.Is(err, introspect.ErrNotReady) && time.Now().Before(end); {
		again, err = introspect.Attach(i.mem, i.profile)
	}
	if err != nil || again.Boot() != i.guest.Boot() {
		i.t.Errorf("who attaches to a kernel without a banner: %v", err)
	}
}

// TestHidden takes a process off one list of a running guest's kernel after the other, then a module, makes a process
// root, and the kernel one that can't be found: each is found by who asks, and told by the schedule without anybody asking.
func TestHidden(t *testing.T) {
	h := newHost(t)
	h.serve("--check-every", "300ms", "--check-full-every", "3s")
	g := h.run("prey", "--additions", "exec")
	g.sh("modprobe dummy; setsid sleep 54321 </dev/null >/dev/null 2>&1 & su nobody -s /bin/sh -c 'exec setsid sleep 65432 </dev/null >/dev/null 2>&1' & sleep 1")
	g.wantClean()
	i := g.intrude()
	victim := i.process("sleep 54321")
	seen := 0
	told := func(kind string, meant func(event) bool) event {
		t.Helper()
		e := g.untilEvent(g.name, kind, 30*time.Second, meant)
		seen++
		return e
	}
	first := i.process("init")
	if victim.PPID != first.PID {
		t.Fatalf("%+v is not a child of %+v", victim, first)
	}
	for _, c := range []struct{ view, field, anchor string }{{"task list", "tasks", "tasks"}, {"children", "sibling", "children"}, {"cgroups", "cg_list", "cg_list"}} {
		back := i.unlink(victim.Task+i.offset("task_struct", c.field), first.Task+i.offset("task_struct", c.anchor))
		found, status := g.check()
		if status != 3 || len(found) != 1 || found[0].Kind != "process.hidden" || found[0].PID != victim.PID || !slices.Equal(found[0].Missing, []string{c.view}) {
			t.Errorf("off the %s: status %d, %+v", c.view, status, found)
		}
		e := told("process.hidden", func(e event) bool { return fmt.Sprint(e.Fields["missing"]) == fmt.Sprint([]any{c.view}) })
		if e.Fields.text("comm") != "sleep" || e.Fields.number("pid") != float64(victim.PID) || e.Fields.text("severity") != "critical" {
			t.Errorf("%v", e)
		}
		back()
		if found, status := g.check(); status != 0 {
			t.Errorf("back on the %s: %+v", c.view, found)
		}
	}
	h.untilEvent("prey", "policy.alert", 10*time.Second, func(e event) bool { return e.Fields.text("rule") == "rootkit" })

	list, err := i.guest.Modules()
	if err != nil || list[0].Name != "dummy" {
		t.Fatal(list, err)
	}
	module := i.get(i.symbol("modules")+i.guest.Boot().Slide) - i.offset("module", "list")
	back := i.unlink(module+i.offset("module", "list"), i.symbol("modules")+i.guest.Boot().Slide)
	// Its code belongs to no module that is listed: other checks say so too.
	if found, _ := g.check(); !slices.ContainsFunc(found, func(f finding) bool {
		return f.Kind == "module.hidden" && f.Subject == "dummy" && slices.Contains(f.Missing, "module list")
	}) {
		t.Errorf("a module off its list: %+v", found)
	}
	told("module.hidden", func(e event) bool { return e.Fields.text("name") == "dummy" })
	back()

	nobody := i.process("sleep 65432")
	cred := i.get(nobody.Task + i.offset("task_struct", "real_cred"))
	was := i.get(cred + i.offset("cred", "euid"))
	i.write(cred+i.offset("cred", "euid"), []byte{0, 0, 0, 0})
	found, _ := g.check()
	if len(found) != 1 || found[0].Kind != "credentials.raised" || found[0].PID != nobody.PID {
		t.Errorf("a process became root: %+v", found)
	}
	told("kernel.tampered", func(e event) bool { return e.Fields.text("finding") == "credentials.raised" })
	i.put(cred+i.offset("cred", "euid"), was)
	if found, status := g.check(); status != 0 {
		t.Errorf("all put back: %+v", found)
	}
	// What a kernel is found by, written over: it is looked at on, also by who comes later, and it is told.
	at := i.symbol("linux_banner") + i.guest.Boot().Slide
	banner := i.get(at)
	i.put(at, 0)
	found, _ = g.check()
	if !slices.ContainsFunc(found, func(f finding) bool { return f.Kind == "kernel.disguised" && f.Subject == "linux_banner" }) {
		t.Errorf("a kernel without a banner: %+v", found)
	}
	told("kernel.tampered", func(e event) bool { return e.Fields.text("finding") == "kernel.disguised" })
	i.attachAgain()
	if r := g.vigia("ps", g.name); r.status != 0 {
		t.Errorf("a kernel without a banner: %v", r)
	}
	i.put(at, banner)
	if found, status := g.check(); status != 0 {
		t.Errorf("the banner put back: %+v", found)
	}
	g.sh("ps ax >/dev/null; rmmod dummy; kill %d", victim.PID)
	if n := len(g.events(g.name, "--kind", "process.hidden")); n != 3 {
		t.Errorf("three hidden processes were told %d times", n)
	}
}
