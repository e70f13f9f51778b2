package host

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/sys/unix"
)

func (h *Host) findUserNamespaces(context.Context) Finding {
	f := Finding{Status: Degraded, Consequence: "without root, processes are confined by landlock and system call filters alone"}
	if os.Geteuid() == 0 && h.root == "" {
		f.Consequence += "; as root they are not needed"
	}
	_, version := h.distribution()
	if v, err := h.read("/proc/sys/user/max_user_namespaces"); err != nil {
		f.Seen, f.Remedy = "the kernel has none", "use a distribution's kernel"
		return f
	} else if v == "0" {
		f.Seen, f.Remedy = "user.max_user_namespaces is 0", "sysctl user.max_user_namespaces=10000"
		return f
	}
	if v, err := h.read("/proc/sys/kernel/unprivileged_userns_clone"); err == nil && v == "0" {
		f.Seen, f.Remedy = "kernel.unprivileged_userns_clone is 0", "sysctl kernel.unprivileged_userns_clone=1"
		return f
	}
	if v, err := h.read("/proc/sys/kernel/apparmor_restrict_unprivileged_userns"); err == nil && v == "1" {
		f.Seen = "AppArmor takes capabilities away in them (Ubuntu " + version + ")"
		f.Remedy = "install the AppArmor profile of vigia's documentation (doc/host.md), or sysctl kernel.apparmor_restrict_unprivileged_userns=0"
		return f
	}
	return Finding{Status: OK, Seen: "allowed"}
}

func landlockABI() (int, error) {
	v, _, errno := unix.RawSyscall(unix.SYS_LANDLOCK_CREATE_RULESET, 0, 0, unix.LANDLOCK_CREATE_RULESET_VERSION)
	if errno != 0 {
		return 0, errno
	}
	return int(v), nil
}

func (h *Host) findLandlock(context.Context) Finding {
	ask := h.abi
	if ask == nil {
		ask = landlockABI
	}
	abi, err := ask()
	if err != nil {
		return Finding{Status: Degraded, Seen: fmt.Sprintf("refused: %v", err),
			Consequence: "paths are kept away by namespaces alone; where those are refused too, no machine starts",
			Remedy:      "boot a distribution's kernel 5.13 or newer with landlock in its lsm= list"}
	}
	f := Finding{Status: OK, Seen: fmt.Sprintf("ABI %d", abi)}
	if abi < 4 {
		f.Status = Degraded
		f.Consequence = "it does not restrict TCP; network namespaces and the system call filter do"
	}
	return f
}

func (h *Host) findSeccomp(context.Context) Finding {
	actions, err := h.read("/proc/sys/kernel/seccomp/actions_avail")
	if err != nil || !slices.Contains(strings.Fields(actions), "kill_process") {
		return Finding{Status: Missing, Seen: "no filters", Consequence: "no machine starts: its processes can't be confined", Remedy: "use a distribution's kernel"}
	}
	return Finding{Status: OK, Seen: "filters, with kill_process"}
}

// wanted are the controllers that limit a machine. Version 1 calls io blkio.
var wanted = []string{"cpu", "memory", "pids", "io"}

func (h *Host) findGroups(context.Context) Finding {
	versions, err := h.controllers()
	if err != nil {
		return Finding{Status: Degraded, Seen: err.Error(), Consequence: "a machine's use of the host is not limited"}
	}
	var usable, lacking []string
	for _, c := range wanted {
		if v, ok := versions[c]; ok {
			usable = append(usable, c+" ("+v+")")
		} else {
			lacking = append(lacking, c)
		}
	}
	f := Finding{Status: OK, Seen: "writable: " + strings.Join(usable, ", ")}
	if len(usable) == 0 {
		f.Seen = "none writable"
	}
	if len(lacking) > 0 {
		f.Status = Degraded
		f.Consequence = "a machine's use of " + strings.Join(lacking, ", ") + " is not limited by the host's kernel"
		f.Remedy = "run vigia as the systemd unit that comes with it, or by systemd-run --user --scope -p Delegate=yes vigia serve"
	}
	return f
}

// controllers says which can be used from here, and of which version.
func (h *Host) controllers() (map[string]string, error) {
	text, err := h.read("/proc/self/cgroup")
	if err != nil {
		return nil, err
	}
	found := map[string]string{}
	for line := range strings.Lines(text) {
		parts := strings.SplitN(strings.TrimSpace(line), ":", 3)
		if len(parts) != 3 {
			continue
		}
		if parts[1] == "" {
			h.unifiedControllers(parts[2], found)
			continue
		}
		for c := range strings.SplitSeq(parts[1], ",") {
			if h.mayMake(filepath.Join("/sys/fs/cgroup", c, parts[2])) {
				found[strings.Replace(c, "blkio", "io", 1)] = "v1"
			}
		}
	}
	return found, nil
}

func (h *Host) unifiedControllers(path string, found map[string]string) {
	for _, mount := range []string{"/sys/fs/cgroup", "/sys/fs/cgroup/unified"} {
		dir := filepath.Join(mount, path)
		list, err := h.read(filepath.Join(dir, "cgroup.controllers"))
		if err != nil {
			continue
		}
		if h.mayMake(dir) {
			for _, c := range strings.Fields(list) {
				found[c] = "v2"
			}
		}
		return
	}
}

// mayMake says whether groups can be made in a directory of the host.
func (h *Host) mayMake(dir string) bool { return unix.Access(h.at(dir), unix.W_OK) == nil }

func (h *Host) findConfinement(ctx context.Context) Finding {
	if h.Try == nil {
		return Finding{Status: Degraded, Seen: "not tried"}
	}
	walls, err := h.Try(ctx)
	if err != nil {
		return Finding{Status: Missing, Seen: err.Error(), Consequence: "no machine starts", Remedy: "see the findings above"}
	}
	var stand, lack []string
	for _, w := range walls {
		if w.InForce {
			stand = append(stand, w.Name)
		} else {
			lack = append(lack, w.Name+" ("+w.Why+")")
		}
	}
	f := Finding{Status: OK, Seen: "tried, in force: " + strings.Join(stand, ", ")}
	if len(lack) > 0 {
		f.Status = Degraded
		f.Consequence = "not in force: " + strings.Join(lack, "; ")
	}
	return f
}

func (h *Host) findPtrace(context.Context) Finding {
	v, err := h.read("/proc/sys/kernel/yama/ptrace_scope")
	switch {
	case err != nil:
		return Finding{Status: OK, Seen: "no yama: the kernel's own rules"}
	case v == "2" && os.Geteuid() != 0:
		return Finding{Status: Degraded, Seen: "yama 2: for administrators only", Consequence: "the memory of clones can't be read without root", Remedy: "sysctl kernel.yama.ptrace_scope=1"}
	case v == "3":
		return Finding{Status: Degraded, Seen: "yama 3: for nobody until the next boot", Consequence: "the memory of clones can't be read", Remedy: "boot with kernel.yama.ptrace_scope=1"}
	}
	return Finding{Status: OK, Seen: "yama " + v}
}
