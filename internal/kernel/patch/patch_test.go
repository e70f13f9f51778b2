package patch

import (
	"bytes"
	"encoding/binary"
	"testing"

	"vigia/internal/kernel"
)

// TestDecodeLengths: lengths of instructions as the processor's manual and objdump have them.
func TestDecodeLengths(t *testing.T) {
	for _, c := range []struct {
		b []byte
		n int
	}{
		{[]byte{0x90}, 1},
		{[]byte{0x66, 0x90}, 2},
		{[]byte{0x0f, 0x1f, 0x44, 0x00, 0x00}, 5},
		{[]byte{0x66, 0x66, 0x2e, 0x0f, 0x1f, 0x84, 0, 0, 0, 0, 0}, 11},
		{[]byte{0xe8, 1, 2, 3, 4}, 5},
		{[]byte{0xeb, 5}, 2},
		{[]byte{0x0f, 0x84, 1, 2, 3, 4}, 6},
		{[]byte{0xff, 0x15, 1, 2, 3, 4}, 6},                          // call *x(%rip)
		{[]byte{0x48, 0xb8, 1, 2, 3, 4, 5, 6, 7, 8}, 10},             // movabs
		{[]byte{0x48, 0xc7, 0xc7, 1, 2, 3, 4}, 7},                    // mov $x,%rdi
		{[]byte{0x66, 0xc7, 0x00, 1, 2}, 5},                          // movw $x,(%rax)
		{[]byte{0xf6, 0xc1, 0x80}, 3},                                // test $x,%cl
		{[]byte{0xf7, 0xd8}, 2},                                      // neg %eax
		{[]byte{0x0f, 0x01, 0xca}, 3},                                // clac
		{[]byte{0xf3, 0x0f, 0x1e, 0xfa}, 4},                          // endbr64
		{[]byte{0x65, 0x48, 0x8b, 0x04, 0x25, 1, 2, 3, 4}, 9},        // mov %gs:x,%rax
		{[]byte{0xc5, 0xf8, 0x77}, 3},                                // vzeroupper
		{[]byte{0x62, 0xf1, 0x7c, 0x48, 0x10, 0x80, 0, 0, 0, 0}, 10}, // vmovups x(%rax),%zmm0
		{[]byte{0x66, 0x0f, 0x3a, 0x0f, 0xc1, 8}, 6},                 // palignr
		{[]byte{0xe8, 1, 2}, 0},                                      // cut short
		{bytes.Repeat([]byte{0x66}, 20), 0},                          // prefixes alone
		{nil, 0},
	} {
		if in := decode(c.b); in.n != c.n {
			t.Errorf("% x: %d bytes, want %d", c.b, in.n, c.n)
		}
	}
}

// piece is an Object of one run of bytes.
type piece struct {
	kernel.Placed
	segments []kernel.Segment
	sites    []kernel.Site
	alts     []kernel.Alternative
}

func (p *piece) Original(addr uint64, b []byte) bool {
	q := kernel.Placed{Code: p.segments}
	return q.Original(addr, b)
}
func (p *piece) NumSites() int          { return len(p.sites) }
func (p *piece) Site(i int) kernel.Site { return p.sites[i] }
func (p *piece) Alternatives(first uint64, n int) []kernel.Alternative {
	return append([]kernel.Alternative(nil), p.alts[first:first+uint64(n)]...)
}

// env is a guest of which only some words of data are known.
type env map[uint64]uint64

func (e env) U64(addr uint64) (uint64, bool)  { v, ok := e[addr]; return v, ok }
func (e env) Function(addr uint64) bool       { return addr>>16 == 1 }
func (e env) Tracer(addr uint64) bool         { return addr == 0x1f000 }
func (e env) Own(addr uint64) bool            { return false }
func (e env) Code(addr uint64, b []byte) bool { return false }

const at = 0x10000

