package kernel

import (
	"encoding/binary"
	"errors"
	"testing"
)

// rawBTF makes BTF of types written by hand: {name, info, link, tail…} in words.
func rawBTF(types [][]uint32) []byte {
	var words []byte
	for _, typ := range types {
		for _, w := range typ {
			words = binary.LittleEndian.AppendUint32(words, w)
		}
	}
	strings := []byte("\x00a\x00")
	out := []byte{0x9f, 0xeb, 1, 0}
	for _, w := range []int{24, 0, len(words), len(words), len(strings)} {
		out = binary.LittleEndian.AppendUint32(out, uint32(w))
	}
	return append(append(out, words...), strings...)
}

func typesOf(raw []byte) error {
	t, err := readBTF(raw)
	if err != nil {
		return err
	}
	b := &builder{text: []byte{0}, seen: map[string]uint32{}}
	return b.types(t)
}

// TestHostileBTF: types that refer to themselves or multiply end in an error, soon.
func TestHostileBTF(t *testing.T) {
	const structOf = btfStruct << 24
	repeat := func(n int, link uint32) []uint32 { // a struct of n anonymous members of one type
		typ := []uint32{0, structOf | uint32(n), 8}
		for range n {
			typ = append(typ, 0, link, 0)
		}
		return typ
	}
	var multiply [][]uint32
	for i := range 15 {
		multiply = append(multiply, repeat(100, uint32(i+2)))
	}
	multiply = append(multiply, []uint32{0, structOf, 8})
	chain := [][]uint32{{1, structOf | 1, 8, 1, 2, 0}}
	for i := range 100_000 {
		chain = append(chain, []uint32{0, btfConst << 24, uint32(i + 3)})
	}
	for name, c := range map[string]struct {
		types [][]uint32
		want  error
	}{
		"a struct within itself":     {[][]uint32{repeat(1, 1)}, ErrUnsupported},
		"structs that multiply":      {multiply, ErrTooLarge},
		"a typedef of itself":        {[][]uint32{{1, btfTypedef << 24, 1}, {1, structOf | 1, 8, 1, 1, 0}}, nil},
		"a hundred thousand consts":  {chain, nil},
		"arrays of themselves":       {[][]uint32{{0, btfArray << 24, 0, 1, 1, 1 << 31}, {1, structOf | 1, 8, 1, 1, 0}}, nil},
		"a link out of range":        {[][]uint32{{1, structOf | 1, 8, 1, 0xffffffff, 0}}, nil},
		"an unknown kind":            {[][]uint32{{1, 31 << 24, 8}}, ErrUnsupported},
		"members that are not there": {[][]uint32{{1, structOf | 9, 8}}, ErrUnsupported},
	} {
		if err := typesOf(rawBTF(c.types)); !errors.Is(err, c.want) {
			t.Errorf("%s: %v, want %v", name, err, c.want)
		}
	}
}
