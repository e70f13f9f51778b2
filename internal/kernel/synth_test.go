package kernel

import (
	"bytes"
	"cmp"
	"debug/elf"
	"encoding/binary"
	"slices"
	"testing"

	"github.com/cilium/ebpf/btf"
)

// A synthetic kernel: an ELF file with the tables of kallsyms and BTF as the kernel's build makes them, small enough
// to be tried in every layout, packing and damage.
const (
	synthText   = 0xffffffff81000000
	synthRodata = 0xffffffff82000000
	synthBanner = "Linux version 6.1.0-synth (someone@somewhere) #1 SMP\n"
)

// order says where kallsyms keeps its offsets.
type order int

const (
	offsetsFirst order = iota // up to 6.1
	seqsThen                  // 6.2 to 6.4: sequence numbers between markers and tokens
	offsetsLast               // 6.5 and later
	offsetsPlain              // 6.15 and later: no per-CPU addresses
	numberOfOrders
)

var orderNames = [...]string{"up to 6.1", "6.2 to 6.4", "6.5 and later", "6.15 and later"}

// synthSymbols returns n symbols sorted by address; the first two are per-CPU, unless plain.
func synthSymbols(n int, plain bool) []symbol {
	var syms []symbol
	if !plain {
		syms = append(syms, symbol{0, 'A', []byte("__per_cpu_start")}, symbol{0x1f000, 'A', []byte("__per_cpu_end")})
	}
	syms = append(syms, symbol{synthText, 'T', []byte("_text")}, symbol{synthText + 0x900000, 'T', []byte("_etext")},
		symbol{synthRodata, 'D', []byte("linux_banner")})
	for i := len(syms); i < n; i++ {
		name := []byte("do_sys_x0")
		name = append(name, byte('a'+i%26), byte('0'+i/26%10), byte('a'+i/260%26))
		if i == 300 {
			name = bytes.Repeat([]byte("long_name_"), 20) // a length of two bytes
		}
		if i == 400 || i == 401 {
			name = []byte("twice")
		}
		syms = append(syms, symbol{synthText + 0x100*uint64(i), 't', name})
	}
	slices.SortStableFunc(syms, func(x, y symbol) int { return cmp.Compare(x.addr, y.addr) })
	return syms
}

// synthKallsyms writes the tables. Tokens 1 to 5 are worth more than themselves.
func synthKallsyms(syms []symbol, ord order) []byte {
	tokens := [256]string{}
	for i := range tokens {
		tokens[i] = string([]byte{byte(i)})
	}
	for i, t := range []string{"", "do_", "sys_", "long_name_", "Tdo", "t"} {
		if i > 0 {
			tokens[i] = t
		}
	}
	tokens[0] = "x" // a zero byte can't be in a token
	le := binary.LittleEndian
	var out []byte
	align := func() {
		for len(out)%8 != 0 {
			out = append(out, 0)
		}
	}
	offsets := func() {
		align()
		for _, s := range syms {
			switch {
			case ord == offsetsPlain:
				out = le.AppendUint32(out, uint32(s.addr-synthText))
			case s.addr >= kernelSpace:
				out = le.AppendUint32(out, uint32(int32(-1-int64(s.addr-synthText))))
			default:
				out = le.AppendUint32(out, uint32(s.addr))
			}
		}
		align()
		out = le.AppendUint64(out, synthText)
	}
	if ord == offsetsFirst || ord == seqsThen {
		offsets()
	}
	align()
	out = le.AppendUint64(out, uint64(len(syms)))
	start := len(out)
	var markers []uint32
	for i, s := range syms {
		if i%256 == 0 {
			markers = append(markers, uint32(len(out)-start))
		}
		name := append([]byte{s.kind}, s.name...)
		for token := 1; token <= 5; token++ {
			name = bytes.ReplaceAll(name, []byte(tokens[token]), []byte{byte(token)})
		}
		if len(name) < 0x80 {
			out = append(out, byte(len(name)))
		} else {
			out = append(out, byte(len(name))|0x80, byte(len(name)>>7))
		}
		out = append(out, name...)
	}
	align()
	for _, m := range markers {
		out = le.AppendUint32(out, m)
	}
	if ord == seqsThen {
		align()
		for i := range syms {
			n := (i * 7919) % len(syms)
			out = append(out, byte(n>>16), byte(n>>8), byte(n))
		}
	}
	align()
	var index []byte
	table := len(out)
	for _, t := range tokens {
		index = le.AppendUint16(index, uint16(len(out)-table))
		out = append(append(out, t...), 0)
	}
	align()
	out = append(out, index...)
	if ord == offsetsLast || ord == offsetsPlain {
		offsets()
	}
	return append(out, make([]byte, 64)...)
}

