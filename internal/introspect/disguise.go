package introspect

import (
	"bytes"
	"encoding/binary"
	"slices"
	"time"

	"vigia/internal/memory"
)

// KindKernelDisguised: something by which a kernel is found in memory is overwritten. A kernel that can't be found can't be looked at, and nothing in
// the kernel itself needs these bytes any more: to write over them is to blind whoever looks from outside.
const KindKernelDisguised = "kernel.disguised"

// doubt is about a kernel that lacks something it is found by: is it one at all, or what a reset has left? A kernel that
// lives counts its ticks.
type doubt struct {
	boot  Boot
	tick  uint64
	alive bool
}

const (
	tickWait  = 60 * time.Millisecond // for a tick, of all that are in doubt
	tickPoll  = 2 * time.Millisecond
	maxDoubts = 16        // places that are looked at more closely
	maxKernel = 256 << 20 // bytes of a kernel's image
)

// ticks reads the kernel's count of ticks; 0 where it has none.
func (g *Guest) ticks() uint64 {
	if g.link.jiffies == 0 {
		return 0
	}
	g.space.Flush()
	tick, _ := g.space.U64(g.link.jiffies + g.boot.Slide)
	return tick
}

// later reports whether a count of ticks has gone on, by no more than days: what is written over something else is not time.
func later(was, now uint64) bool { return now-was-1 < 1<<28 }

// lives turns to a kernel that is not, or no longer, what a kernel is found by, if its page tables map it and it runs.
func (g *Guest) lives(b Boot) bool { return len(g.living([]Boot{b})) > 0 }

// living returns the first of several that does, as a list of one.
func (g *Guest) living(list []Boot) []Boot {
	list = slices.DeleteFunc(slices.Clone(list), func(b Boot) bool { return slices.Contains(g.dead, b) || !g.mapped(b) })
	was := g.boot
	began := time.Now()
	before := make([]uint64, len(list))
	for round := 0; len(list) > 0 && (round == 0 || time.Since(began) < tickWait); round++ {
		for i, b := range list {
			if !g.mapped(b) {
				continue
			}
			tick := g.ticks()
			if round == 0 {
				before[i] = tick
			}
			known := g.doubt.boot == b && (g.doubt.alive || later(g.doubt.tick, tick))
			if known || later(before[i], tick) {
				g.doubt = doubt{b, tick, true}
				return list[i : i+1]
			}
		}
		time.Sleep(tickPoll)
	}
	if len(list) > 0 && g.doubt.boot != list[0] { // an idle one ticks seldom: the next look may be later than its next tick
		g.doubt = doubt{list[0], before[0], false}
	}
	g.boot = was
	return nil
}

// unmarked returns a kernel that runs and that the search does not find: the last one that was seen, else any whose own page
// tables say where it is.
func (g *Guest) unmarked() Boot {
	list := []Boot{g.last}
	if g.last == (Boot{}) {
		list = g.byTables()
	}
	if found := g.living(list); len(found) > 0 {
		return found[0]
	}
	g.boot = Boot{}
	return Boot{}
}

// byTables looks for page tables that map a kernel to where they are themselves: the last entry of its top table leads to a
// table of its own image.
func (g *Guest) byTables() (list []Boot) {
	if g.link.jiffies == 0 {
		return nil // nothing would say whether it lives
	}
	regions := []memory.Region{{Size: 4 << 30}}
	if sized, ok := g.mem.(memory.Sized); ok {
		regions = sized.Regions()
	}
	read := g.mem.ReadPhys
	if peeker, ok := g.mem.(memory.Peeker); ok {
		read = peeker.PeekPhys
	}
	var b [8]byte
	for _, r := range regions {
		for phys := (r.Phys + kernelAlign - 1) &^ (kernelAlign - 1); phys < r.Phys+r.Size && len(list) < maxDoubts; phys += kernelAlign {
			if read(phys+g.link.topPgt-g.link.text+511*8, b[:]) != nil {
				continue
			}
			e := binary.LittleEndian.Uint64(b[:])
			if at := e & pteFrame; e&pteP == 0 || at < phys || at-phys > maxKernel {
				continue
			}
			for _, levels := range []int{4, 5} {
				found := Boot{Phys: phys, Levels: levels}
				if slide, ok := g.slideByTables(found); ok {
					found.Slide = slide
					if known, ok := g.identify(phys); ok && known.Slide == slide {
						found.canary = known.canary
					}
					list = append(list, found)
				}
			}
		}
	}
	return list
}

// landmark is something by which a kernel is found, and what it must hold.
type landmark struct {
	name, what string
	at         uint64
	want       []byte
}

// landmarks are those of the kernel that is looked at.
func (g *Guest) landmarks() []landmark {
	list := []landmark{{"linux_banner", "the kernel's banner", g.link.banner + g.boot.Slide, g.profile.Banner()}}
	if l := &g.layout.task; l.realParent != noField {
		list = append(list, landmark{"init_task.real_parent", "the first task's parent, itself", g.initTask() + l.realParent,
			binary.LittleEndian.AppendUint64(nil, g.initTask())})
		if l.canary != noField && g.boot.canary != 0 {
			list = append(list, landmark{"init_task.stack_canary", "the first task's random number, which tells one boot from the next",
				g.initTask() + l.canary, binary.LittleEndian.AppendUint64(nil, g.boot.canary)})
		}
	}
	if g.link.level5 != 0 {
		want := uint32(0)
		if g.boot.Levels == 5 {
			want = 1
		}
		list = append(list, landmark{"__pgtable_l5_enabled", "how many levels of page tables there are", g.link.level5 + g.boot.Slide,
			binary.LittleEndian.AppendUint32(nil, want)})
	}
	return list
}

// disguise is the check of what the kernel is found by.
func (c *Checker) disguise() (Result, error) {
	g := c.guest
	var found []Finding
	n := 0
	err := g.view(func() error {
		found = nil
		list := g.landmarks()
		n = len(list)
		for _, l := range list {
			got := make([]byte, len(l.want))
			if _ = g.mem.ReadPhys(g.boot.Phys+l.at-g.boot.Slide-g.link.text, got); bytes.Equal(got, l.want) {
				continue
			}
			found = append(found, Finding{Kind: KindKernelDisguised, Subject: l.name, Severity: Critical,
				Detail:   l.what + ", is overwritten: by it a kernel is found in memory from outside",
				Evidence: []Evidence{{Address: l.at, Bytes: got, Expected: l.want}}})
		}
		return nil
	})
	return Result{Findings: found, Views: []View{{Check: "landmarks", Name: "what the kernel is found by", Count: n}}}, err
}
