package patch

import (
	"bytes"
	"encoding/binary"

	"vigia/internal/kernel"
)

// Env is what has to be known of the guest besides its code.
type Env interface {
	// U64 reads data of the guest's.
	U64(addr uint64) (uint64, bool)
	// Function reports whether addr is code that a static call may lead to: the kernel's, or a known module's.
	Function(addr uint64) bool
	// Tracer reports whether addr is the start of code that the kernel's function tracer has made.
	Tracer(addr uint64) bool
	// Own reports whether addr lies in the memory of a module, or at its end.
	Own(addr uint64) bool
	// Code reads what lies at addr, to see a thunk that the kernel has made.
	Code(addr uint64, b []byte) bool
}

// Expect computes what must stand in an object's code.
type Expect struct {
	Object Object
	Mode   *Mode
	Names  *Names
	Env    Env
	Traced int // calls of the function tracer that were seen
}

// Margin is how far a window must reach beyond what is compared: the longest site.
const Margin = 256

// Window fills out with what must stand at addr, given what stands there: got decides which of several legal forms is meant
// where the kernel changes its mind as it runs. Both have one length. Sites that lie only partly within are left as the
// file has them. It returns false where the object has nothing there.
func (x *Expect) Window(addr uint64, got, out []byte) bool {
	if !x.Object.Original(addr, out) {
		return false
	}
	first, end := FirstSite(x.Object, addr), addr+uint64(len(out))
	x.each(first, end, func(s kernel.Site) { x.early(s, out[s.Addr-addr:][:s.Len]) })
	x.each(first, end, func(s kernel.Site) {
		if s.Kind == kernel.SiteAlternative {
			x.alternatives(s, out[s.Addr-addr:][:s.Len])
		}
	})
	x.each(first, end, func(s kernel.Site) {
		off := s.Addr - addr
		x.late(s, got[off:][:s.Len], out[off:][:s.Len])
	})
	return true
}

// each calls visit with the sites that end before end.
func (x *Expect) each(first int, end uint64, visit func(s kernel.Site)) {
	for i, n := first, x.Object.NumSites(); i < n; i++ {
		s := x.Object.Site(i)
		if s.Addr >= end {
			return
		}
		if s.Len > 0 && uint64(s.Len) <= end-s.Addr {
			visit(s)
		}
	}
}

// before fills b with what stands at addr before alternatives are put in: where replacements come from.
func (x *Expect) before(addr uint64, b []byte) bool {
	if !x.Object.Original(addr, b) {
		return false
	}
	x.each(FirstSite(x.Object, addr), addr+uint64(len(b)), func(s kernel.Site) { x.early(s, b[s.Addr-addr:][:s.Len]) })
	return true
}

// early is what comes before alternatives.
func (x *Expect) early(s kernel.Site, out []byte) {
	switch s.Kind {
	case kernel.SiteParavirt:
		x.paravirt(s, out)
	case kernel.SiteRetpoline:
		retpolineAt(out, x.Mode.Retpoline, int(s.Aux))
	case kernel.SiteReturn:
		if len(out) == 5 && out[0] == opJump && branchTarget(s.Addr, out[1:], 5) == x.Names.ReturnThunk {
			x.ret(s.Addr, out)
		}
	}
}

// ret writes a return (patch_return).
func (x *Expect) ret(addr uint64, out []byte) {
	if t := x.Mode.Return; t != 0 && (t != x.Names.ITSReturn || addr&0x20 == 0) {
		branch(out, opJump, addr, t)
		return
	}
	out[0] = opRet
	for i := 1; i < len(out); i++ {
		out[i] = opInt3
	}
}

// paravirt makes an indirect call of pv_ops a direct one (paravirt_patch, Linux up to 6.6).
func (x *Expect) paravirt(s kernel.Site, out []byte) {
	target, ok := x.Env.U64(s.A)
	if !ok || len(out) < 5 {
		return
	}
	rest := 5
	switch target {
	case 0:
		branch(out, opCall, s.Addr, x.Names.ParavirtBug)
	case x.Names.ParavirtNop:
		rest = 0
	default:
		branch(out, opCall, s.Addr, target)
	}
	padNops(out[rest:])
}

// late is what comes after alternatives, at boot and as the kernel runs.
func (x *Expect) late(s kernel.Site, got, out []byte) {
	switch s.Kind {
	case kernel.SiteLock:
		if x.Mode.Up && out[0] == 0xf0 {
			out[0] = 0x3e
		}
	case kernel.SiteEndbr:
		if x.Mode.Sealed && bytes.Equal(out, endbr) {
			copy(out, seal)
		}
	case kernel.SiteJump:
		x.jump(s, got, out)
	case kernel.SiteStatic:
		x.static(s, got, out)
	case kernel.SiteFtrace:
		x.ftrace(s, got, out)
	case kernel.SitePointer:
		x.pointer(s, out)
	case kernel.SiteShift:
		if v, ok := x.Env.U64(s.A); ok {
			out[0] = byte(v)
		}
	case kernel.SiteEmpty:
		x.empty(s, got, out)
	case kernel.SiteRetpoline:
		x.itsRetpoline(s, got, out)
	}
}

