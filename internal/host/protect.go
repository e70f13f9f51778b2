package host

import (
	"context"
	"errors"
	"io/fs"
	"os"
)

// findProtection asks whether a running machine's memory can be protected, so that a checkpoint copies it while the guest
// goes on.
func (h *Host) findProtection(context.Context) Finding {
	const device = "/dev/userfaultfd"
	const slow = "a checkpoint holds its guest while memory is copied, about 1 ms for each 2 MiB in use"
	f, err := os.OpenFile(h.at(device), os.O_RDWR, 0)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return Finding{Status: Degraded, Seen: "no " + device, Consequence: slow, Remedy: "a kernel of 6.1 or later with CONFIG_USERFAULTFD"}
	case err != nil:
		return Finding{Status: Degraded, Seen: device + " is not open to this user", Consequence: slow, Remedy: "run vigia serve as root"}
	}
	f.Close()
	if v, err := h.read("/proc/sys/kernel/yama/ptrace_scope"); err == nil && v != "0" {
		return Finding{Status: Degraded, Seen: "yama " + v + ": a process may not trace another of its own user", Consequence: slow, Remedy: "sysctl kernel.yama.ptrace_scope=0"}
	}
	return Finding{Status: OK, Seen: device + " opens"}
}
