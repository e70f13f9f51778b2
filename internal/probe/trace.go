package probe

import "errors"

// Called is a system call that has come to its end.
type Called struct {
	PID    int64     `json:"pid"`
	TID    int64     `json:"tid"`
	Comm   string    `json:"comm"`
	Number int64     `json:"number"`
	Name   string    `json:"name,omitempty"`
	Args   [6]uint64 `json:"args"`
	Text   string    `json:"path,omitempty"`
	Result int64     `json:"result"`
}

// Errors of tracing.
var (
	ErrNotProbed = errors.New("system calls can be traced only where QEMU has the plugin, and once the guest's kernel runs")
	ErrTraced    = errors.New("somebody traces this machine already")
)

// Trace gives every system call of a process, or of all where pid is 0, to sink, until the returned function is called. sink
// is called while nothing is held; it must not block.
func (w *Watcher) Trace(pid int64, sink func(Called)) (end func(), err error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	switch {
	case w.sink != nil:
		return nil, ErrTraced
	case !w.page.alive() || !w.seeing || !w.page.reads() || w.bits(func(p *point) bool { return p.traced }) == 0:
		return nil, ErrNotProbed
	}
	w.sink = sink
	w.page.put32(atTGID, uint32(pid))
	w.enable()
	return func() {
		w.mu.Lock()
		defer w.mu.Unlock()
		w.sink = nil
		w.enable()
	}, nil
}

// called is at the way out of the kernel: the registers of the way in are there still, and the result.
func (w *Watcher) called(cpu int, eyes Eyes) ([]told, error) {
	w.mu.Lock()
	sink := w.sink
	w.mu.Unlock()
	if sink == nil {
		return nil, nil
	}
	c, err := eyes.Called(cpu)
	if err != nil {
		return nil, err
	}
	return []told{{settle: func() { sink(c) }}}, nil
}

// enable switches on what can be seen and is wanted. w.mu is held.
func (w *Watcher) enable() {
	if w.broken != nil {
		w.page.enabled(0)
		return
	}
	open, traced := w.seeing && w.page.reads() && len(w.sieve) > 0, w.seeing && w.sink != nil
	w.page.enabled(w.bits(func(p *point) bool { return !p.filtered && !p.traced || p.filtered && open || p.traced && traced }))
}
