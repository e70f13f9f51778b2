package patch

import (
	"bytes"
	"encoding/binary"

	"vigia/internal/kernel"
)

// Retpoline is what a kernel has made of its indirect calls.
type Retpoline uint8

// The ways of calling through a register.
const (
	RetpolineThunk    Retpoline = iota // as built: through a thunk
	RetpolineIndirect                  // call *reg
	RetpolineFence                     // lfence; call *reg
	retpolines
)

// Mode is what a kernel chose once, at boot, for the CPU it runs on.
type Mode struct {
	Retpoline Retpoline
	Return    uint64 // the thunk that returns jump to; 0: a plain return
	Up        bool   // LOCK prefixes are taken out: one CPU
	Sealed    bool   // ENDBR is overwritten where no pointer leads
	New       bool   // alternatives as of Linux 6.4
	Features  []byte // the CPU's, a bit each, as boot_cpu_data has them
	UserMax   uint64 // the highest user address, in the code as a constant
}

// has reports whether the CPU has a feature.
func (m *Mode) has(feature uint16) bool {
	i := int(feature / 8)
	return i < len(m.Features) && m.Features[i]&(1<<(feature%8)) != 0
}

// Names are the addresses of what the kernel's own code writers refer to; 0 where a kernel has none.
type Names struct {
	ReturnThunk  uint64   // __x86_return_thunk, which all returns go to as built
	ReturnThunks []uint64 // all that a return may jump to
	ITSReturn    uint64   // its_return_thunk: only returns in the lower half of a cache line need it
	StaticReturn uint64   // __static_call_return0
	JccReturn    uint64   // __static_call_return
	ParavirtNop  uint64   // _paravirt_nop, or nop_func
	ParavirtBug  uint64   // paravirt_BUG, or BUG_func
	ITSThunks    [16]uint64
	Tracers      []uint64 // ftrace_caller and its like
	DepthReturns []uint64 // where returns go that count the depth of calls: none of that is known here
	Preambles    uint64   // bytes of the list of functions' starts that FineIBT writes over: nor is that
}

// seal is what takes ENDBR's place.
var (
	endbr = []byte{0xf3, 0x0f, 0x1e, 0xfa}
	seal  = []byte{0x66, 0x0f, 0x1f, 0x00}
)

// sample is how many places of a sort are asked what the kernel chose.
const sample = 256

// Calibrate finds out what the kernel chose, from most of the places of each sort. read reads the guest's memory.
func Calibrate(o Object, names *Names, m *Mode, read func(addr uint64, b []byte) bool) {
	returns := map[uint64]int{}
	var retpoline [retpolines]int
	var up, sealed [2]int
	for _, s := range spread(o) {
		var got [6]byte
		if !read(s.Addr, got[:]) {
			continue
		}
		switch s.Kind {
		case kernel.SiteReturn:
			if got[0] == opJump {
				returns[branchTarget(s.Addr, got[1:], 5)]++
			} else {
				returns[0]++
			}
		case kernel.SiteRetpoline:
			for form := range retpolines {
				var want [6]byte
				if !o.Original(s.Addr, want[:s.Len]) {
					break
				}
				if retpolineAt(want[:s.Len], form, int(s.Aux)); bytes.Equal(want[:s.Len], got[:s.Len]) {
					retpoline[form]++
					break
				}
			}
		case kernel.SiteLock:
			switch got[0] {
			case 0x3e:
				up[1]++
			case 0xf0:
				up[0]++
			}
		case kernel.SiteEndbr:
			if bytes.Equal(got[:4], seal) {
				sealed[1]++
			} else {
				sealed[0]++
			}
		case kernel.SitePointer:
			if v, ok := userMax(s, read); ok && s.Aux == kernel.ConstantUnnamed && m.UserMax == 0 {
				m.UserMax = v
			}
		}
	}
	best := 0
	for target, n := range returns {
		if n > best {
			best, m.Return = n, target
		}
	}
	// Returns in the upper halves of cache lines need no thunk against ITS: there may be more of them than of the others.
	if n := returns[names.ITSReturn]; names.ITSReturn != 0 && n*4 > best {
		m.Return = names.ITSReturn
	}
	for form, n := range retpoline {
		if n > retpoline[m.Retpoline] {
			m.Retpoline = Retpoline(form)
		}
	}
	m.Up, m.Sealed = up[1] > up[0], sealed[1] > sealed[0]
}

// userMax reads the constant USER_PTR_MAX, which the kernel keeps nowhere but in its code, where it is one of the values
// it can have: the end of user space with four and five levels of tables, or half of all where addresses have tags.
func userMax(s kernel.Site, read func(addr uint64, b []byte) bool) (uint64, bool) {
	var got [8]byte
	if !read(s.Addr, got[:]) {
		return 0, false
	}
	v := binary.LittleEndian.Uint64(got[:])
	return v, v == 1<<47-4096 || v == 1<<56-4096 || v == 1<<63-4096
}

// spread returns up to some sample sites of each kind, from all over an object.
func spread(o Object) []kernel.Site {
	var count, seen [256]int
	n := o.NumSites()
	for i := range n {
		count[o.Site(i).Kind]++
	}
	var out []kernel.Site
	for i := range n {
		s := o.Site(i)
		if seen[s.Kind]%max(1, count[s.Kind]/sample) == 0 && s.Len <= 8 {
			out = append(out, s)
		}
		seen[s.Kind]++
	}
	return out
}

// retpolineAt rewrites a call, jump or conditional jump to a thunk as the kernel does (patch_retpoline).
func retpolineAt(b []byte, form Retpoline, reg int) {
	if form == RetpolineThunk || len(b) < 5 {
		return
	}
	op, at := b[0], 0
	if len(b) == 6 {
		op = b[1]
		if b[0] == 0x0f {
			b[0], b[1] = 0x70|(op&0xf)^1, byte(len(b)-2)
			op, at = opJump, 2
		}
	}
	if form == RetpolineFence {
		at += copy(b[at:], []byte{0x0f, 0xae, 0xe8})
	}
	if reg >= 8 && at < len(b) {
		b[at] = 0x41
		at++
	}
	modrm := byte(0xd0) // call
	if op == opJump {
		modrm = 0xe0
	}
	if at+2 > len(b) {
		return
	}
	b[at], b[at+1] = 0xff, modrm|byte(reg&7)
	at += 2
	if op == opJump && at < len(b) {
		b[at] = opInt3
		at++
	}
	rest := at
	for ; at < len(b); at++ {
		b[at] = opNop
	}
	copy(b[rest:], nopOf(len(b)-rest)) // the kernel optimizes what it pads with
}

// nopOf is the one NOP of n bytes.
func nopOf(n int) []byte {
	if n < 0 || n >= len(nops) {
		return nil
	}
	return nops[n]
}
