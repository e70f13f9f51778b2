package test

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// A tampering is one thing that test/tamper does to its kernel, and a finding that must come of it.
type tampering struct {
	how  string
	kind string // of the finding
	what string // in its subject or detail
	text bool   // only the kernel's code shows it
}

// undone are what rmmod undoes.
var undone = []tampering{
	{how: "socket", kind: "operations.changed", what: "tcp4_seq_ops"},
	{how: "table", kind: "syscall.hooked", what: "sys_call_table[217]"},
	{how: "inline", kind: "text.changed", what: "getdents64", text: true},
	{how: "dispatch", kind: "text.changed", what: "x64_sys_call", text: true},
	{how: "prologue", kind: "text.changed", what: "ksys_sync", text: true},
	{how: "label", kind: "text.changed", text: true},
	{how: "alternative", kind: "text.changed", what: "__get_user_8", text: true},
	{how: "thunk", kind: "text.changed", what: "ksys_sync", text: true},
	{how: "ftrace", kind: "ftrace.hook", what: "__x64_sys_getdents64"},
	{how: "kprobe", kind: "kprobe.hook", what: "__x64_sys_getdents64"},
	{how: "kretprobe", kind: "kprobe.hook", what: "__x64_sys_getdents64"},
	{how: "idt", kind: "idt.changed", what: "vector 4"},
	{how: "proc", kind: "operations.changed", what: "/proc/modules"},
	{how: "proc-read", kind: "operations.changed", what: "kallsyms_proc_ops"},
	{how: "directory", kind: "operations.changed", what: "ext4_dir_operations"},
	{how: "inode", kind: "operations.changed", what: "inode"},
	{how: "copy", kind: "operations.changed", what: "no known module"},
	{how: "netfilter", kind: "netfilter.hook", what: "ipv4 prerouting"},
	{how: "sniffer", kind: "packet.hook", what: "all packets"},
	{how: "keyboard", kind: "notifier.hook", what: "keyboard_notifier_list"},
	{how: "reboot", kind: "notifier.hook", what: "reboot_notifier_list"},
	{how: "terminal", kind: "operations.changed", what: "n_tty_ops"},
	{how: "format", kind: "operations.changed", what: "binary format"},
	{how: "tracepoint", kind: "tracepoint.hook", what: "sys_enter"},
	{how: "breakpoint", kind: "breakpoint.hook", what: "saved_command_line"},
	{how: "security", kind: "lsm.hook", what: "capability_hooks"},
	{how: "helper", kind: "helper.changed", what: "modprobe_path"},
	{how: "magic", kind: "ftrace.hook", what: "__x64_sys_kill"},
	{how: "unowned", kind: "code.unowned", what: "not in its lists of code"},
	{how: "writable", kind: "code.writable", what: "both write and execute"},
	{how: "after-init", kind: "pointer.hook", what: "x86_platform"},
}

// lasting are what nothing undoes: processes made others than they were, then modules that hide and leave something to
// be called. The module may be loaded again, since the kernel no longer knows that it is.
var lasting = []tampering{
	{how: "process", kind: "process.hidden", what: "sleep"},
	{how: "ids", kind: "credentials.raised", what: "sleep"},
	{how: "share", kind: "credentials.shared", what: "sleep"},
	{how: "module", kind: "module.hidden", what: "tamper"},
	{how: "hidden-timer", kind: "timer.hook", what: "no known code"},
	{how: "hidden-thread", kind: "thread.hook", what: "kworker/u9:3"},
	{how: "hidden-pointer", kind: "pointer.hook", what: "pm_power_off"},
}

