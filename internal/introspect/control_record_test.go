package introspect

import (
	"encoding/binary"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"vigia/internal/kernel"
)

// Recordings for the checks of control flow are made of saved memory (saved_test.go), by TestRecordControl. What is read in
// bulk is left out: a kernel's records of its traceable functions, its inodes, all of its data.
var controlRecordings = []string{"control-6.1.ram.xz", "control-6.12.ram.xz"}

var notInControl = []string{"ftrace", "tracepoints", "inodes", "pointers"}

func recordedControls() (names []string, looks []func(*control) error) {
	for _, k := range controls {
		if !slices.Contains(notInControl, k.name) {
			names, looks = append(names, k.name), append(looks, k.look)
		}
	}
	return names, looks
}

var controlSymbols = append([]string{"_end", "_sdata", "_sinittext", "_einittext", "__init_begin", "__init_end",
	"idt_table", "idt_descr", "gdt_page", "early_idt_handler_array", "irq_entries_start", "spurious_entries_start",
	"__per_cpu_offset", "nr_cpu_ids", "sys_call_table", "kprobe_table", "uprobes_tree", "prog_idr", "bpf_kallsyms",
	"ftrace_ops_trampoline_list", "kprobe_insn_slots", "kprobe_optinsn_slots", "security_hook_heads", "static_calls_table",
	"net_namespace_list", "ptype_all", "ptype_base", "net_hotdata", "inet_protos", "inet6_protos", "modprobe_path", "core_pattern",
	"poweroff_cmd", "proc_root", "super_blocks", "socket_file_ops", "tty_drivers", "tty_ldiscs", "formats", "input_handler_list",
	"timer_bases", "hrtimer_bases", "bp_per_reg", "delayed_work_timer_fn", "cr4_pinned_bits", "NR_BASES", "MOD_TEXT", "MOD_INIT_TEXT",
	"aggr_pre_handler", "pre_handler_kretprobe", "asm_exc_overflow", "__x64_sys_getdents64", "__x64_sys_getpid"}, recordedSymbols...)

var controlTypes = append([]string{"module", "module_memory", "mod_kallsyms", "bpf_ksym", "ftrace_ops", "kprobe_insn_cache", "kprobe_insn_page",
	"kprobe", "kretprobe", "uprobe", "uprobe_consumer", "idr", "xa_node", "bpf_prog", "bpf_prog_aux", "net", "net_device", "net_device_ops",
	"nf_hook_entries", "nf_hook_entry", "packet_type", "net_hotdata", "net_protocol", "security_hook_heads", "security_hook_list",
	"lsm_static_calls_table", "lsm_static_call", "static_call_key", "atomic_notifier_head", "blocking_notifier_head", "raw_notifier_head",
	"notifier_block", "proc_dir_entry", "proc_ops", "file_operations", "seq_operations", "inode_operations", "dentry_operations",
	"super_block", "file_system_type", "proto", "proto_ops", "tty_driver", "tty_struct", "tty_ldisc", "tty_operations", "tty_ldisc_ops",
	"linux_binfmt", "input_handler", "timer_base", "timer_list", "delayed_work", "work_struct", "hrtimer", "hrtimer_cpu_base",
	"hrtimer_clock_base", "perf_event", "kthread", "nsproxy", "mnt_namespace"}, recordedTypes...)

// TestRecordControl makes the recordings in VIGIA_RECORD_CONTROL, of guests in VIGIA_TEST_SAVED.
func TestRecordControl(t *testing.T) {
	out := os.Getenv("VIGIA_RECORD_CONTROL")
	if out == "" {
		t.Skip("VIGIA_RECORD_CONTROL names no directory to record to")
	}
	for name, from := range map[string]string{controlRecordings[0]: "cloud-4cpu.ram", controlRecordings[1]: "612-2cpu.ram"} {
		full, mem := openSavedWith(t, filepath.Join(os.Getenv("VIGIA_TEST_SAVED"), from))
		r := &recorder{RAM: mem, lines: make(map[uint64][]byte)}
		g := attach(t, r, full)
		_, looks := recordedControls()
		for _, look := range looks {
			if _, err := g.look(look); err != nil {
				t.Fatal(err)
			}
		}
		banner := make([]byte, len(full.Banner()))
		_ = r.ReadPhys(g.boot.Phys+g.link.banner-g.link.text, banner)
		symbols := append(pointedAt(r, full, g.boot.Slide), controlSymbols...)
		slices.Sort(symbols)
		p, err := full.Reduce(slices.Compact(symbols), controlTypes)
		if err != nil {
			t.Fatal(err)
		}
		writeRecording(t, filepath.Join(out, strings.TrimSuffix(name, ".xz")+".gz"), p, r) // then gunzip, xz -9e
	}
}

// pointedAt names the symbols that anything recorded points to, and the kernel's notifier chains.
func pointedAt(r *recorder, p *kernel.Profile, slide uint64) (names []string) {
	seen := map[string]bool{}
	add := func(v uint64) {
		for _, s := range p.SymbolsAt(v - slide) {
			if !seen[s.Name] {
				seen[s.Name], names = true, append(names, s.Name)
			}
		}
	}
	for _, line := range r.lines {
		for i := 0; i < lineSize; i += 8 {
			add(binary.LittleEndian.Uint64(line[i:]))
			if i%16 == 0 { // a gate holds it in three parts
				le := binary.LittleEndian
				add(uint64(le.Uint16(line[i:])) | uint64(le.Uint16(line[i+6:]))<<16 | uint64(le.Uint32(line[i+8:]))<<32)
			}
		}
	}
	for _, chain := range chains {
		names = append(names, chain.name)
	}
	return names
}
