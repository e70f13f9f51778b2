package introspect

import (
	"errors"
	"fmt"
)

// walk calls visit with each node of the circular list that starts at head, the address of a list_head, head itself
// left out. Every step checks that the next node points back: where it does not, the list was changing, and walk
// returns ErrTorn. visit may end the walk with an error.
func (g *Guest) walk(head uint64, visit func(node uint64) error) error {
	node := head
	for range maxNodes {
		next, err := g.space.U64(node)
		if err != nil {
			return fmt.Errorf("%w: %w", ErrTorn, err)
		}
		back, err := g.space.U64(next + 8)
		if err != nil || back != node {
			return ErrTorn
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

// view runs one view: it makes sure of the kernel, repeats look while lists are torn, and keeps it all within
// its limit of reads.
func (g *Guest) view(look func() error) error {
	attempt := func() error { g.seen.clear(); return look() }
	g.mu.Lock()
	defer g.mu.Unlock()
	g.meter.left = g.limit
	if err := g.begin(); err != nil {
		return err
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
// leads to another such list.
type meter struct {
	mem  Physical
	left int
}

func (m *meter) ReadPhys(pa uint64, b []byte) error {
	if m.left <= 0 {
		return ErrEndless
	}
	m.left--
	return m.mem.ReadPhys(pa, b)
}