// legal says which of several contents are taken as they are at a site of original bytes.
func legal(t *testing.T, original []byte, s kernel.Site, m Mode, got ...[]byte) []bool {
	t.Helper()
	s.Addr, s.Len = at, len(original)
	var out []bool
	for _, g := range got {
		x := Expect{Object: &piece{segments: []kernel.Segment{{Addr: at, Data: original}}, sites: []kernel.Site{s}}, Mode: &m,
			Names: &Names{ReturnThunk: 0x10100, StaticReturn: 0x10200}, Env: env{0x20000: 0x10300, 0x20008: 0, 0x20010: 0x10200, 0x20018: 0x90000}}
		want := make([]byte, len(original))
		if !x.Window(at, g, want) {
			t.Fatal("no window")
		}
		out = append(out, bytes.Equal(g, want))
	}
	return out
}

func rel(op byte, target uint64) []byte {
	b := make([]byte, 5)
	branch(b, op, at, target)
	return b
}

// TestLegalForms: each sort of place takes what the kernel writes there, and nothing else.
func TestLegalForms(t *testing.T) {
	ret := []byte{0xc3, 0xcc, 0xcc, 0xcc, 0xcc}
	nop5 := nops[5]
	call := rel(opCall, 0x10300)
	for _, c := range []struct {
		name     string
		original []byte
		site     kernel.Site
		mode     Mode
		good     [][]byte
		bad      [][]byte
	}{
		{"return", rel(opJump, 0x10100), kernel.Site{Kind: kernel.SiteReturn}, Mode{}, [][]byte{ret},
			[][]byte{rel(opJump, 0x10100), rel(opJump, 0x10104), {0xc3, 0xcc, 0xcc, 0xcc, 0x90}}},
		{"return through a thunk", rel(opJump, 0x10100), kernel.Site{Kind: kernel.SiteReturn}, Mode{Return: 0x10180},
			[][]byte{rel(opJump, 0x10180)}, [][]byte{ret, rel(opJump, 0x10100)}},
		{"jump label", nop5, kernel.Site{Kind: kernel.SiteJump, A: 0x10080}, Mode{}, [][]byte{nop5, rel(opJump, 0x10080)},
			[][]byte{rel(opJump, 0x10081), rel(opCall, 0x10080), {0x90, 0x90, 0x90, 0x90, 0x90}}},
		{"short jump label", nops[2], kernel.Site{Kind: kernel.SiteJump, A: at + 0x20}, Mode{}, [][]byte{nops[2], {0xeb, 0x1e}},
			[][]byte{{0xeb, 0x1f}, {0x90, 0x90}}},
		{"static call", call, kernel.Site{Kind: kernel.SiteStatic, A: 0x20000}, Mode{}, [][]byte{call},
			[][]byte{nop5, rel(opCall, 0x10301), rel(opJump, 0x10300), staticZero}},
		{"static call of nothing", call, kernel.Site{Kind: kernel.SiteStatic, A: 0x20008}, Mode{}, [][]byte{nop5}, [][]byte{call, staticZero}},
		{"static call of zero", call, kernel.Site{Kind: kernel.SiteStatic, A: 0x20010}, Mode{}, [][]byte{staticZero}, [][]byte{nop5}},
		{"static call of a stranger", call, kernel.Site{Kind: kernel.SiteStatic, A: 0x20018}, Mode{}, nil, [][]byte{rel(opCall, 0x90000)}},
		{"static tail call of nothing", rel(opJump, 0x10300), kernel.Site{Kind: kernel.SiteStatic, A: 0x20008, Aux: kernel.StaticTail}, Mode{},
			[][]byte{ret}, [][]byte{nop5, rel(opJump, 0x10300)}},
		{"ftrace", rel(opCall, 0x10400), kernel.Site{Kind: kernel.SiteFtrace}, Mode{}, [][]byte{nop5, rel(opCall, 0x1f000)},
			[][]byte{rel(opCall, 0x10400), rel(opCall, 0x1f001), rel(opJump, 0x1f000)}},
		{"lock", []byte{0xf0}, kernel.Site{Kind: kernel.SiteLock}, Mode{}, [][]byte{{0xf0}}, [][]byte{{0x3e}}},
		{"lock, one CPU", []byte{0xf0}, kernel.Site{Kind: kernel.SiteLock}, Mode{Up: true}, [][]byte{{0x3e}}, [][]byte{{0xf0}, {0x90}}},
		{"endbr", endbr, kernel.Site{Kind: kernel.SiteEndbr}, Mode{Sealed: true}, [][]byte{seal}, [][]byte{endbr, {0x90, 0x90, 0x90, 0x90}}},
		{"retpoline", rel(opCall, 0x10500), kernel.Site{Kind: kernel.SiteRetpoline, Aux: 8}, Mode{Retpoline: RetpolineIndirect},
			[][]byte{{0x41, 0xff, 0xd0, 0x66, 0x90}}, [][]byte{{0x41, 0xff, 0xd1, 0x66, 0x90}, rel(opCall, 0x10500)}},
	} {
		for i, ok := range legal(t, c.original, c.site, c.mode, c.good...) {
			if !ok {
				t.Errorf("%s: % x is refused", c.name, c.good[i])
			}
		}
		for i, ok := range legal(t, c.original, c.site, c.mode, c.bad...) {
			if ok {
				t.Errorf("%s: % x is taken", c.name, c.bad[i])
			}
		}
	}
}

