package introspect

import "time"

// The timekeeper lies in tk_core, after a sequence counter whose size depends on the kernel's options, and tk_core's
// own type is nameless. It is found by what must hold in it: offs_real is wall_to_monotonic turned round.
const maxClockShift = 64

// timekeeper returns the address of the guest's timekeeper; 0 where it can't be told.
func (g *Guest) timekeeper() uint64 {
	if g.clock != 0 {
		return g.clock
	}
	c := &g.layout.clock
	if g.link.clock == 0 || c.offsReal == noField || c.wallSec == noField || c.wallNsec == noField {
		return 0
	}
	for shift := uint64(0); shift < maxClockShift; shift += 8 {
		tk := g.link.clock + g.boot.Slide + shift
		offset, err1 := g.space.U64(tk + c.offsReal)
		sec, err2 := g.space.U64(tk + c.wallSec)
		nsec, err3 := g.space.U64(tk + c.wallNsec)
		if err1 != nil || err2 != nil || err3 != nil || offset == 0 {
			continue
		}
		if int64(offset) == -(int64(sec)*int64(time.Second) + int64(nsec)) {
			g.clock = tk
			return tk
		}
	}
	return 0
}

// realOffset returns what turns the guest's monotonic nanoseconds into those since 1970.
func (g *Guest) realOffset() (int64, bool) {
	tk := g.timekeeper()
	if tk == 0 {
		return 0, false
	}
	v, err := g.space.U64(tk + g.layout.clock.offsReal)
	return int64(v), err == nil
}

// wallSeconds returns the guest's idea of the time, for telling which of two kernels in RAM is newer.
func (g *Guest) wallSeconds() (int64, bool) {
	g.clock = 0
	tk := g.timekeeper()
	if tk == 0 || g.layout.clock.seconds == noField {
		return 0, false
	}
	v, err := g.space.U64(tk + g.layout.clock.seconds)
	return int64(v), err == nil
}
