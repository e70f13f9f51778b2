package introspect

import (
	"bytes"
	"slices"

	"vigia/internal/memory"
)

// locate searches RAM. With several kernels in it (a reset leaves the last one's bytes behind) the one whose clock is
// ahead is the living one. One that lacks what it is found by is looked for by its page tables.
func (g *Guest) locate() error {
	g.boot, g.clock = Boot{}, 0
	var best Boot
	var bestTime int64
	for _, phys := range g.search() {
		b, ok := g.identify(phys)
		if !ok || slices.Contains(g.dead, b) || !g.enter(b) {
			continue
		}
		now, _ := g.wallSeconds()
		if best == (Boot{}) || now > bestTime {
			best, bestTime = b, now
		}
	}
	if best == (Boot{}) {
		best = g.unmarked()
	} else if !g.enter(best) {
		return ErrNotReady
	}
	if best == (Boot{}) {
		return ErrNotReady
	}
	g.boot, g.last = best, best
	return nil
}

// search returns the physical places of _text at which the banner is where it should be.
func (g *Guest) search() []uint64 {
	regions := []memory.Region{{Size: 4 << 30}}
	if sized, ok := g.mem.(memory.Sized); ok {
		regions = sized.Regions()
	}
	read := g.mem.ReadPhys
	if peeker, ok := g.mem.(memory.Peeker); ok {
		read = peeker.PeekPhys
	}
	banner := g.profile.Banner()
	distance := g.link.banner - g.link.text
	var found []uint64
	buf := make([]byte, len(banner))
	for _, r := range regions {
		for phys := (r.Phys + kernelAlign - 1) &^ (kernelAlign - 1); phys < r.Phys+r.Size; phys += kernelAlign {
			if read(phys+distance, buf[:headText]) != nil || !bytes.Equal(buf[:headText], banner[:headText]) {
				continue
			}
			if read(phys+distance, buf) == nil && bytes.Equal(buf, banner) {
				found = append(found, phys)
			}
		}
	}
	return found
}

// identify reads who the kernel at phys is; false where there is none, or it has not yet begun.
func (g *Guest) identify(phys uint64) (Boot, bool) {
	at := func(link uint64) uint64 { return phys + link - g.link.text }
	read := func(pa uint64, n int) (v uint64, ok bool) {
		var b [8]byte
		if g.mem.ReadPhys(pa, b[:n]) != nil {
			return 0, false
		}
		for i, c := range b {
			v |= uint64(c) << (8 * i)
		}
		return v, true
	}
	b := Boot{Phys: phys, Levels: 4}
	if g.link.level5 != 0 {
		if v, ok := read(at(g.link.level5), 4); ok && v == 1 {
			b.Levels = 5
		}
	}
	task := at(g.link.initTask)
	if g.layout.task.realParent == noField {
		slide, ok := g.slideByTables(b)
		b.Slide = slide
		return b, ok
	}
	parent, ok := read(task+g.layout.task.realParent, 8)
	b.Slide = parent - g.link.initTask
	if !ok || b.Slide >= maxSlide || b.Slide%kernelAlign != 0 {
		return Boot{}, false
	}
	if g.layout.task.canary != noField {
		b.canary, _ = read(task+g.layout.task.canary, 8)
	}
	return b, true
}

// slideByTables finds the virtual slide of a kernel whose types are not known: it is where the kernel's own tables map the text
// to where it was found.
func (g *Guest) slideByTables(b Boot) (uint64, bool) {
	space := memory.NewSpace(g.mem, b.Phys+g.link.topPgt-g.link.text, b.Levels)
	for slide := uint64(0); slide < maxSlide; slide += kernelAlign {
		if pa, err := space.Translate(g.link.text + slide); err == nil && pa == b.Phys {
			return slide, true
		}
	}
	return 0, false
}

// mapped turns to a kernel's page tables, and reports whether they map it where it is thought to be.
func (g *Guest) mapped(b Boot) bool {
	root := b.Phys + g.link.topPgt - g.link.text
	g.space, g.user = memory.NewSpace(&g.meter, root, b.Levels), memory.NewSpace(&g.meter, root, b.Levels)
	g.through(g.meter.pager != nil)
	for _, link := range []uint64{g.link.text, g.link.initTask} {
		if pa, err := g.space.Translate(link + b.Slide); err != nil || pa != b.Phys+link-g.link.text {
			return false
		}
	}
	g.boot = b
	return true
}

// enter turns to a kernel, if it runs.
func (g *Guest) enter(b Boot) bool {
	if !g.mapped(b) {
		return false
	}
	if g.layout.task.tasks == noField {
		return true
	}
	// Without a first task the kernel has but begun.
	head := g.initTask() + g.layout.task.tasks
	first, err := g.space.U64(head)
	if err != nil || first == head {
		return false
	}
	_, err = g.space.U64(first)
	return err == nil
}

func (g *Guest) initTask() uint64 { return g.link.initTask + g.boot.Slide }
