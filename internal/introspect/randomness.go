package introspect

import (
	"errors"
	"time"

	"vigia/internal/kernel"
)

// What a guest that goes on from a checkpoint is asked from outside: what time it believes it is, and whether its kernel has drawn
// its randomness anew (drivers/char/random.c).

// Clock returns the guest's wall clock as it last brought it up to date: with each tick, and in a guest that rests with the next
// interrupt, which may be a second or more later.
func (g *Guest) Clock() (now time.Time, err error) {
	err = g.view(func() error {
		c := &g.layout.clock
		tk := g.timekeeper()
		if tk == 0 || c.seconds == noField || c.nsec == noField || c.shift == noField {
			return errNoSymbol
		}
		return steady(func() error {
			r := reader{s: g.space}
			sec, nsec, shift, again := r.u64(tk+c.seconds), r.u64(tk+c.nsec), r.u32(tk+c.shift), r.u64(tk+c.seconds)
			switch {
			case r.err != nil:
				return r.err
			case sec != again:
				return ErrTorn
			}
			now = time.Unix(int64(sec), int64(nsec>>min(shift, 63))%int64(time.Second))
			return nil
		})
	})
	return now, err
}

// Fields of the kernel's nameless struct base_crng: key[32], then on kernels before 6.2 the time of birth, then the generation.
const (
	crngKey   = 32
	crngWords = 2
	// jiffies begin five minutes before they leave 32 bits behind, so a time of birth is at least this; a generation grows
	// by one in some seconds at most and never gets there.
	leastBirth = 1 << 30
)

var errNoRandomness = errors.New("the state of the kernel's random numbers is not as it is known")

// Reseeds returns how often the guest's kernel has drawn its random numbers' key anew, since it booted.
func (g *Guest) Reseeds() (n uint64, err error) {
	link, err := g.profile.Symbol("base_crng")
	if err != nil {
		return 0, err
	}
	err = g.view(func() error {
		var words [crngWords]uint64
		for i := range words {
			var err error
			if words[i], err = g.global(link + crngKey + uint64(8*i)); err != nil {
				return err
			}
		}
		if n = words[0]; n >= leastBirth {
			n = words[1]
		}
		if n >= leastBirth {
			return errNoRandomness
		}
		return nil
	})
	return n, err
}

// HearsOfClones says whether a kernel has the driver of the device by which QEMU tells it that it is another machine now
// (drivers/virt/vmgenid.c): it reseeds when it is told.
func HearsOfClones(p *kernel.Profile) bool { return len(p.SymbolsNamed("add_vmfork_randomness")) > 0 }