// synthBTF has what is hard: anonymous structs within structs, bit fields, arrays, typedefs, pointers, two types of a name.
func synthBTF(t testing.TB) []byte {
	t.Helper()
	u32 := &btf.Int{Name: "unsigned int", Size: 4}
	u64 := &btf.Int{Name: "unsigned long", Size: 8}
	char := &btf.Int{Name: "char", Size: 1, Encoding: btf.Char}
	counter := &btf.Typedef{Name: "atomic_t", Type: &btf.Struct{Size: 4, Members: []btf.Member{{Name: "counter", Type: u32}}}}
	list := &btf.Struct{Name: "list_head", Size: 16}
	list.Members = []btf.Member{{Name: "next", Type: &btf.Pointer{Target: list}}, {Name: "prev", Type: &btf.Pointer{Target: list}, Offset: 64}}
	inner := &btf.Struct{Size: 16, Members: []btf.Member{
		{Name: "left", Type: u32}, {Name: "right", Type: &btf.Const{Type: &btf.Volatile{Type: u64}}, Offset: 64}}}
	task := &btf.Struct{Name: "task_struct", Size: 128, Members: []btf.Member{
		{Name: "state", Type: u32},
		{Type: &btf.Union{Size: 16, Members: []btf.Member{{Name: "whole", Type: u64}, {Type: inner}}}, Offset: 64},
		{Name: "tasks", Type: list, Offset: 192},
		{Name: "comm", Type: &btf.Array{Index: u32, Type: char, Nelems: 16}, Offset: 320},
		{Name: "low", Type: u32, Offset: 448, BitfieldSize: 1},
		{Name: "high", Type: u32, Offset: 449, BitfieldSize: 3},
		{Name: "usage", Type: counter, Offset: 480},
		{Name: "grid", Type: &btf.Array{Index: u32, Type: &btf.Array{Index: u32, Type: list, Nelems: 2}, Nelems: 2}, Offset: 512},
	}}
	one := &btf.Struct{Name: "same", Size: 8, Members: []btf.Member{{Name: "a", Type: u32}, {Name: "b", Type: u32, Offset: 32}}}
	two := &btf.Struct{Name: "same", Size: 8, Members: []btf.Member{{Name: "a", Type: u32}, {Name: "b", Type: u32}}}
	enum := &btf.Enum{Name: "pid_type", Size: 4, Values: []btf.EnumValue{{Name: "PIDTYPE_PID", Value: 0}, {Name: "PIDTYPE_MAX", Value: 4}}}
	minus := &btf.Enum{Name: "sign", Size: 4, Signed: true, Values: []btf.EnumValue{{Name: "MINUS", Value: ^uint64(0)}}}
	wide := &btf.Enum{Name: "wide", Size: 8, Values: []btf.EnumValue{{Name: "WIDE", Value: 1 << 40}}}
	b, err := btf.NewBuilder([]btf.Type{task, one, two, enum, minus, wide, counter}, nil)
	if err != nil {
		t.Fatal(err)
	}
	raw, err := b.Marshal(nil, &btf.MarshalOptions{Order: binary.LittleEndian})
	if err != nil {
		t.Fatal(err)
	}
	return raw
}

// synthVmlinux is an ELF file with one read-only segment and a section for BTF.
func synthVmlinux(kallsyms, types []byte) []byte {
	le := binary.LittleEndian
	const ehdr, phdr, shdr = 64, 56, 64
	names := []byte("\x00.BTF\x00.shstrtab\x00")
	rodata := append([]byte(synthBanner+"\x00"), make([]byte, 7)...)
	rodata = append(rodata[:len(rodata)&^7], kallsyms...)
	rodataAt := ehdr + phdr + 8 // 8-aligned, as the kernel's is
	btfAt := (rodataAt + len(rodata) + 7) &^ 7
	namesAt := btfAt + len(types)
	sectionsAt := (namesAt + len(names) + 7) &^ 7
	out := make([]byte, sectionsAt+3*shdr)
	copy(out, "\x7fELF\x02\x01\x01")
	le.PutUint16(out[16:], uint16(elf.ET_EXEC))
	le.PutUint16(out[18:], uint16(elf.EM_X86_64))
	le.PutUint32(out[20:], 1)
	le.PutUint64(out[32:], ehdr)
	le.PutUint64(out[40:], uint64(sectionsAt))
	le.PutUint16(out[52:], ehdr)
	le.PutUint16(out[54:], phdr)
	le.PutUint16(out[56:], 1)
	le.PutUint16(out[58:], shdr)
	le.PutUint16(out[60:], 3)
	le.PutUint16(out[62:], 2)
	p := out[ehdr:]
	le.PutUint32(p, uint32(elf.PT_LOAD))
	le.PutUint64(p[8:], uint64(rodataAt))
	le.PutUint64(p[16:], synthRodata)
	le.PutUint64(p[32:], uint64(len(rodata)))
	le.PutUint64(p[40:], uint64(len(rodata)))
	copy(out[rodataAt:], rodata)
	copy(out[btfAt:], types)
	copy(out[namesAt:], names)
	section := func(i, name int, typ elf.SectionType, at, size int) {
		s := out[sectionsAt+i*shdr:]
		le.PutUint32(s, uint32(name))
		le.PutUint32(s[4:], uint32(typ))
		le.PutUint64(s[24:], uint64(at))
		le.PutUint64(s[32:], uint64(size))
	}
	section(1, 1, elf.SHT_PROGBITS, btfAt, len(types))
	section(2, 6, elf.SHT_STRTAB, namesAt, len(names))
	return out
}

// synthImage puts a packed payload behind a boot sector and one sector of setup.
func synthImage(payload []byte) []byte {
	le := binary.LittleEndian
	out := make([]byte, 1024, 1024+len(payload))
	out[setupSects] = 1
	copy(out[setupMagic:], "HdrS")
	le.PutUint16(out[setupVersion:], 0x20f)
	le.PutUint32(out[payloadLength:], uint32(len(payload)))
	return append(out, payload...)
}

func build(t testing.TB, image []byte) *Profile {
	t.Helper()
	p, err := Build(bytes.NewReader(image), int64(len(image)))
	if err != nil {
		t.Fatal(err)
	}
	return p
}

func synthProfile(t testing.TB) *Profile {
	t.Helper()
	return build(t, synthVmlinux(synthKallsyms(synthSymbols(700, false), offsetsFirst), synthBTF(t)))
}