// TestAlternatives: what is put in for a feature, moved, padded, in the ways of old and new kernels.
func TestAlternatives(t *testing.T) {
	const repl = 0x18000
	pad := bytes.Repeat([]byte{opNop}, 9)
	jump := make([]byte, 5)
	branch(jump, opJump, repl, at+0x40)
	for _, c := range []struct {
		name              string
		original, replace []byte
		newer, on         bool
		want              []byte
	}{
		{"old, off", pad, nil, false, false, append(bytes.Clone(nops[8]), 0x90)},
		{"new, off", pad, nil, true, false, nops[9]},
		{"new, off, long", bytes.Repeat([]byte{opNop}, 14), nil, true, false, append([]byte{0xeb, 12}, bytes.Repeat([]byte{opInt3}, 12)...)},
		{"on, padded", pad[:5], []byte{0x0f, 0x01, 0xca}, true, true, []byte{0x0f, 0x01, 0xca, 0x66, 0x90}},
		{"old, jump is short", pad[:5], jump, false, true, append([]byte{0xeb, 0x3e}, nops[3]...)},
		{"new, jump is short", pad[:5], jump, true, true, []byte{0xeb, 0x3e, opInt3, opInt3, opInt3}},
	} {
		a := kernel.Alternative{Addr: at, Replacement: repl, Feature: 3, Len: len(c.original), ReplacementLen: len(c.replace)}
		x := Expect{Mode: &Mode{New: c.newer, Features: []byte{0}}, Names: &Names{}, Env: env{}, Object: &piece{
			segments: []kernel.Segment{{Addr: at, Data: c.original}, {Addr: repl, Data: c.replace}}, alts: []kernel.Alternative{a},
			sites: []kernel.Site{{Addr: at, Kind: kernel.SiteAlternative, Aux: 1, Len: len(c.original)}}}}
		if c.on {
			x.Mode.Features[0] = 1 << 3
		}
		got := make([]byte, len(c.original))
		if x.Window(at, got, got); !bytes.Equal(got, c.want) {
			t.Errorf("%s: % x, want % x", c.name, got, c.want)
		}
	}
}

// FuzzDecode: no instruction is longer than there are bytes, and its parts lie within it.
func FuzzDecode(f *testing.F) {
	f.Add([]byte{0x65, 0x48, 0x8b, 0x04, 0x25, 1, 2, 3, 4})
	f.Add([]byte{0x62, 0xf1, 0x7c, 0x48, 0x10, 0x80, 0, 0, 0, 0})
	f.Add([]byte{0x66, 0x0f, 0x3a, 0x0f, 0xc1, 8})
	f.Add([]byte{0xff, 0x15, 1, 2, 3, 4})
	f.Fuzz(func(t *testing.T, b []byte) {
		in := decode(b)
		if in.n > len(b) || in.n > 15 || in.n > 0 && (in.imm+in.immN > in.n || in.disp+in.dispN > in.n || in.op >= in.n) {
			t.Errorf("% x: %+v", b, in)
		}
		optimize(bytes.Clone(b))
		optimizeOld(bytes.Clone(b))
		relocate(bytes.Clone(b), &kernel.Alternative{Addr: 1 << 20, Replacement: binary.LittleEndian.Uint64(append(bytes.Clone(b), make([]byte, 8)...)), ReplacementLen: len(b)})
	})
}