// jump: a jump label is a NOP or the jump to its target.
func (x *Expect) jump(s kernel.Site, got, out []byte) {
	var jump [5]byte
	if len(out) == 2 {
		jump[0], jump[1] = opShort, byte(s.A-s.Addr-2)
	} else if len(out) == 5 {
		branch(jump[:], opJump, s.Addr, s.A)
	}
	if copy(out, nopOf(len(out))); bytes.Equal(got, jump[:len(got)]) {
		copy(out, got)
	}
}

// staticZero is "xor %eax, %eax" with prefixes: a static call of a function that only returns 0.
var staticZero = []byte{0x2e, 0x2e, 0x2e, 0x31, 0xc0}

// static: a static call calls what its key says, or does what its absence means.
func (x *Expect) static(s kernel.Site, got, out []byte) {
	target, ok := x.Env.U64(s.A)
	if !ok || target != 0 && !x.Env.Function(target) {
		return // as built: what it is now differs, and is told
	}
	tail := s.Aux&kernel.StaticTail != 0
	switch {
	case len(out) == 6: // a conditional jump
		if target == 0 {
			if target = x.Names.JccReturn; x.Mode.Return != 0 {
				target = x.Names.ReturnThunk
			}
		}
		binary.LittleEndian.PutUint32(out[2:], uint32(target-s.Addr-6))
	case len(out) != 5:
	case target != 0 && tail:
		branch(out, opJump, s.Addr, target)
	case target != 0 && target == x.Names.StaticReturn:
		copy(out, staticZero)
	case target != 0:
		branch(out, opCall, s.Addr, target)
	case !tail:
		copy(out, nops[5])
	default:
		var ret [5]byte
		x.ret(s.Addr, ret[:])
		// A trampoline that never led anywhere is as it was built.
		if s.Aux&kernel.StaticTrampoline == 0 || bytes.Equal(got, ret[:]) {
			copy(out, ret[:])
		}
	}
}

// ftrace: a function's start is a NOP, or a call of the function tracer.
func (x *Expect) ftrace(s kernel.Site, got, out []byte) {
	copy(out, nops[5])
	if len(got) != 5 || got[0] != opCall {
		return
	}
	target := branchTarget(s.Addr, got[1:], 5)
	known := x.Env.Tracer(target)
	for _, t := range x.Names.Tracers {
		known = known || t != 0 && t == target
	}
	if known {
		x.Traced++
		copy(out, got)
	}
}

// pointer: a constant is the value of its variable.
func (x *Expect) pointer(s kernel.Site, out []byte) {
	v, ok := x.Env.U64(s.A)
	if s.Aux == kernel.ConstantUnnamed || !ok {
		v = x.Mode.UserMax
	}
	if len(out) == 8 && v != 0 {
		binary.LittleEndian.PutUint64(out, v)
	}
}

// empty: a reference to an empty section leads somewhere in the module's own memory.
func (x *Expect) empty(s kernel.Site, got, out []byte) {
	v := binary.LittleEndian.Uint32(got)
	addr := uint64(int64(int32(v)))
	if len(got) == 8 {
		addr = binary.LittleEndian.Uint64(got)
	} else if s.Aux == kernel.EmptyRelative {
		addr += s.Addr + 4
	}
	if x.Env.Own(addr) {
		copy(out, got)
	}
}

// itsRetpoline: against ITS, indirect calls in the lower half of a cache line go through thunks, of the kernel's own
// image or made at run time. What such a call leads to must be nothing but the jump it stands for.
func (x *Expect) itsRetpoline(s kernel.Site, got, out []byte) {
	if x.Names.ITSReturn == 0 || len(got) < 5 || bytes.Equal(got, out) {
		return
	}
	at, op := len(got)-5, got[len(got)-5]
	if op != opCall && op != opJump || at == 1 && got[0] != 0x2e {
		return
	}
	target := branchTarget(s.Addr+uint64(at), got[at+1:], 5)
	if target&0x20 == 0 {
		return
	}
	want, reg := []byte{0xff, 0xe0 | byte(s.Aux&7), opInt3}, int(s.Aux)
	if reg >= 8 {
		want = append([]byte{0x41}, want...)
	}
	have := make([]byte, len(want))
	if x.Env.Code(target, have) && bytes.Equal(have, want) {
		copy(out, got)
	}
}
