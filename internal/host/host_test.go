package host

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

const (
	intel   = "processor\t: 0\nflags\t\t: fpu vmx sse2 constant_tsc\n"
	plain   = "processor\t: 0\nflags\t\t: fpu sse2 hypervisor\n"
	qemu72  = "QEMU emulator version 7.2.22 (Debian 1:7.2+dfsg-7+deb12u18+b3)\nCopyright (c) 2003-2022 Fabrice Bellard\n"
	meminfo = "MemTotal:       16000000 kB\nMemFree:  1 kB\nMemAvailable:   12000000 kB\n"
)

var deviceHelp = func() string {
	var b strings.Builder
	for _, d := range neededDevices {
		fmt.Fprintf(&b, "name \"%s\", bus PCI\n", d)
	}
	return b.String()
}()

// goodHost is a Debian 12 on which everything works; a case takes something away or puts something else.
func goodHost() map[string]string {
	return map[string]string{
		"/etc/os-release":                                   "ID=debian\nVERSION_ID=\"12\"\n",
		"/etc/subuid":                                       "nobody:100000:65536\nroot:100000:65536\n0:1:65536\n65534:1:65536\n",
		"/etc/subgid":                                       "nobody:100000:65536\nroot:100000:65536\n0:1:65536\n65534:1:65536\n",
		"/proc/cpuinfo":                                     intel,
		"/proc/meminfo":                                     meminfo,
		"/proc/self/cgroup":                                 "0::/vigia.service\n",
		"/proc/sys/user/max_user_namespaces":                "96365\n",
		"/proc/sys/kernel/yama/ptrace_scope":                "0\n",
		"/proc/sys/kernel/seccomp/actions_avail":            "kill_process kill_thread trap errno user_notif trace log allow\n",
		"/sys/fs/cgroup/vigia.service/cgroup.controllers":   "cpu io memory pids\n",
		"/sys/kernel/mm/transparent_hugepage/shmem_enabled": "always within_size [advise] never deny force\n",
		"/dev/kvm":                                          "", "/dev/shm/x": "", "/dev/userfaultfd": "",
		"/usr/bin/qemu-system-x86_64": script(qemu72),
		"/usr/bin/mmdebstrap":         "#!", "/usr/sbin/mke2fs": "#!", "/usr/bin/qemu-img": "#!", "/usr/bin/newuidmap": "#!",
	}
}

// script is a program that answers as QEMU does.
func script(version string) string {
	return "#!/bin/sh\ncase \"$*\" in\n*help) cat <<'E'\n" + deviceHelp + "E\n;;\n*) cat <<'E'\n" + version + "E\n;;\nesac\n"
}

