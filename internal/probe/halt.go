package probe

import "vigia/internal/event"

// halt is where a machine is to be paused.
type halt struct {
	at   func(event.Kind, event.Fields) bool
	late func()
}

// Halt has the machine paused where a CPU is held and at says so of what is told there: the guest has then executed the event's
// instruction, and not much more than its block. at is asked while the CPU waits; late is called where the CPU had gone on meanwhile. Halt is
// called before Run. A plugin that can't pause leaves at unasked.
func (w *Watcher) Halt(at func(event.Kind, event.Fields) bool, late func()) { w.halt = &halt{at, late} }

// halted is what the plugin is told with its answer: the number of the hit at which it is to pause the machine, or 0.
func (w *Watcher) halted(list []told, turn uint32) uint32 {
	if w.halt == nil || !w.page.pauses() {
		return 0
	}
	for _, t := range list {
		if t.kind != "" && w.halt.at(t.kind, t.fields) {
			return turn &^ turnMask
		}
	}
	return 0
}
