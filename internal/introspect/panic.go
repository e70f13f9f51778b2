package introspect

// Panicked reports whether the guest's kernel has panicked: panic_cpu holds the number of the processor that did, and
// PANIC_CPU_INVALID, which is -1, before (kernel/panic.c). It needs no driver in the guest.
func (g *Guest) Panicked() (bool, error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if err := g.begin(); err != nil {
		return false, err
	}
	n, err := g.global("panic_cpu")
	return err == nil && int32(n) != -1, err
}

// Detail reads the process of a sample whole: it is ErrTorn where the process has ended meanwhile.
func (g *Guest) Detail(t TaskTime) (Process, error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if err := g.begin(); err != nil {
		return Process{}, err
	}
	p := Process{Task: t.Task}
	if ok, err := g.settled(t.Task); err != nil || !ok {
		return Process{}, ErrTorn
	}
	if err := g.process(&p); err != nil {
		return Process{}, err
	}
	if p.StartTime != t.StartTime {
		return Process{}, ErrTorn
	}
	return p, nil
}
