package introspect

import (
	"encoding/binary"
	"errors"
	"math/rand/v2"
	"strings"
	"testing"

	"vigia/internal/kernel"
)

func onControlRecordings(t *testing.T, test func(t *testing.T, r *recorded, p *kernel.Profile)) {
	for _, name := range controlRecordings {
		t.Run(strings.TrimSuffix(name, ".ram.xz"), func(t *testing.T) {
			r, p := load(t, name)
			test(t, r, p)
		})
	}
}

func TestControlOfHealthyGuests(t *testing.T) {
	onControlRecordings(t, func(t *testing.T, r *recorded, p *kernel.Profile) {
		g := attach(t, r, p)
		names, looks := recordedControls()
		for i, look := range looks {
			found, looked, err := g.control(look)
			if err != nil {
				t.Errorf("%s: %v", names[i], err)
			}
			for _, f := range found {
				if f.Serious() {
					t.Errorf("%s: %+v", names[i], f)
				}
			}
			t.Logf("%s: followed %d, listed %d", names[i], looked, len(found))
		}
	})
}

// target is a place in a guest's memory that a tampering writes to.
type target struct {
	*control
	t *testing.T
	r *recorded
}

func (x *target) symbol(name string) uint64 {
	x.t.Helper()
	at, err := x.symbolAddr(name)
	if err != nil {
		x.t.Fatal(err)
	}
	return at
}

func (x *target) field(typ, name string) uint64 {
	x.t.Helper()
	off, err := x.profile.Offset(typ, name)
	if err != nil {
		x.t.Fatal(err)
	}
	return off
}

func (x *target) read(at uint64) uint64 {
	x.t.Helper()
	v, err := x.space.U64(at)
	if err != nil {
		x.t.Fatal(err)
	}
	return v
}

func (x *target) write(at uint64, v uint64) {
	x.t.Helper()
	var b [8]byte
	binary.LittleEndian.PutUint64(b[:], v)
	for i := range b {
		pa, err := x.space.Translate(at + uint64(i))
		if err != nil {
			x.t.Fatal(err)
		}
		line := x.r.lines[pa&^(lineSize-1)]
		if line == nil {
			line = new([lineSize]byte)
			x.r.lines[pa&^(lineSize-1)] = line
		}
		line[pa%lineSize] = b[i]
	}
}

// first is the first element of a list, as the struct that holds its node.
func (x *target) first(head, node uint64) uint64 { return x.read(head) - node }

