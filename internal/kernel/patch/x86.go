package patch

import "encoding/binary"

// insn is one decoded instruction: its length and where its parts lie. What it does is not decoded.
type insn struct {
	n                int  // bytes
	op               int  // of the opcode's first byte
	imm, immN        int  // offset and size of the immediate; 0 bytes: none
	disp, dispN      int  // of the displacement
	ripRel, relative bool // the displacement counts from the next instruction; so does the immediate
}

// decode reads the instruction at the start of b. n is 0 where there is none that is known, or it is cut short.
func decode(b []byte) insn {
	var in insn
	at, opsize16, rexW := 0, false, false
	for at < len(b) && at < 14 && isPrefix(b[at]) {
		opsize16 = opsize16 || b[at] == 0x66
		at++
	}
	if at < len(b) && b[at]&0xf0 == 0x40 {
		rexW = b[at]&8 != 0
		at++
	}
	if at >= len(b) || isPrefix(b[at]) {
		return insn{}
	}
	in.op = at
	imm32 := 4
	if opsize16 && !rexW {
		imm32 = 2
	}
	var modrm bool
	switch op := b[at]; {
	case op == 0x0f:
		modrm, in.immN, in.relative, at = twoByte(b, at)
	case op == 0xc5 || op == 0xc4 || op == 0x62: // VEX, EVEX: always 64-bit mode's meaning
		modrm, in.immN, at = vector(b, at)
	default:
		modrm, in.immN, in.relative = oneByte(b, at, imm32, rexW)
		at++
	}
	if at < 0 || at > len(b) {
		return insn{}
	}
	if modrm {
		if at >= len(b) {
			return insn{}
		}
		m := b[at]
		at++
		at = in.address(b, m, at)
	}
	if in.immN > 0 {
		in.imm = at
	}
	if in.n = at + in.immN; in.n > len(b) || in.n > 15 || in.immN < 0 {
		return insn{}
	}
	return in
}

func isPrefix(c byte) bool {
	switch c {
	case 0x66, 0x67, 0xf0, 0xf2, 0xf3, 0x2e, 0x36, 0x3e, 0x26, 0x64, 0x65:
		return true
	}
	return false
}

// address reads what follows a ModRM byte.
func (in *insn) address(b []byte, m byte, at int) int {
	mod, rm := m>>6, m&7
	if mod == 3 {
		return at
	}
	if rm == 4 {
		if at >= len(b) {
			return len(b) + 1
		}
		if mod == 0 && b[at]&7 == 5 {
			in.dispN = 4
		}
		at++
	}
	switch {
	case mod == 1:
		in.dispN = 1
	case mod == 2:
		in.dispN = 4
	case rm == 5:
		in.dispN, in.ripRel = 4, true
	}
	in.disp = at
	return at + in.dispN
}

// oneByte says what follows an opcode of the first map: a ModRM byte, so many bytes of immediate; -1: not known.
func oneByte(b []byte, at, imm32 int, rexW bool) (modrm bool, imm int, relative bool) {
	op := b[at]
	switch {
	case op < 0x40:
		switch op & 7 {
		case 4:
			return false, 1, false
		case 5:
			return false, imm32, false
		case 6, 7:
			return false, -1, false
		}
		return true, 0, false
	case op >= 0x70 && op <= 0x7f, op >= 0xe0 && op <= 0xe3, op == 0xeb:
		return false, 1, true
	case op == 0xe8 || op == 0xe9:
		return false, 4, true
	case op >= 0xb8 && op <= 0xbf:
		if rexW {
			return false, 8, false
		}
		return false, imm32, false
	case op >= 0xa0 && op <= 0xa3:
		return false, 8, false
	case op == 0xf6 || op == 0xf7:
		if at+1 < len(b) && b[at+1]&0x38 > 8 {
			return true, 0, false
		}
		if op == 0xf6 {
			return true, 1, false
		}
		return true, imm32, false
	}
	switch op {
	case 0x68, 0xa9:
		return false, imm32, false
	case 0x69, 0x81, 0xc7:
		return true, imm32, false
	case 0x6a, 0xa8, 0xb0, 0xb1, 0xb2, 0xb3, 0xb4, 0xb5, 0xb6, 0xb7, 0xcd, 0xe4, 0xe5, 0xe6, 0xe7:
		return false, 1, false
	case 0x6b, 0x80, 0x83, 0xc0, 0xc1, 0xc6:
		return true, 1, false
	case 0xc2, 0xca:
		return false, 2, false
	case 0xc8:
		return false, 3, false
	case 0x63, 0x84, 0x85, 0x86, 0x87, 0x88, 0x89, 0x8a, 0x8b, 0x8c, 0x8d, 0x8e, 0x8f, 0xd0, 0xd1, 0xd2, 0xd3,
		0xd8, 0xd9, 0xda, 0xdb, 0xdc, 0xdd, 0xde, 0xdf, 0xfe, 0xff:
		return true, 0, false
	}
	return false, 0, false
}

