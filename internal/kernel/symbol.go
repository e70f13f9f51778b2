package kernel

import (
	"encoding/binary"
	"iter"
	"sort"
	"strings"
)

// Symbol is a name the kernel knows and its link address.
type Symbol struct {
	Name string
	Addr uint64
	Kind byte // nm's letter: T and t are text, D d data, R r read-only, B b bss, A a absolute
}

// NumSymbols returns how many symbols there are.
func (p *Profile) NumSymbols() int { return len(p.s[secSymbols]) / symbolRecord }

// SymbolIndex returns the i-th symbol by address; the zero Symbol where i is out of range.
func (p *Profile) SymbolIndex(i int) Symbol {
	if i < 0 || i >= p.NumSymbols() {
		return Symbol{}
	}
	le, b := binary.LittleEndian, p.s[secSymbols][i*symbolRecord:]
	return Symbol{Addr: le.Uint64(b), Name: string(p.text(le.Uint32(b[8:]))), Kind: b[12]}
}

// byName returns the n-th entry of the index by name: the name, and the symbol's number.
func (p *Profile) byName(n int) (name []byte, number int) {
	number = int(binary.LittleEndian.Uint32(p.s[secSymbolNames][n*indexRecord:]))
	if number >= p.NumSymbols() {
		return nil, number
	}
	return p.text(binary.LittleEndian.Uint32(p.s[secSymbols][number*symbolRecord+8:])), number
}

// SymbolsNamed returns all symbols of a name, by address: static ones may share it.
func (p *Profile) SymbolsNamed(name string) []Symbol {
	n := len(p.s[secSymbolNames]) / indexRecord
	i := sort.Search(n, func(i int) bool {
		got, _ := p.byName(i)
		return string(got) >= name
	})
	var out []Symbol
	for ; i < n; i++ {
		got, number := p.byName(i)
		if string(got) != name {
			break
		}
		out = append(out, p.SymbolIndex(number))
	}
	return out
}

// SymbolsFrom yields the symbols whose names begin with prefix, by name.
func (p *Profile) SymbolsFrom(prefix string) iter.Seq[Symbol] {
	n := len(p.s[secSymbolNames]) / indexRecord
	first := sort.Search(n, func(i int) bool {
		got, _ := p.byName(i)
		return string(got) >= prefix
	})
	return func(yield func(Symbol) bool) {
		for i := first; i < n; i++ {
			got, number := p.byName(i)
			if !strings.HasPrefix(string(got), prefix) || !yield(p.SymbolIndex(number)) {
				return
			}
		}
	}
}

// Symbol returns the address of the one symbol of a name. A name that several share is refused: which one is meant
// can't be known.
func (p *Profile) Symbol(name string) (uint64, error) {
	found := p.SymbolsNamed(name)
	switch len(found) {
	case 0:
		return 0, missing("symbol", name)
	case 1:
		return found[0].Addr, nil
	}
	return 0, missing("unambiguous symbol", name)
}

// SymbolAt returns the symbol that an address lies in or after, and how far after its start; ok is false before the first.
func (p *Profile) SymbolAt(addr uint64) (s Symbol, offset uint64, ok bool) {
	t := p.s[secSymbols]
	i := sort.Search(p.NumSymbols(), func(i int) bool {
		return binary.LittleEndian.Uint64(t[i*symbolRecord:]) > addr
	})
	if i == 0 {
		return Symbol{}, 0, false
	}
	s = p.SymbolIndex(i - 1)
	return s, addr - s.Addr, true
}

// SymbolsAt returns all symbols that start at an address: a function may have several names.
func (p *Profile) SymbolsAt(addr uint64) []Symbol {
	t, n := p.s[secSymbols], p.NumSymbols()
	i := sort.Search(n, func(i int) bool { return binary.LittleEndian.Uint64(t[i*symbolRecord:]) >= addr })
	var out []Symbol
	for ; i < n && binary.LittleEndian.Uint64(t[i*symbolRecord:]) == addr && len(out) < maxAliases; i++ {
		out = append(out, p.SymbolIndex(i))
	}
	return out
}

// PerCPU reports whether a symbol's address is an offset into each CPU's own area.
func (p *Profile) PerCPU(addr uint64) bool {
	end, err := p.Symbol("__per_cpu_end")
	return err == nil && addr < end && addr < kernelSpace
}

// Text returns where the kernel's code lies: from _text up to _etext.
func (p *Profile) Text() (start, end uint64, err error) {
	if start, err = p.Symbol("_text"); err != nil {
		return 0, 0, err
	}
	if end, err = p.Symbol("_etext"); err != nil {
		return 0, 0, err
	}
	return start, end, nil
}
