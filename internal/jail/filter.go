package jail

import (
	"fmt"
	"os"
	"unsafe"

	"golang.org/x/net/bpf"
	"golang.org/x/sys/unix"
)

// Action is what happens to a system call.
type Action uint32

// The actions. Refuse is EPERM: the caller lives and its logs tell. Absent is ENOSYS, for calls whose callers know an
// older way. Kill ends the process: for calls that no honest path makes and whose first try is already an attack.
const (
	Allow  Action = unix.SECCOMP_RET_ALLOW
	Refuse Action = unix.SECCOMP_RET_ERRNO | Action(unix.EPERM)
	Absent Action = unix.SECCOMP_RET_ERRNO | Action(unix.ENOSYS)
	Kill   Action = unix.SECCOMP_RET_KILL_PROCESS
)

func (a Action) String() string {
	switch a {
	case Allow:
		return "allow"
	case Refuse:
		return "refuse"
	case Absent:
		return "absent"
	case Kill:
		return "kill"
	}
	return fmt.Sprintf("action %#x", uint32(a))
}

// Rule is what happens to one system call whose arguments fulfil all of When.
type Rule struct {
	Call   uint32
	Name   string
	Do     Action
	When   []Arg
	Reason string
}

// Arg is a condition on the low 32 bits of one argument: masked, it is one of the values. Arguments of every call
// constrained here are C ints or flag words whose high half the kernel ignores, so the low half decides.
type Arg struct {
	Index  int
	Mask   uint32 // 0 is all bits
	OneOf  []uint32
	Unless bool // the condition is that it is none of the values
}

const (
	offsetCall = 0 // struct seccomp_data: nr, arch, instruction_pointer, args[6]
	offsetArch = 4
	offsetArgs = 16
	x32Bit     = 0x40000000
)

// ownPID in a condition stands for the process's own pid, known when the filter is loaded.
const ownPID = 0xffff_ffff

// Compile turns rules into a seccomp program. Calls of another architecture, and of x32, end the process.
func Compile(rules []Rule, otherwise Action) ([]bpf.RawInstruction, error) {
	prog := []bpf.Instruction{
		bpf.LoadAbsolute{Off: offsetArch, Size: 4},
		bpf.JumpIf{Cond: bpf.JumpEqual, Val: unix.AUDIT_ARCH_X86_64, SkipTrue: 1},
		bpf.RetConstant{Val: uint32(Kill)},
		bpf.LoadAbsolute{Off: offsetCall, Size: 4},
		bpf.JumpIf{Cond: bpf.JumpLessThan, Val: x32Bit, SkipTrue: 1},
		bpf.RetConstant{Val: uint32(Kill)},
	}
	for _, r := range rules {
		block, err := r.compile()
		if err != nil {
			return nil, err
		}
		prog = append(prog, block...)
	}
	prog = append(prog, bpf.RetConstant{Val: uint32(otherwise)})
	return bpf.Assemble(prog)
}

// compile makes the block of one rule: entered and left with the call number in A.
func (r Rule) compile() ([]bpf.Instruction, error) {
	var checks []bpf.Instruction
	for i := len(r.When) - 1; i >= 0; i-- { // from the end: a failed check skips all that follows
		c, err := r.When[i].compile(len(checks) + 1)
		if err != nil {
			return nil, fmt.Errorf("rule for %s: %w", r.Name, err)
		}
		checks = append(c, checks...)
	}
	body := append(checks, bpf.RetConstant{Val: uint32(r.Do)})
	if len(r.When) > 0 { // the checks have overwritten A
		body = append(body, bpf.LoadAbsolute{Off: offsetCall, Size: 4})
	}
	if len(body) > 255 {
		return nil, fmt.Errorf("rule for %s is too long", r.Name)
	}
	return append([]bpf.Instruction{bpf.JumpIf{Cond: bpf.JumpEqual, Val: r.Call, SkipFalse: uint8(len(body))}}, body...), nil
}

// compile makes the check of one argument; a failed one skips the rest instructions that follow it.
func (a Arg) compile(rest int) ([]bpf.Instruction, error) {
	if a.Index < 0 || a.Index > 5 || len(a.OneOf) == 0 || len(a.OneOf)+rest > 250 {
		return nil, fmt.Errorf("bad condition on argument %d", a.Index)
	}
	code := []bpf.Instruction{bpf.LoadAbsolute{Off: uint32(offsetArgs + 8*a.Index), Size: 4}}
	if a.Mask != 0 {
		code = append(code, bpf.ALUOpConstant{Op: bpf.ALUOpAnd, Val: a.Mask})
	}
	for i, v := range a.OneOf {
		if v == ownPID {
			v = uint32(os.Getpid())
		}
		left := len(a.OneOf) - 1 - i // comparisons after this one
		j := bpf.JumpIf{Cond: bpf.JumpEqual, Val: v}
		switch {
		case a.Unless:
			j.SkipTrue = uint8(left + rest)
		case left == 0:
			j.SkipFalse = uint8(rest)
		default:
			j.SkipTrue = uint8(left)
		}
		code = append(code, j)
	}
	return code, nil
}

// load puts a filter on the calling thread, or on all threads of the process. It needs no_new_privs.
func load(rules []Rule, otherwise Action, all bool) error {
	prog, err := Compile(rules, otherwise)
	if err != nil {
		return err
	}
	filter := make([]unix.SockFilter, len(prog))
	for i, p := range prog {
		filter[i] = unix.SockFilter{Code: p.Op, Jt: p.Jt, Jf: p.Jf, K: p.K}
	}
	fprog := unix.SockFprog{Len: uint16(len(filter)), Filter: &filter[0]}
	flags := uintptr(0)
	if all {
		flags = unix.SECCOMP_FILTER_FLAG_TSYNC
	}
	tid, _, errno := unix.RawSyscall(unix.SYS_SECCOMP, unix.SECCOMP_SET_MODE_FILTER, flags, uintptr(unsafe.Pointer(&fprog)))
	if errno != 0 {
		return errno
	}
	if tid != 0 {
		return fmt.Errorf("thread %d could not take the filter", tid)
	}
	return nil
}