// twoByte does the same for the maps behind 0x0f, and returns where the opcode ends.
func twoByte(b []byte, at int) (modrm bool, imm int, relative bool, next int) {
	if at+1 >= len(b) {
		return false, 0, false, -1
	}
	op := b[at+1]
	switch {
	case op == 0x38:
		return true, 0, false, at + 3
	case op == 0x3a:
		return true, 1, false, at + 3
	case op >= 0x80 && op <= 0x8f:
		return false, 4, true, at + 2
	case op >= 0x70 && op <= 0x73, op == 0xa4, op == 0xac, op == 0xba, op == 0xc2, op >= 0xc4 && op <= 0xc6:
		return true, 1, false, at + 2
	case op >= 0x05 && op <= 0x0b && op != 0x0a, op == 0x0e, op >= 0x30 && op <= 0x37, op == 0x77, op >= 0xa0 && op <= 0xa2,
		op >= 0xa8 && op <= 0xaa, op >= 0xc8 && op <= 0xcf:
		return false, 0, false, at + 2
	}
	return true, 0, false, at + 2
}

// vector does the same for VEX and EVEX.
func vector(b []byte, at int) (modrm bool, imm, next int) {
	opcodeMap, skip := byte(1), 2
	switch {
	case b[at] == 0xc4:
		skip = 3
	case b[at] == 0x62:
		skip = 4
	}
	if at+skip >= len(b) {
		return false, 0, -1
	}
	if b[at] != 0xc5 {
		opcodeMap = b[at+1] & 7
	}
	op := b[at+skip]
	switch {
	case opcodeMap == 3, opcodeMap == 1 && (op >= 0x70 && op <= 0x73 || op == 0xc2 || op >= 0xc4 && op <= 0xc6):
		imm = 1
	case opcodeMap == 1 && op == 0x77:
		return false, 0, at + skip + 1
	}
	return true, imm, at + skip + 1
}

// nops are the kernel's own no-operations of 1 to 11 bytes (arch/x86/include/asm/nops.h); those of more than 8 since 6.4.
var nops = [12][]byte{
	nil,
	{0x90},
	{0x66, 0x90},
	{0x0f, 0x1f, 0x00},
	{0x0f, 0x1f, 0x40, 0x00},
	{0x0f, 0x1f, 0x44, 0x00, 0x00},
	{0x66, 0x0f, 0x1f, 0x44, 0x00, 0x00},
	{0x0f, 0x1f, 0x80, 0x00, 0x00, 0x00, 0x00},
	{0x0f, 0x1f, 0x84, 0x00, 0x00, 0x00, 0x00, 0x00},
	{0x2e, 0x0f, 0x1f, 0x84, 0x00, 0x00, 0x00, 0x00, 0x00},
	{0x66, 0x2e, 0x0f, 0x1f, 0x84, 0x00, 0x00, 0x00, 0x00, 0x00},
	{0x66, 0x66, 0x2e, 0x0f, 0x1f, 0x84, 0x00, 0x00, 0x00, 0x00, 0x00},
}

const (
	opCall  = 0xe8
	opJump  = 0xe9
	opShort = 0xeb
	opRet   = 0xc3
	opInt3  = 0xcc
	opNop   = 0x90
	maxNop  = 11 // since Linux 6.4
	oldNop  = 8
)

// isNop: NOP and NOPL, as the kernel knows them.
func (in *insn) isNop(b []byte) bool {
	if b[in.op] == opNop {
		return b[0] != 0xf3
	}
	return b[in.op] == 0x0f && in.op+1 < len(b) && b[in.op+1] == 0x1f
}

// target returns where the relative branch at addr leads.
func branchTarget(addr uint64, rel []byte, next int) uint64 {
	return addr + uint64(next) + uint64(int64(int32(binary.LittleEndian.Uint32(rel))))
}

// branch writes a call or jump of 5 bytes at addr to target.
func branch(b []byte, op byte, addr, target uint64) {
	b[0] = op
	binary.LittleEndian.PutUint32(b[1:], uint32(target-addr-5))
}
