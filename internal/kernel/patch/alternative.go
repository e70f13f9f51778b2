package patch

import (
	"encoding/binary"

	"vigia/internal/kernel"
)

// alternatives puts in what the kernel would, at a site of one or several entries. out are the bytes of the site, as all that
// is done before alternatives has left them.
func (x *Expect) alternatives(s kernel.Site, out []byte) {
	list := x.Object.Alternatives(s.A, int(s.Aux))
	for i := range list {
		a := &list[i]
		if x.Mode.New { // nested entries have the length of the longest
			for j := i + 1; j < len(list) && list[j].Addr == a.Addr; j++ {
				n := max(a.Len, list[j].Len)
				a.Len, list[j].Len = n, n
			}
		}
		off := a.Addr - s.Addr
		if off > uint64(len(out)) || uint64(a.Len) > uint64(len(out))-off || a.ReplacementLen > a.Len {
			continue
		}
		at := out[off : off+uint64(a.Len)]
		if x.Mode.has(a.Feature) == a.Not {
			if x.Mode.New {
				optimize(at)
			} else {
				optimizeOld(at)
			}
			continue
		}
		x.replace(a, at)
	}
}

// replace puts one alternative in (apply_alternatives).
func (x *Expect) replace(a *kernel.Alternative, at []byte) {
	var buf [256]byte
	repl := buf[:a.ReplacementLen]
	if !x.before(a.Replacement, repl) {
		return
	}
	n := a.ReplacementLen
	if a.DirectCall {
		n = x.directCall(a, at, repl)
	}
	for i := n; i < a.Len; i++ {
		buf[i] = opNop
	}
	b := buf[:a.Len]
	if x.Mode.New {
		relocate(b, a)
		optimize(b)
	} else {
		relocateOld(b, a)
		optimizeOld(b)
	}
	copy(at, b)
}

// directCall turns "call *pv_ops.x" into a call of what is there now (alt_replace_call). It returns how many bytes are left.
func (x *Expect) directCall(a *kernel.Alternative, at, repl []byte) int {
	if len(at) != 6 || len(repl) != 5 || at[0] != 0xff || at[1] != 0x15 {
		return len(repl)
	}
	target, ok := x.Env.U64(branchTarget(a.Addr, at[2:], 6))
	if !ok {
		return len(repl)
	}
	if target == 0 {
		target = x.Names.ParavirtBug
	}
	if target == x.Names.ParavirtNop {
		return 0
	}
	v := binary.LittleEndian.Uint32(repl[1:])
	binary.LittleEndian.PutUint32(repl[1:], v+uint32(target-x.Names.ParavirtBug))
	return len(repl)
}

// relocate moves branches and addresses that count from the instruction, and shortens jumps (__apply_relocation).
func relocate(b []byte, a *kernel.Alternative) {
	diff := a.Replacement - a.Addr
	inside := func(target int64) bool { return target >= 0 && target <= int64(a.ReplacementLen) }
	for i := 0; i < len(b); {
		in := decode(b[i:])
		if in.n == 0 {
			return
		}
		next := i + in.n
		if in.relative {
			imm := signed(b[i+in.imm : i+in.imm+in.immN])
			if !inside(int64(next) + imm) {
				add(b[i+in.imm:i+in.imm+in.immN], diff)
			}
			if b[i+in.op] == opJump {
				short := int64(int32(imm)) + int64(int32(uint32(diff))) + 3
				if short == int64(int8(short)) {
					b[i], b[i+1] = opShort, byte(short)
					for j := i + 2; j < next; j++ {
						b[j] = opInt3
					}
				}
			}
		}
		if in.ripRel && !inside(int64(next)+signed(b[i+in.disp:i+in.disp+4])) {
			add(b[i+in.disp:i+in.disp+4], diff)
		}
		i = next
	}
}

// relocateOld moves the one call or jump that a replacement may begin with (Linux up to 6.3).
func relocateOld(b []byte, a *kernel.Alternative) {
	if a.ReplacementLen != 5 {
		return
	}
	switch b[0] {
	case opCall:
		add(b[1:5], a.Replacement-a.Addr)
	case opJump:
		target := branchTarget(a.Replacement, b[1:], 5)
		d := int32(target - a.Addr)
		if d >= 0 && d-2 <= 127 || d < 0 && (d-2)&0xff == d-2 {
			b[0], b[1] = opShort, byte(d-2)
			copy(b[2:5], nops[3])
			return
		}
		branch(b, opJump, a.Addr, target)
	}
}

// signed reads 1 or 4 bytes.
func signed(b []byte) int64 {
	switch len(b) {
	case 1:
		return int64(int8(b[0]))
	case 4:
		return int64(int32(binary.LittleEndian.Uint32(b)))
	}
	return 0
}

// add adds to 1 or 4 bytes.
func add(b []byte, d uint64) {
	switch len(b) {
	case 1:
		b[0] += byte(d)
	case 4:
		binary.LittleEndian.PutUint32(b, binary.LittleEndian.Uint32(b)+uint32(d))
	}
}

// optimize joins NOPs to one, or to a jump over them (optimize_nops).
func optimize(b []byte) {
	for i := 0; i < len(b); {
		in := decode(b[i:])
		if in.n == 0 {
			return
		}
		next := i + in.n
		if in.isNop(b[i:]) {
			if next == len(b) {
				return
			}
			for next < len(b) {
				more := decode(b[next:])
				if more.n == 0 || !more.isNop(b[next:]) {
					break
				}
				next += more.n
			}
			addNop(b[i:next])
		}
		i = next
	}
}

// addNop fills b with one NOP, or with a jump over breakpoints.
func addNop(b []byte) {
	if len(b) <= maxNop {
		copy(b, nops[len(b)])
		return
	}
	rest := 2
	if len(b) < 128 {
		b[0], b[1] = opShort, byte(len(b)-2)
	} else {
		b[0], rest = opJump, 5
		binary.LittleEndian.PutUint32(b[1:], uint32(len(b)-5))
	}
	for i := rest; i < len(b); i++ {
		b[i] = opInt3
	}
}

// optimizeOld joins NOPs of one byte to NOPs of up to eight (Linux up to 6.3).
func optimizeOld(b []byte) {
	for i := 0; i < len(b); {
		in := decode(b[i:])
		if in.n == 0 {
			return
		}
		if in.n > 1 || b[i] != opNop {
			i += in.n
			continue
		}
		end := i
		for end < len(b) && b[end] == opNop {
			end++
		}
		if end-i > 1 {
			padNops(b[i:end])
		}
		i = end
	}
}

// padNops fills b with as few NOPs as there can be (add_nops).
func padNops(b []byte) {
	for len(b) > 0 {
		n := min(len(b), oldNop)
		copy(b, nops[n])
		b = b[n:]
	}
}
