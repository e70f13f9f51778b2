package jail

import (
	"encoding/binary"
	"os"
	"testing"

	"golang.org/x/net/bpf"
	"golang.org/x/sys/unix"
)

// call is what the kernel shows a filter.
type call struct {
	nr, arch uint32
	args     [6]uint64
}

// decide runs a program over a call. The interpreter of x/net/bpf loads big-endian words, as of packets, so the words
// are laid out that way; the low half of an argument is where a little-endian kernel has it.
func decide(t testing.TB, prog []bpf.RawInstruction, c call) Action {
	t.Helper()
	code, ok := bpf.Disassemble(prog)
	if !ok {
		t.Fatal("the program does not disassemble")
	}
	vm, err := bpf.NewVM(code)
	if err != nil {
		t.Fatal(err)
	}
	data := make([]byte, 64)
	binary.BigEndian.PutUint32(data[0:], c.nr)
	binary.BigEndian.PutUint32(data[4:], c.arch)
	for i, a := range c.args {
		binary.BigEndian.PutUint32(data[16+8*i:], uint32(a))
		binary.BigEndian.PutUint32(data[20+8*i:], uint32(a>>32))
	}
	n, err := vm.Run(data)
	if err != nil {
		t.Fatal(err)
	}
	return Action(uint32(n))
}

// meant says, straight from the table, what a call should meet.
func meant(rules []Rule, otherwise Action, c call) Action {
	if c.arch != unix.AUDIT_ARCH_X86_64 || c.nr >= x32Bit {
		return Kill
	}
	for _, r := range rules {
		if r.Call == c.nr && r.fulfilled(c) {
			return r.Do
		}
	}
	return otherwise
}

func (r Rule) fulfilled(c call) bool {
	for _, a := range r.When {
		got, found := uint32(c.args[a.Index]), false
		if a.Mask != 0 {
			got &= a.Mask
		}
		for _, v := range a.OneOf {
			if v == ownPID {
				v = uint32(os.Getpid())
			}
			found = found || v == got
		}
		if found == a.Unless {
			return false
		}
	}
	return true
}

// Each call of each table, with the arguments its rules are about and with others, meets what the table says.
func TestFilterIsTheTable(t *testing.T) {
	for name, p := range Profiles {
		prog, err := Compile(p.Syscalls, p.Otherwise)
		if err != nil {
			t.Fatal(err)
		}
		t.Logf("%s: %d instructions", name, len(prog))
		for nr := range uint32(480) {
			for _, args := range interesting(p.Syscalls, nr) {
				c := call{nr, unix.AUDIT_ARCH_X86_64, args}
				if got, want := decide(t, prog, c), meant(p.Syscalls, p.Otherwise, c); got != want {
					t.Errorf("%s: %+v is %s, the table says %s", name, c, got, want)
				}
			}
		}
	}
}

// interesting are arguments at and beside every value that a call's rules name.
func interesting(rules []Rule, nr uint32) [][6]uint64 {
	all := [][6]uint64{{}, {1, 2, 3, 4, 5, 6}, {^uint64(0), ^uint64(0), ^uint64(0), ^uint64(0), ^uint64(0), ^uint64(0)}}
	for _, r := range rules {
		if r.Call != nr {
			continue
		}
		for _, a := range r.When {
			for _, v := range a.OneOf {
				for _, base := range all[:3:3] {
					for _, near := range []uint64{uint64(v), uint64(v) + 1, uint64(v) | 1<<32, uint64(os.Getpid())} {
						args := base
						args[a.Index] = near
						all = append(all, args)
					}
				}
			}
		}
	}
	return all
}

func TestTablesGiveReasons(t *testing.T) {
	for name, p := range Profiles {
		if p.Name != name {
			t.Errorf("profile %s calls itself %s", name, p.Name)
		}
		for _, r := range p.Syscalls {
			if r.Name == "" || r.Reason == "" {
				t.Errorf("%s: call %d (%s) has no reason", name, r.Call, r.Name)
			}
		}
		for _, r := range p.Rlimits {
			if r.Reason == "" || limitNames[r.Name] == "" {
				t.Errorf("%s: limit %s has no reason, or no name in /proc", name, r.Name)
			}
		}
		for _, n := range p.Namespaces {
			if n.Reason == "" {
				t.Errorf("%s: namespace %s has no reason", name, n.Name)
			}
		}
	}
	if Guard.Otherwise == Allow || Gate.Otherwise == Allow || GateAlone.Otherwise == Allow || Convert.Otherwise == Allow {
		t.Error("a worker's table allows what it does not name")
	}
}

// The zero rule does not allow.
func TestZeroRuleKills(t *testing.T) {
	prog, err := Compile([]Rule{{Call: unix.SYS_OPENAT}}, Refuse)
	if err != nil {
		t.Fatal(err)
	}
	if got := decide(t, prog, call{nr: unix.SYS_OPENAT, arch: unix.AUDIT_ARCH_X86_64}); got == Allow {
		t.Errorf("the zero rule is %s", got)
	}
}

// Any table compiles to a program that decides as it reads, or is refused.
func FuzzCompile(f *testing.F) {
	f.Add([]byte{1, 0, 0, 1, 3}, uint32(1), uint64(3))
	f.Add([]byte{9, 2, 4, 1, 0, 56, 0, 0, 2, 7, 8}, uint32(9), uint64(4))
	f.Fuzz(func(t *testing.T, table []byte, nr uint32, arg uint64) {
		rules := tableOf(table)
		prog, err := Compile(rules, Refuse)
		if err != nil {
			return
		}
		c := call{nr, unix.AUDIT_ARCH_X86_64, [6]uint64{arg, arg + 1, arg ^ 0xff, 0, arg, 1}}
		if got, want := decide(t, prog, c), meant(rules, Refuse, c); got != want {
			t.Errorf("%+v: %s, want %s", rules, got, want)
		}
	})
}

// tableOf reads bytes as rules: call, argument, mask, how many values, values.
func tableOf(b []byte) []Rule {
	var rules []Rule
	for len(b) >= 4 && len(rules) < 50 {
		r := Rule{Call: uint32(b[0]), Name: "fuzz", Do: Allow}
		a := Arg{Index: int(b[1] % 8), Mask: uint32(b[2]), Unless: b[3]&0x80 != 0}
		n := min(int(b[3]&0x7f), len(b)-4)
		for _, v := range b[4 : 4+n] {
			a.OneOf = append(a.OneOf, uint32(v))
		}
		if b[1]&0x80 == 0 {
			r.When = []Arg{a, {Index: 5, OneOf: []uint32{1, 2}}}
		}
		rules, b = append(rules, r), b[4+n:]
	}
	return rules
}