// TestTampering does to a guest's kernel what rootkits do, one thing after the other, and sees that each is found by a
// finding that names it, and that nothing is left of it when it is undone. VIGIA_TEST_TAMPER names another image to do it in,
// of another kernel.
func TestTampering(t *testing.T) {
	image := os.Getenv("VIGIA_TEST_TAMPER")
	if image == "" {
		image = "tamper"
	}
	if _, err := os.Stat(filepath.Join(images, "names", image)); err != nil {
		t.Skipf("no image %s: script/test builds it from test/tamper/tamper.yaml", image)
	}
	h := newHost(t)
	if err := storeImage(h.path("images"), image, os.Link); err != nil {
		t.Fatal(err)
	}
	h.serve("--check-every", "0", "--check-full-every", "0") // only when the test asks
	h.must("run", image, "victim", "--memory", "512M", "--net", "off")
	g := h.guest("victim")
	g.ready()
	g.sh("dmesg -n 1")
	clean := func() {
		t.Helper()
		if found, _ := g.check(); len(found) > 0 {
			t.Errorf("nothing is tampered with: %+v", found)
		}
	}
	clean()
	t.Run("the guest's own probe", func(t *testing.T) { g.on(t).probesItself() })
	// try does one thing, looks for what must be found, and undoes it.
	try := func(name, do string, want tampering, undo string) {
		t.Run(name, func(t *testing.T) {
			g := g.on(t)
			g.sh("%s", do)
			defer g.try(undo, bootTime)
			g.wantFound(want)
		})
	}
	code := g.seesCode()
	for _, k := range undone {
		if k.text && !code {
			continue
		}
		try(k.how, "insmod /root/tamper.ko how="+k.how, k, "rmmod tamper")
	}
	clean()
	try("bpf", "/root/bpf >/dev/null 2>&1 & sleep 0.5", tampering{kind: "bpf.program", what: "writes into the memory"}, "kill $!; wait")
	try("mount", "mount --bind /tmp /proc/1", tampering{kind: "mount.hides", what: "/proc/1"}, "umount /proc/1")
	try("core pattern", "echo '|/tmp/x' >/proc/sys/kernel/core_pattern", tampering{kind: "helper.changed", what: "core_pattern"},
		"echo core >/proc/sys/kernel/core_pattern")
	clean()
	const asUser = "setpriv --reuid=1000 --regid=1000 --clear-groups "
	g.sh("insmod /root/tamper.ko how=magic; " + asUser + "sh -c 'sleep 4; kill -62 1; exec sleep 1000' >/dev/null 2>&1 & sleep 1")
	g.check() // which remembers who is who,
	g.check() // and sees that none is in the middle of a call of exec
	try("magic signal", "sleep 4; grep -q '^Uid:.0.0.0.0' /proc/$!/status", tampering{kind: "credentials.raised", what: "sleep"}, "kill $!; rmmod tamper")
	for _, k := range lasting {
		g.sh(asUser + "sleep 1000 >/dev/null 2>&1 & sleep 0.5")
		g.check()
		g.check()
		try(k.how, "insmod /root/tamper.ko pid=$! how="+k.how, k, "rmmod tamper")
	}
}

// probesItself has the guest put a probe into the middle of one of its own functions, which the kernel makes a jump a moment later:
// neither is changed code.
func (g *guest) probesItself() {
	g.t.Helper()
	const events = "/sys/kernel/tracing/"
	g.sh("mount -t tracefs t /sys/kernel/tracing; mount -t debugfs d /sys/kernel/debug; for o in $(seq 6 60); do echo p:own vfs_read+$o >" + events + "kprobe_events && break; done 2>/dev/null; true")
	for range 2 {
		g.sh("echo 1 >" + events + "events/kprobes/own/enable")
		if found, _ := g.check(); len(found) > 0 {
			g.t.Errorf("the guest's own probe: %+v", found)
		}
		if list := g.sh("sleep 1; cat /sys/kernel/debug/kprobes/list"); !strings.Contains(list, "vfs_read+") {
			g.t.Errorf("no probe is set: %s", list)
		} else {
			g.t.Log(list)
		}
		if found, _ := g.check(); len(found) > 0 {
			g.t.Errorf("the guest's own probe, a second later: %+v", found)
		}
		g.sh("echo 0 >" + events + "events/kprobes/own/enable")
	}
	g.sh("echo >" + events + "kprobe_events; umount /sys/kernel/tracing /sys/kernel/debug; true")
}

// seesCode says whether the image has what its kernel's code is compared with; one that an older program built has not.
func (g *guest) seesCode() bool {
	g.t.Helper()
	views := g.json("check", g.name)["views"]
	for _, v := range views.([]any) {
		if v := object(v.(map[string]any)); v.text("check") == "text" && v.text("unknown") != "" {
			g.t.Errorf("the kernel's code is not looked at: %s", v.text("unknown"))
			return false
		}
	}
	return true
}

// wantFound makes the checks and looks for a finding of a kind, worse than info, that names what was done.
func (g *guest) wantFound(k tampering) {
	g.t.Helper()
	found, status := g.check()
	for _, f := range found {
		if f.Kind == k.kind && strings.Contains(f.Subject+" "+f.Detail, k.what) {
			return
		}
	}
	g.t.Errorf("status %d, and nothing found of kind %s that says %q: %+v", status, k.kind, k.what, found)
}