func newHost(t *testing.T, files map[string]string) *Host {
	t.Helper()
	root := t.TempDir()
	for name, content := range files {
		p := filepath.Join(root, name)
		if err := os.MkdirAll(filepath.Dir(p), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(p, []byte(content), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	return &Host{root: root, State: root, path: func() string { return "/usr/bin" }, kvm: func() error { return nil },
		abi: func() (int, error) { return 7, nil },
		Try: func(context.Context) ([]Wall, error) { return []Wall{{Name: "seccomp", InForce: true}}, nil }}
}

func find(t *testing.T, fs Findings, name string) Finding {
	t.Helper()
	for _, f := range fs {
		if f.Name == name {
			return f
		}
	}
	t.Fatalf("nothing is said of %s", name)
	return Finding{}
}

func TestGoodHost(t *testing.T) {
	h := newHost(t, goodHost())
	for _, f := range h.Inspect(t.Context()) {
		if f.Name == "memory" || f.Name == "shared memory" || f.Name == "disk space" {
			continue // of the machine that tests
		}
		if f.Status != OK {
			t.Errorf("%+v", f)
		}
	}
	if a := h.Accelerator(); a.Name != "kvm" {
		t.Errorf("%+v", a)
	}
}

// Each lesser host is told apart, says what follows, and what to do where something can be done.
func TestLesserHosts(t *testing.T) {
	for _, c := range []struct {
		host   string
		files  map[string]string // "-" takes the file away
		change func(*Host)
		name   string
		status Status
		seen   string
		remedy string
	}{
		{host: "no KVM device", files: map[string]string{"/dev/kvm": "-"}, name: "acceleration", status: Degraded, seen: "no /dev/kvm", remedy: "modprobe"},
		{host: "KVM device without the flag", files: map[string]string{"/proc/cpuinfo": plain}, name: "acceleration", status: Degraded, seen: "emulated and can't be relied on", remedy: "nested"},
		{host: "no KVM at all", files: map[string]string{"/proc/cpuinfo": plain, "/dev/kvm": "-"}, name: "acceleration", status: Degraded, seen: "neither vmx nor svm", remedy: "firmware"},
		{host: "KVM that does not run", change: func(h *Host) { h.kvm = func() error { return errors.New("it does not come to an end") } }, name: "acceleration", status: Degraded, seen: "does not work"},
		{host: "KVM for others", change: func(h *Host) { h.kvm = func() error { return fmt.Errorf("open: %w", os.ErrPermission) } }, name: "acceleration", status: Degraded, remedy: "adduser"},
		{host: "no QEMU", files: map[string]string{"/usr/bin/qemu-system-x86_64": "-"}, name: "qemu", status: Missing, seen: "no qemu-system", remedy: "apt-get install qemu-system-x86 qemu-utils"},
		{host: "no QEMU elsewhere", files: map[string]string{"/usr/bin/qemu-system-x86_64": "-", "/etc/os-release": "ID=arch\n"}, name: "qemu", status: Missing, remedy: "what Debian calls"},
		{host: "old QEMU", files: map[string]string{"/usr/bin/qemu-system-x86_64": script("QEMU emulator version 5.2.0 (Debian 1:5.2+dfsg-11)\n")}, name: "qemu", status: Missing, seen: "5.2.0, vigia needs 7.2.0", remedy: "--qemu"},
		{host: "broken QEMU", files: map[string]string{"/usr/bin/qemu-system-x86_64": "#!/bin/sh\necho cannot open shared object >&2; exit 127\n"}, name: "qemu", status: Missing, seen: "cannot open shared object"},
		{host: "something else called QEMU", files: map[string]string{"/usr/bin/qemu-system-x86_64": "#!/bin/sh\necho hello\n"}, name: "qemu", status: Missing, seen: "does not say its version"},
		{host: "QEMU without devices", files: map[string]string{"/usr/bin/qemu-system-x86_64": strings.ReplaceAll(script(qemu72), "virtio-rng-pci", "x")}, name: "qemu devices", status: Missing, seen: "without virtio-rng-pci"},
		{host: "version 1 groups without rights", files: map[string]string{"/proc/self/cgroup": "2:memory:/\n1:cpu:/\n"}, name: "control groups", status: Degraded, seen: "none writable", remedy: "Delegate=yes"},
		{host: "half of version 2", files: map[string]string{"/sys/fs/cgroup/vigia.service/cgroup.controllers": "memory pids\n"}, name: "control groups", status: Degraded, seen: "memory (v2), pids (v2)", remedy: "Delegate=yes"},
		{host: "Ubuntu 24.04", files: map[string]string{"/etc/os-release": "ID=ubuntu\nVERSION_ID=\"24.04\"\n", "/proc/sys/kernel/apparmor_restrict_unprivileged_userns": "1\n"}, name: "user namespaces", status: Degraded, seen: "AppArmor", remedy: "apparmor_restrict_unprivileged_userns=0"},
		{host: "no user namespaces", files: map[string]string{"/proc/sys/user/max_user_namespaces": "0\n"}, name: "user namespaces", status: Degraded, seen: "is 0", remedy: "sysctl"},
		{host: "old Debian's switch", files: map[string]string{"/proc/sys/kernel/unprivileged_userns_clone": "0\n"}, name: "user namespaces", status: Degraded, remedy: "unprivileged_userns_clone=1"},
		{host: "no userfaultfd", files: map[string]string{"/dev/userfaultfd": "-"}, name: "checkpoints", status: Degraded, seen: "no /dev/userfaultfd", remedy: "6.1"},
		{host: "no tracing", files: map[string]string{"/proc/sys/kernel/yama/ptrace_scope": "1\n"}, name: "checkpoints", status: Degraded, seen: "yama 1", remedy: "ptrace_scope=0"},
		{host: "no landlock", change: func(h *Host) { h.abi = func() (int, error) { return 0, errors.New("operation not supported") } }, name: "landlock", status: Degraded, seen: "not supported", remedy: "lsm="},
		{host: "Debian 12's landlock", change: func(h *Host) { h.abi = func() (int, error) { return 2, nil } }, name: "landlock", status: Degraded, seen: "ABI 2"},
		{host: "no seccomp", files: map[string]string{"/proc/sys/kernel/seccomp/actions_avail": "-"}, name: "seccomp", status: Missing},
		{host: "little memory", files: map[string]string{"/proc/meminfo": "MemTotal: 1000000 kB\nMemAvailable: 500000 kB\n"}, name: "memory", status: Degraded, seen: "976.6 MiB"},
		{host: "no image tools", files: map[string]string{"/usr/bin/mmdebstrap": "-", "/usr/sbin/mke2fs": "-"}, name: "image tools", status: Degraded, remedy: "apt-get install mmdebstrap e2fsprogs"},
		{host: "no subordinate ids", files: map[string]string{"/etc/subuid": "someone:100000:65536\n"}, name: "subordinate ids", status: Degraded, seen: "/etc/subuid", remedy: "usermod"},
		{host: "no shared memory", files: map[string]string{"/dev/kvm": "-"}, change: func(h *Host) { h.root += "/nonexistent\x00" }, name: "shared memory", status: Missing},
		{host: "a wall less", change: func(h *Host) {
			h.Try = func(context.Context) ([]Wall, error) { return []Wall{{Name: "namespaces", Why: "refused"}}, nil }
		}, name: "confinement", status: Degraded},
		{host: "no walls", change: func(h *Host) {
			h.Try = func(context.Context) ([]Wall, error) { return nil, errors.New("neither namespaces nor landlock") }
		}, name: "confinement", status: Missing, seen: "neither"},
	} {
		t.Run(c.host, func(t *testing.T) {
			files := goodHost()
			for name, content := range c.files {
				files[name] = content
				if content == "-" {
					delete(files, name)
				}
			}
			h := newHost(t, files)
			if c.change != nil {
				c.change(h)
			}
			f := find(t, h.Inspect(t.Context()), c.name)
			if f.Status != c.status || !strings.Contains(f.Seen, c.seen) || !strings.Contains(f.Remedy, c.remedy) || f.Consequence == "" {
				t.Errorf("%+v, want %s, seen %q, remedy %q", f, c.status, c.seen, c.remedy)
			}
		})
	}
}

func TestAcceleratorNeedsFlagAndTry(t *testing.T) {
	tried := false
	for _, c := range []struct {
		cpu  string
		try  error
		want string
	}{{intel, nil, "kvm"}, {intel, errors.New("hangs"), "tcg"}, {plain, nil, "tcg"}, {"", nil, "tcg"}} {
		files := goodHost()
		files["/proc/cpuinfo"] = c.cpu
		h := newHost(t, files)
		h.kvm = func() error { tried = true; return c.try }
		if a := h.Accelerator(); a.Name != c.want || a.Why == "" {
			t.Errorf("%+v: %+v", c, a)
		}
		if c.cpu == plain && tried {
			t.Error("a device without the flag is not worth a try")
		}
		tried = false
	}
}

func TestQEMUErrorsAndCache(t *testing.T) {
	files := goodHost()
	h := newHost(t, files)
	q, err := h.QEMU(t.Context())
	if err != nil || q.Version != (Version{7, 2, 22}) || !strings.HasPrefix(q.Package, "Debian 1:7.2") {
		t.Fatalf("%+v %v", q, err)
	}
	path := filepath.Join(h.root, "/usr/bin/qemu-system-x86_64")
	st, _ := os.Stat(path)
	broken := strings.Repeat("x", int(st.Size())) // same size, same time: the answer is remembered
	os.WriteFile(path, []byte(broken), 0o755)
	os.Chtimes(path, st.ModTime(), st.ModTime())
	if _, err := h.QEMU(t.Context()); err != nil {
		t.Errorf("asked again though nothing changed: %v", err)
	}
	os.WriteFile(path, []byte(script("QEMU emulator version 6.0.0\n")), 0o755)
	if _, err := h.QEMU(t.Context()); !errors.Is(err, ErrQEMUTooOld) {
		t.Errorf("a changed file: %v", err)
	}
	os.Remove(path)
	if _, err := h.QEMU(t.Context()); !errors.Is(err, ErrQEMUMissing) || !strings.Contains(err.Error(), "apt-get install") {
		t.Errorf("%v", err)
	}
	h.Binary = "/nonexistent/qemu"
	if _, err := h.QEMU(t.Context()); !errors.Is(err, ErrQEMUMissing) || !strings.Contains(err.Error(), "/nonexistent/qemu") {
		t.Errorf("%v", err)
	}
}

func TestOutput(t *testing.T) {
	fs := Findings{{Name: "qemu", Status: OK, Seen: "7.2"}, {Name: "landlock", Status: Degraded, Seen: "ABI 2", Consequence: "less", Remedy: "more"}}
	var b bytes.Buffer
	if err := fs.Write(&b); err != nil {
		t.Fatal(err)
	}
	want := "qemu      ok        7.2\nlandlock  degraded  ABI 2\n                    → less\n                    hint: more\n"
	if b.String() != want {
		t.Errorf("%s\nwant\n%s", b.String(), want)
	}
	if fs.Worst() != Degraded || (Findings{}).Worst() != OK || append(fs, Finding{Status: Missing}).Worst() != Missing {
		t.Error("worst")
	}
	raw, _ := json.Marshal(fs[0])
	if string(raw) != `{"name":"qemu","status":"ok","seen":"7.2"}` {
		t.Errorf("%s", raw)
	}
}
