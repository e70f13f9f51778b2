package introspect

import (
	"encoding/binary"
	"fmt"

	"vigia/internal/event"
)

// CheckBPF lists the BPF programs that are loaded, and reports those that write into the memory of programs or change what
// the kernel's functions return.
func (g *Guest) CheckBPF() ([]Finding, error) { return g.look((*control).bpf) }

// bpfTypes are the types of programs by number (include/uapi/linux/bpf.h).
var bpfTypes = [...]string{"unspec", "socket_filter", "kprobe", "sched_cls", "sched_act", "tracepoint", "xdp", "perf_event",
	"cgroup_skb", "cgroup_sock", "lwt_in", "lwt_out", "lwt_xmit", "sock_ops", "sk_skb", "cgroup_device", "sk_msg",
	"raw_tracepoint", "cgroup_sock_addr", "lwt_seg6local", "lirc_mode2", "sk_reuseport", "flow_dissector", "cgroup_sysctl",
	"raw_tracepoint_writable", "cgroup_sockopt", "tracing", "struct_ops", "ext", "lsm", "sk_lookup", "syscall", "netfilter"}

const (
	maxBPFInstructions = 1 << 16 // that are searched for calls
	bpfCall            = 0x85
)

type bpfLayout struct {
	typ, aux, length, insns, function uint64
	id, name, attach                  uint64
}

func (c *control) bpf() error {
	r, l := c.resolver(), bpfLayout{}
	l.typ, l.aux, l.length = r.field("bpf_prog", "type"), r.field("bpf_prog", "aux"), r.field("bpf_prog", "len")
	l.insns, l.function = r.field("bpf_prog", "insnsi"), r.field("bpf_prog", "bpf_func")
	l.id, l.name, l.attach = r.field("bpf_prog_aux", "id"), r.field("bpf_prog_aux", "name"), r.field("bpf_prog_aux", "attach_func_name")
	head := r.field("idr", "idr_rt.xa_head")
	idr, err := c.symbolAddr("prog_idr")
	if r.err != nil || err != nil {
		return errNotBuilt
	}
	return c.array(idr+head, func(prog uint64) error {
		c.program(l, prog)
		return nil
	})
}

// program reports one BPF program. Its memory is freed under RCU: what no longer makes sense is left out.
func (c *control) program(l bpfLayout, prog uint64) {
	r := reader{s: c.space}
	typ, aux, length, function := r.u32(prog+l.typ), r.u64(prog+l.aux), r.u32(prog+l.length), r.u64(prog+l.function)
	id, attach := r.u32(aux+l.id), r.u64(aux+l.attach)
	name := make([]byte, 16)
	r.bytes(aux+l.name, name)
	if r.err != nil {
		return
	}
	subject := fmt.Sprintf("program %d %s", id, event.Text(untilNUL(name)))
	kind := fmt.Sprintf("type %d", typ)
	if int(typ) < len(bpfTypes) {
		kind = bpfTypes[typ]
	}
	detail := "a BPF program of type " + kind
	if to, err := c.space.CString(attach, 128); attach != 0 && err == nil {
		detail += " on " + event.Text(to)
	}
	f := Finding{Kind: "bpf.program", Subject: subject, Severity: Info, Detail: detail,
		Evidence: []Evidence{{Address: prog, Note: "its struct bpf_prog"}}}
	switch {
	case c.calls(prog+l.insns, length, "bpf_probe_write_user"):
		f.Severity, f.Detail = High, detail+" writes into the memory of programs"
	case c.calls(prog+l.insns, length, "bpf_override_return") || c.bit(prog, "bpf_prog", "kprobe_override"):
		f.Severity, f.Detail = High, detail+" changes what functions of the kernel return"
	}
	c.found(f)
	c.hooked("bpf.program", subject, detail, prog+l.function, function)
}

// bit reads a bit field.
func (c *control) bit(at uint64, typ, field string) bool {
	f, err := c.profile.Field(typ, field)
	if err != nil {
		return false
	}
	b, err := c.space.U8(at + f.Offset + uint64(f.BitShift/8))
	return err == nil && b>>(f.BitShift%8)&1 != 0
}

// calls says whether a program calls one of the kernel's helpers. A loaded program's calls hold how far the helper lies
// from __bpf_call_base.
func (c *control) calls(insns uint64, length uint32, helper string) bool {
	base, target := c.known("__bpf_call_base"), c.known(helper)
	if base == 0 || target == 0 {
		return false
	}
	b, err := c.table(insns, int(min(length, maxBPFInstructions))*8)
	if err != nil {
		return false
	}
	for ; len(b) > 0; b = b[8:] {
		if b[0] == bpfCall && b[1]>>4 == 0 && binary.LittleEndian.Uint32(b[4:]) == uint32(target-base) {
			return true
		}
	}
	return false
}
