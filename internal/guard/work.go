package guard

import "time"

// restPercent is how much of one processor a guest takes that does nothing: its timers, its idle loop under software emulation.
const restPercent = 3

// work tells a guest that does something from one that rests. What can be known for little: how long its virtual CPUs ran, that a
// process began, changed or ended, a module was loaded, a file opened, that its disk was written to.
type work struct {
	used    func() (time.Duration, bool)
	stirred func() bool
	written func() int64

	asked time.Time
	disk  int64
}

func (g *Guard) newWork() *work {
	return &work{used: g.sampler.clock.used(), stirred: func() bool { return g.prober.stirred.Swap(false) },
		written: func() int64 { return g.disk.vol.Stats().Writes }}
}

// worked says whether the guest has done anything to speak of since it was last asked, also if nobody can tell. It is for one goroutine.
func (w *work) worked() bool {
	now := time.Now()
	used, known := w.used()
	disk, stirred := w.written(), w.stirred()
	busy := !known || stirred || disk != w.disk || 100*used > restPercent*now.Sub(w.asked)
	w.asked, w.disk = now, disk
	return busy
}
