package memory

import (
	"bytes"
	"errors"
	"testing"
)

// counted is a /proc/PID/mem that counts its reads.
type counted struct {
	b     []byte
	reads int
}

func (c *counted) ReadAt(b []byte, off int64) (int, error) {
	c.reads++
	return bytes.NewReader(c.b).ReadAt(b, off)
}

func TestWindowOnProcess(t *testing.T) {
	mem := &counted{b: make([]byte, 4*PageSize)}
	mem.b[PageSize+16] = 7
	p, err := NewProcess(mem, PageSize, []Region{{Size: 2*PageSize + 100}})
	if err != nil {
		t.Fatal(err)
	}
	err = p.Window(func(w Pager) error {
		for range 3 {
			if page := w.Page(20); page == nil || page[16] != 7 {
				t.Errorf("page: %v", page != nil)
			}
		}
		mem.b[PageSize+16] = 8
		if page := w.Page(0); page[16] != 7 {
			t.Error("a page was read twice")
		}
		w.Forget()
		if page := w.Page(0); page[16] != 8 {
			t.Error("a forgotten page was not read again")
		}
		if w.Page(2*PageSize) != nil {
			t.Error("the end of RAM is in the middle of a page: there is none")
		}
		return nil
	})
	if err != nil || mem.reads != 2 {
		t.Errorf("%d reads, %v; want 2", mem.reads, err)
	}
	mem.b[PageSize+16] = 9
	_ = p.Window(func(w Pager) error {
		if page := w.Page(0); page[16] != 9 {
			t.Error("a page outlived its window")
		}
		// A window within another has room of its own.
		return p.Window(func(inner Pager) error {
			mem.b[PageSize+16] = 10
			if a, b := w.Page(0), inner.Page(0); a == b || a[16] != 9 || b[16] != 10 {
				t.Error("two windows share pages")
			}
			return nil
		})
	})
}

func TestWindowKeepsLittle(t *testing.T) {
	const pages = 3 * maxKept
	p, err := NewProcess(&counted{b: make([]byte, pages*PageSize)}, 0, []Region{{Size: pages * PageSize}})
	if err != nil {
		t.Fatal(err)
	}
	_ = p.Window(func(w Pager) error {
		for i := range uint64(pages) {
			w.Page(i * PageSize)
		}
		if n := len(w.(*keptPages).at); n > maxKept {
			t.Errorf("%d pages are kept", n)
		}
		return nil
	})
	if n := len(p.kept.free); n > keptBetween {
		t.Errorf("room for %d pages is kept", n)
	}
}

// TestWindowOnTruncated: the file is cut short under a window; the view ends, the program does not.
func TestWindowOnTruncated(t *testing.T) {
	f := ramFile(t, 16*PageSize, 3*PageSize)
	r, err := Map(f, Q35Layout(16*PageSize))
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	released := false
	err = r.Window(func(w Pager) error {
		defer func() { released = true }()
		if page := w.Page(3*PageSize + 5); page == nil || page[0] != 1 {
			t.Error("the page is another")
		}
		if w.Page(16*PageSize) != nil {
			t.Error("a page beyond the end")
		}
		if err := f.Truncate(PageSize); err != nil {
			t.Fatal(err)
		}
		sum := byte(0)
		for _, c := range w.Page(8 * PageSize) {
			sum += c
		}
		t.Error("read what is not there", sum)
		return nil
	})
	if !errors.Is(err, ErrNoRAM) || !released {
		t.Errorf("%v, deferred calls run: %v", err, released)
	}
}

// TestWindowPassesOnOtherPanics: a mistake in a view is not taken for one of the memory.
func TestWindowPassesOnOtherPanics(t *testing.T) {
	r, err := Map(ramFile(t, PageSize), Q35Layout(PageSize))
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	for name, mistake := range map[string]func(){
		"nil":   func() { var p *counted; p.reads++ },
		"index": func() { var s []int; _ = s[len(name())] },
		"value": func() { panic("mistake") },
	} {
		func() {
			defer func() {
				if recover() == nil {
					t.Errorf("%s: swallowed", name)
				}
			}()
			_ = r.Window(func(Pager) error { mistake(); return nil })
		}()
	}
}

func name() string { return "mistake" }

// TestSpaceThroughWindow: a space reads the same with a window and without, and Fresh sees past it.
func TestSpaceThroughWindow(t *testing.T) {
	for _, levels := range []int{4, 5} {
		m := mapped(levels)
		s := NewSpace(m, 0x1000, levels)
		plain := map[uint64]uint64{}
		for _, va := range []uint64{small, small + 0xff8, medium + 0x123, medium + 0xffc, medium + 0x100120, big + 0x345678, big + 0x300ffb} {
			v, err := s.U64(va)
			if err != nil {
				t.Fatal(err)
			}
			plain[va] = v
		}
		mem := &counted{b: m.b}
		p, err := NewProcess(mem, 0, []Region{{Size: uint64(len(mem.b))}})
		if err != nil {
			t.Fatal(err)
		}
		_ = p.Window(func(w Pager) error {
			through := NewSpace(p, 0x1000, levels)
			through.Through(w)
			for va, want := range plain {
				if got, err := through.U64(va); err != nil || got != want {
					t.Errorf("%d levels, %#x: %#x, %v; want %#x", levels, va, got, err, want)
				}
			}
			if _, err := through.U64(small + 0x1000); !errors.Is(err, ErrAbsent) {
				t.Errorf("an absent page: %v", err)
			}
			m.b[0x300ff8] = 'T'
			old, _ := through.U8(small + 0xff8)
			now, err := through.Fresh(small + 0xff8)
			if old != 't' || byte(now) != 'T' || err != nil {
				t.Errorf("kept %c, fresh %c, %v", old, byte(now), err)
			}
			return nil
		})
	}
}
