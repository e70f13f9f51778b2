package kernel

import (
	"bytes"
	"errors"
	"testing"
)

// TestKallsymsLayouts reads the tables in each layout the kernel's build has had, and among bytes that look like them.
func TestKallsymsLayouts(t *testing.T) {
	for ord := range numberOfOrders {
		want := synthSymbols(700, ord == offsetsPlain)
		tables := synthKallsyms(want, ord)
		decoy := append(append([]byte("abc\x00"), digits...), make([]byte, 36+4096)...)
		got, err := readKallsyms(append(decoy[:len(decoy)&^7], tables...))
		if err != nil {
			t.Errorf("%s: %v", orderNames[ord], err)
			continue
		}
		if len(got) != len(want) {
			t.Errorf("%s: %d symbols, want %d", orderNames[ord], len(got), len(want))
			continue
		}
		for i, s := range got {
			if s.addr != want[i].addr || s.kind != want[i].kind || !bytes.Equal(s.name, want[i].name) {
				t.Errorf("%s: symbol %d is %#x %c %s, want %#x %c %s", orderNames[ord], i, s.addr, s.kind, s.name, want[i].addr, want[i].kind, want[i].name)
				break
			}
		}
	}
}

func TestKallsymsAbsent(t *testing.T) {
	tables := synthKallsyms(synthSymbols(700, false), offsetsFirst)
	for name, b := range map[string][]byte{
		"nothing":            nil,
		"digits alone":       digits,
		"no offsets":         tables[700*4+16:],
		"no names":           tables[len(tables)-3000:],
		"cut short":          tables[:len(tables)-400],
		"digits and nothing": append(bytes.Repeat(digits, 100), make([]byte, 8192)...),
	} {
		if _, err := readKallsyms(b); !errors.Is(err, ErrUnsupported) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func FuzzKallsyms(f *testing.F) {
	for ord := range numberOfOrders {
		f.Add(synthKallsyms(synthSymbols(520, ord == offsetsPlain), ord))
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		syms, err := readKallsyms(b)
		if (err == nil) != (syms != nil) {
			t.Errorf("%d symbols and %v", len(syms), err)
		}
		for i, s := range syms {
			if len(s.name) == 0 || len(s.name) > maxNameLength || i > 0 && s.addr < syms[i-1].addr {
				t.Errorf("symbol %d: %+v", i, s)
			}
		}
	})
}