// tamperings are written into the memory of healthy guests; nowhere is memory of no code.
var tamperings = []struct {
	name, kind, what string
	severity         Severity
	do               func(x *target, nowhere uint64)
}{
	{"gate", "idt.changed", "vector 14", Critical, func(x *target, nowhere uint64) {
		at := x.symbol("idt_table") + 14*gateSize
		low := x.read(at) &^ 0xffff00000000ffff
		x.write(at, low|nowhere&0xffff|nowhere>>16&0xffff<<48)
		x.write(at+8, nowhere>>32)
	}},
	{"gate for programs", "idt.changed", "vector 13", High, func(x *target, _ uint64) {
		at := x.symbol("idt_table") + 13*gateSize
		x.write(at, x.read(at)|3<<45)
	}},
	{"swapped gates", "idt.changed", "vector 6", Critical, func(x *target, _ uint64) {
		at := x.symbol("idt_table")
		x.write(at+6*gateSize, x.read(at+7*gateSize))
	}},
	{"another table", "idt.changed", "idt_descr", Critical, func(x *target, nowhere uint64) { x.write(x.symbol("idt_descr")+2, nowhere) }},
	{"call gate", "idt.changed", "entry 13", Critical, func(x *target, _ uint64) {
		page, _ := x.profile.Symbol("gdt_page")
		x.write(page+x.read(x.symbol("__per_cpu_offset"))+13*8, 0xec<<40)
	}},
	{"system call", "syscall.hooked", "[217]", Critical, func(x *target, nowhere uint64) { x.write(x.symbol("sys_call_table")+217*8, nowhere) }},
	{"system call to another function", "syscall.hooked", "[39]", Critical, func(x *target, _ uint64) {
		x.write(x.symbol("sys_call_table")+39*8, x.read(x.symbol("idt_descr"))&0xff+x.symbol("_text")) // of the kernel, but no call
	}},
	{"notifier", "notifier.hook", "reboot_notifier_list", Critical, func(x *target, nowhere uint64) {
		block := x.read(x.symbol("reboot_notifier_list") + x.field("blocking_notifier_head", "head"))
		x.write(block+x.field("notifier_block", "notifier_call"), nowhere)
	}},
	{"netfilter", "netfilter.hook", "ipv4 postrouting", Critical, func(x *target, nowhere uint64) {
		net := x.first(x.symbol("net_namespace_list"), x.field("net", "list"))
		entries := x.read(net + x.field("net", "nf.hooks_ipv4") + 4*8)
		x.write(entries+x.field("nf_hook_entries", "hooks")+x.field("nf_hook_entry", "hook"), nowhere)
	}},
	{"protocol", "operations.changed", "inet_protos[6]", Critical, func(x *target, nowhere uint64) {
		x.write(x.symbol("inet_protos")+6*8, nowhere)
	}},
	{"into the middle of a function", "operations.changed", "/proc/net/tcp", High, func(x *target, _ uint64) {
		at := x.symbol("tcp4_seq_ops") + x.field("seq_operations", "show")
		x.write(at, x.read(at)+7)
	}},
	{"a table of the kernel's that is not its own", "operations.changed", "/proc/modules is served by kallsyms_proc_ops", Critical, func(x *target, _ uint64) {
		x.proc("modules", func(entry uint64) {
			x.write(entry+x.field("proc_dir_entry", "proc_ops"), x.symbol("kallsyms_proc_ops"))
		})
	}},
	{"terminal", "operations.changed", "n_tty_ops", Critical, func(x *target, nowhere uint64) {
		x.write(x.symbol("n_tty_ops")+x.field("tty_ldisc_ops", "receive_buf2"), x.symbol("_sinittext")) // which is something else by now
	}},
	{"program format", "operations.changed", "a binary format", Critical, func(x *target, nowhere uint64) {
		head, _ := x.listHead("formats")
		x.write(x.first(head, x.field("linux_binfmt", "lh"))+x.field("linux_binfmt", "load_binary"), nowhere)
	}},
	{"helper", "helper.changed", "/tmp/x", High, func(x *target, _ uint64) {
		x.write(x.symbol("modprobe_path"), 0x782f706d742f) // "/tmp/x"
	}},
	{"list", KindListBroken, "network", Medium, func(x *target, nowhere uint64) { x.write(x.symbol("net_namespace_list"), nowhere) }},
}

// proc finds a file below /proc by name.
func (x *target) proc(name string, visit func(entry uint64)) {
	x.t.Helper()
	node := x.field("proc_dir_entry", "subdir_node")
	_ = x.tree(x.symbol("proc_root")+x.field("proc_dir_entry", "subdir"), func(n uint64) error {
		b, err := x.space.CString(x.read(n-node+x.field("proc_dir_entry", "name")), 32)
		if err == nil && string(b) == name {
			visit(n - node)
		}
		return nil
	})
}

func TestControlFindsWhatIsTampered(t *testing.T) {
	onControlRecordings(t, func(t *testing.T, r *recorded, p *kernel.Profile) {
		_, looks := recordedControls()
		for _, k := range tamperings {
			t.Run(k.name, func(t *testing.T) {
				r := r.clone()
				g := attach(t, r, p)
				x := &target{&control{Guest: g}, t, r}
				// What the kernel has in its own direct mapping: memory, and no code.
				k.do(x, x.read(x.symbol("net_namespace_list"))&^0xfff+0x123)
				g.space.Flush()
				c := NewChecker(g, nil)
				names, _ := recordedControls()
				var found []Finding
				for i, look := range looks {
					res, err := c.control(names[i], look)
					if err != nil {
						t.Fatal(err)
					}
					found = append(found, res.Findings...)
				}
				for _, f := range found {
					if f.Kind == k.kind && f.Severity == k.severity && strings.Contains(f.Subject+" "+f.Detail, k.what) {
						return
					}
				}
				t.Errorf("not found: %+v", found)
			})
		}
	})
}

// TestControlOfFlippedBits: whatever memory says, the checks end soon, and without a panic.
func TestControlOfFlippedBits(t *testing.T) {
	rounds := 60
	if testing.Short() {
		rounds = 10
	}
	onControlRecordings(t, func(t *testing.T, r *recorded, p *kernel.Profile) {
		g, addrs := attach(t, r, p), r.sorted()
		names, looks := recordedControls()
		rng := rand.New(rand.NewPCG(3, 4))
		for range rounds {
			bits := make([]uint64, 1+rng.IntN(40))
			for i := range bits {
				bits[i] = rng.Uint64()
				r.flip(addrs, bits[i])
			}
			for i, look := range looks {
				r.reads = 0
				_, err := g.look(look)
				if err != nil && !errors.Is(err, ErrTorn) && !errors.Is(err, ErrNotReady) && !errors.Is(err, ErrEndless) && !errors.Is(err, kernel.ErrUnsupported) {
					t.Errorf("%s: %v", names[i], err)
				}
				if r.reads > 2_000_000 {
					t.Errorf("%s: %d reads", names[i], r.reads)
				}
			}
			for _, n := range bits {
				r.flip(addrs, n)
			}
		}
	})
}

