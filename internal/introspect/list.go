package introspect

import (
	"errors"
	"fmt"

	"vigia/internal/memory"
)

// walk calls visit with each node of the circular list that starts at head, the address of a list_head, head itself
// left out. Every step checks that the next node points back: where it does not, the list was changing, and walk
// returns ErrTorn. visit may end the walk with an error.
func (g *Guest) walk(head uint64, visit func(node uint64) error) error {
	node := head
	for range maxNodes {
		next, err := g.space.U64(node)
		if err != nil {
			return fmt.Errorf("%w: %w", g.torn(), err)
		}
		back, err := g.space.U64(next + 8)
		if err != nil || back != node {
			return g.torn()
		}
		if next == head {
			return nil
		}
		if err := visit(next); err != nil {
			return err
		}
		node = next
	}
	return fmt.Errorf("%w: more than %d elements", ErrTorn, maxNodes)
}

// torn is ErrTorn. What was kept of memory is given up, so that the next attempt sees it as it is by then.
func (g *Guest) torn() error {
	g.meter.Forget()
	return ErrTorn
}

// steady repeats what a changing list spoils.
func steady(attempt func() error) error {
	var err error
	for range maxAttempts {
		if err = attempt(); !errors.Is(err, ErrTorn) {
			return err
		}
	}
	return err
}

// view runs one view: it makes sure of the kernel, repeats look while lists are torn, and keeps it all within its limit of
// reads.
func (g *Guest) view(look func() error) error {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.meter.left = g.limit
	windowed, ok := g.mem.(memory.Windowed)
	if !ok {
		return g.settle(look)
	}
	return windowed.Window(func(p memory.Pager) error {
		g.meter.pager = p
		g.through(p != nil)
		defer func() {
			g.meter.pager = nil
			g.through(false)
		}()
		return g.settle(look)
	})
}

// through turns the spaces to the window's pages, or away from them.
func (g *Guest) through(window bool) {
	for _, s := range []*memory.Space{g.space, g.user} {
		switch {
		case s == nil:
		case window:
			s.Through(&g.meter)
		default:
			s.Through(nil)
		}
	}
}

// settle looks until what was seen holds together.
func (g *Guest) settle(look func() error) error {
	if err := g.begin(); err != nil {
		return err
	}
	attempt := func() error {
		g.seen.clear()
		return look()
	}
	err := steady(attempt)
	// Lists broken for good may be what is left of a kernel after a reset: is there another?
	if was := g.boot; errors.Is(err, ErrTorn) && g.meter.left > 0 && g.locate() == nil && g.boot != was {
		err = steady(attempt)
	}
	if g.meter.left <= 0 {
		return ErrEndless
	}
	return err
}

// meter bounds how much is read: lists can be forged so that each is long within its own bound, and each element
// leads to another such list. Within a window it hands out the window's pages.
type meter struct {
	mem   Physical
	left  int
	pager memory.Pager
}

func (m *meter) ReadPhys(pa uint64, b []byte) error {
	if m.left <= 0 {
		return ErrEndless
	}
	m.left--
	return m.mem.ReadPhys(pa, b)
}

// Page hands out a page; none, once the limit is reached: reading says why.
func (m *meter) Page(pa uint64) *[memory.PageSize]byte {
	if m.pager == nil || m.left <= 0 {
		return nil
	}
	m.left--
	return m.pager.Page(pa)
}

func (m *meter) Forget() {
	if m.pager != nil {
		m.pager.Forget()
	}
}
