package introspect

import (
	"encoding/binary"
	"errors"
	"slices"
	"testing"

	"vigia/internal/kernel"
)

// ticking is a guest that runs: its count of ticks is another at each look.
type ticking struct {
	*recorded
	pa uint64
}

func (m *ticking) ReadPhys(pa uint64, b []byte) error {
	if line := m.lines[m.pa&^(lineSize-1)]; pa <= m.pa && m.pa < pa+uint64(len(b)) && line != nil {
		at := line[m.pa%lineSize:]
		binary.LittleEndian.PutUint64(at, binary.LittleEndian.Uint64(at)+1)
	}
	return m.recorded.ReadPhys(pa, b)
}

// overwritings are what an intruder can write over so that his kernel is not found, and what is said of it.
func overwritings(g *Guest) map[string]func(m *recorded) {
	phys := func(va uint64) uint64 { return g.boot.Phys + va - g.boot.Slide - g.link.text }
	levels := uint64(0)
	if g.boot.Levels == 4 {
		levels = 1
	}
	all := map[string]func(m *recorded){
		"linux_banner":           func(m *recorded) { m.put((phys(g.link.banner+g.boot.Slide)+7)&^7, 0) },
		"init_task.real_parent":  func(m *recorded) { m.put(phys(g.initTask())+g.layout.task.realParent, 0) },
		"init_task.stack_canary": func(m *recorded) { m.put(phys(g.initTask())+g.layout.task.canary, g.boot.canary+1) },
	}
	if at := phys(g.link.level5 + g.boot.Slide); g.link.level5 != 0 && at%8 == 0 {
		all["__pgtable_l5_enabled"] = func(m *recorded) { m.put(at, levels) }
	}
	return all
}

// TestOverwrittenLandmarks: a kernel that is looked at goes on being looked at when what it was found by is written over, and
// that is told; so it is by who attaches afterwards.
func TestOverwrittenLandmarks(t *testing.T) {
	landmarks := func(t *testing.T, g *Guest) (names []string) {
		c := NewChecker(g, nil)
		res, err := c.disguise()
		if err != nil {
			t.Fatal(err)
		}
		for _, f := range res.Findings {
			names = append(names, f.Subject)
		}
		return names
	}
	onRecordings(t, func(t *testing.T, r *recorded, p *kernel.Profile) {
		whole := attach(t, r, p)
		count := len(processes(t, whole))
		if names := landmarks(t, whole); len(names) > 0 {
			t.Errorf("nothing is written over: %v", names)
		}
		for name, write := range overwritings(whole) {
			m := &ticking{r.clone(), whole.boot.Phys + whole.link.jiffies - whole.link.text}
			g := attach(t, m, p)
			_ = processes(t, g)
			write(m.recorded)
			if got := landmarks(t, g); len(processes(t, g)) != count || !slices.Equal(got, []string{name}) {
				t.Errorf("%s: found %v", name, got)
			}
			// The guest idles: it is searched for again.
			g.tickAt = g.tickAt.Add(-2 * stillFor)
			g.tick = g.ticks()
			if got := landmarks(t, g); !slices.Equal(got, []string{name}) {
				t.Errorf("%s, when it is looked for again: found %v", name, got)
			}
			at := m.pa
			m.pa = 0
			g.Rebooted()
			if _, err := g.Processes(); !errors.Is(err, ErrNotReady) {
				t.Errorf("%s, after a reset: %v", name, err)
			}
			m.pa = at
			later, err := Attach(m, p)
			if err != nil {
				t.Errorf("%s: who attaches later is told %v", name, err)
				continue
			}
			if got := landmarks(t, later); len(processes(t, later)) != count || later.Boot().Slide != whole.boot.Slide || name != "init_task.stack_canary" && !slices.Contains(got, name) {
				t.Errorf("%s, by who attaches later: found %v", name, got)
			}
		}
	})
}

// TestAllLandmarksOverwritten: also all of them at once.
func TestAllLandmarksOverwritten(t *testing.T) {
	onRecordings(t, func(t *testing.T, r *recorded, p *kernel.Profile) {
		whole := attach(t, r, p)
		all := overwritings(whole)
		for _, write := range all {
			write(r)
		}
		if _, err := Attach(r, p); !errors.Is(err, ErrNotReady) {
			t.Errorf("a kernel that stands still, and is none by what it is found by: %v", err)
		}
		g, err := Attach(&ticking{r, whole.boot.Phys + whole.link.jiffies - whole.link.text}, p)
		if err != nil {
			t.Fatal(err)
		}
		if res, err := NewChecker(g, nil).disguise(); err != nil || len(res.Findings) < len(all)-1 {
			t.Errorf("%+v, %v", res.Findings, err)
		}
	})
}