// FuzzControl writes 8 bytes at two recorded places.
func FuzzControl(f *testing.F) {
	f.Add(uint8(0), uint64(77), uint64(0), uint64(12345), uint64(1))
	f.Add(uint8(1), uint64(5000), ^uint64(0), uint64(9), uint64(0xffff888000000000))
	type base struct {
		r     *recorded
		p     *kernel.Profile
		addrs []uint64
	}
	var bases []base
	for _, name := range controlRecordings {
		r, p := load(f, name)
		bases = append(bases, base{r, p, r.sorted()})
	}
	_, looks := recordedControls()
	f.Fuzz(func(t *testing.T, which uint8, at1, v1, at2, v2 uint64) {
		b := bases[int(which)%len(bases)]
		r := b.r.clone()
		g, err := Attach(r, b.p)
		if err != nil {
			t.Fatal(err)
		}
		place := func(n uint64) uint64 { return b.addrs[n/8%uint64(len(b.addrs))] + n%8*8 }
		r.put(place(at1), v1)
		r.put(place(at2), v2)
		for _, look := range looks {
			if _, err := g.look(look); err != nil && !errors.Is(err, ErrTorn) && !errors.Is(err, ErrNotReady) && !errors.Is(err, ErrEndless) && !errors.Is(err, kernel.ErrUnsupported) {
				t.Error(err)
			}
		}
	})
}

// registersText is what QEMU prints of one CPU, of a 6.1 kernel, without what is not read.
const registersText = `
CPU#0
RAX=0000000000000000 RBX=0000000000000000 RCX=0000000000000001 RDX=4000000000000000
LDT=0000 0000000000000000 00000000 00008200 DPL=0 LDT
TR =0040 fffffe0000003000 00004087 00008b00 DPL=0 TSS64-busy
GDT=     fffffe0000001000 0000007f
IDT=     fffffe0000000000 00000fff
CR0=80050033 CR2=0000558c6ef9bd28 CR3=0000000002c1e000 CR4=00350ef0
DR0=0000000000000000 DR1=0000000000000000 DR2=0000000000000000 DR3=0000000000000000 
DR6=00000000ffff0ff0 DR7=0000000000000400
EFER=0000000000000d01
`

func TestRegisters(t *testing.T) {
	list, err := parseRegisters(registersText)
	if err != nil || len(list) != 1 {
		t.Fatal(list, err)
	}
	want := registers{idt: 0xfffffe0000000000, gdt: 0xfffffe0000001000, cr0: 0x80050033, cr4: 0x350ef0, dr7: 0x400}
	if list[0] != want {
		t.Errorf("%+v", list[0])
	}
	onControlRecordings(t, func(t *testing.T, r *recorded, p *kernel.Profile) {
		g := attach(t, r, p)
		for _, k := range []struct{ from, to, what string }{
			{"", "", ""},
			{"IDT=     fffffe0000000000", "IDT=     ffffffffc0001000", "IDTR of CPU 0"},
			{"CR0=80050033", "CR0=80040033", "CR0 of CPU 0"},
			{"DR0=0000000000000000", "DR0=ffffffff81000000", "DR0 of CPU 0"},
		} {
			text := strings.Replace(registersText, k.from, k.to, 1)
			if k.what == "DR0 of CPU 0" {
				text = strings.Replace(text, "DR7=0000000000000400", "DR7=0000000000000402", 1)
			}
			found, err := g.CheckRegisters(text)
			if err != nil {
				t.Fatal(err)
			}
			got := ""
			for _, f := range found {
				if f.Subject != "GDTR of CPU 0" { // each kernel's is where it is
					got += f.Subject
				}
			}
			if got != k.what {
				t.Errorf("%q → %q: %+v", k.from, k.to, found)
			}
		}
	})
}

func FuzzRegisters(f *testing.F) {
	f.Add(registersText)
	f.Add("CPU#0\nIDT= x")
	f.Fuzz(func(t *testing.T, text string) {
		list, err := parseRegisters(text)
		if (err == nil) == (len(list) == 0) || len(list) > maxCPUs {
			t.Error(len(list), err)
		}
	})
}
