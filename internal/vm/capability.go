package vm

import (
	"fmt"
	"math/bits"
)

// capabilities are Linux's, by number (include/uapi/linux/capability.h).
var capabilities = [...]string{"chown", "dac_override", "dac_read_search", "fowner", "fsetid", "kill", "setgid", "setuid", "setpcap",
	"linux_immutable", "net_bind_service", "net_broadcast", "net_admin", "net_raw", "ipc_lock", "ipc_owner", "sys_module", "sys_rawio",
	"sys_chroot", "sys_ptrace", "sys_pacct", "sys_admin", "sys_boot", "sys_nice", "sys_resource", "sys_time", "sys_tty_config", "mknod",
	"lease", "audit_write", "audit_control", "setfcap", "mac_override", "mac_admin", "syslog", "wake_alarm", "block_suspend",
	"audit_read", "perfmon", "bpf", "checkpoint_restore"}

// CapabilityNames spells out a set of capabilities: "cap_net_raw" and so on, "all" alone where none is missing.
func CapabilityNames(set uint64) []string {
	const all = 1<<len(capabilities) - 1
	if set&all == all {
		return []string{"all"}
	}
	names := make([]string, 0, bits.OnesCount64(set))
	for ; set != 0; set &= set - 1 {
		n := bits.TrailingZeros64(set)
		if n < len(capabilities) {
			names = append(names, "cap_"+capabilities[n])
		} else {
			names = append(names, fmt.Sprintf("cap_%d", n))
		}
	}
	return names
}
