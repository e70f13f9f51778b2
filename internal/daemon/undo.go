package daemon

// undo is the way back of a start: each step that changes the world pushes its reversal, and a failure unwinds all of
// it, last first. A start that succeeded forgets it.
type undo []func()

func (u *undo) push(f func()) { *u = append(*u, f) }

func (u *undo) unwind() {
	for i := len(*u) - 1; i >= 0; i-- {
		(*u)[i]()
	}
	*u = nil
}

func (u *undo) forget() { *u = nil }
