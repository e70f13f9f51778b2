package introspect

import (
	"encoding/binary"
	"errors"
	"testing"

	"vigia/internal/kernel"
)

// put writes 8 bytes into a recording, whole lines of it made as needed.
func (r *recorded) put(pa, v uint64) {
	line := r.lines[pa&^(lineSize-1)]
	if line == nil {
		line = new([lineSize]byte)
		r.lines[pa&^(lineSize-1)] = line
	}
	binary.LittleEndian.PutUint64(line[pa%lineSize:], v)
}

func TestNotReady(t *testing.T) {
	onRecordings(t, func(t *testing.T, r *recorded, p *kernel.Profile) {
		g := attach(t, r, p)
		phys := func(link uint64) uint64 { return g.boot.Phys + link - g.link.text }
		for name, spoil := range map[string]func(c *recorded){
			"no banner":          func(c *recorded) { c.put(phys(g.link.banner)&^7, 0) },
			"not yet relocated":  func(c *recorded) { c.put(phys(g.link.initTask)+g.layout.task.realParent, g.link.initTask) },
			"no parent":          func(c *recorded) { c.put(phys(g.link.initTask)+g.layout.task.realParent, 0) },
			"no page tables yet": func(c *recorded) { c.put(phys(g.link.topPgt)+511*8, 0) },
			"no list of tasks":   func(c *recorded) { c.put(phys(g.link.initTask)+g.layout.task.tasks, 0) },
		} {
			c := r.clone()
			spoil(c)
			if _, err := Attach(c, p); !errors.Is(err, ErrNotReady) {
				t.Errorf("%s: Attach gives %v", name, err)
			}
		}
	})
}

// TestReboot: a reset leaves the old kernel's bytes where they were, and the new one appears some seconds later.
func TestReboot(t *testing.T) {
	onRecordings(t, func(t *testing.T, r *recorded, p *kernel.Profile) {
		g := attach(t, r, p)
		before := g.Boot()
		processes(t, g)
		g.Rebooted()
		if _, err := g.Processes(); !errors.Is(err, ErrNotReady) {
			t.Fatalf("after a reset, with only the old kernel's bytes in memory: %v", err)
		}
		canary := before.Phys + g.link.initTask - g.link.text + g.layout.task.canary
		r.put(canary, before.canary+1) // a new kernel
		if list := processes(t, g); len(list) < 50 || g.Boot() == before {
			t.Errorf("after the reboot: %d processes, boot %+v", len(list), g.Boot())
		}
		// The same unannounced.
		r.put(canary, before.canary+2)
		if list := processes(t, g); len(list) < 50 || g.Boot().canary != before.canary+2 {
			t.Errorf("after a reboot nobody told of: %d processes", len(list))
		}
		r.put(before.Phys+g.link.initTask-g.link.text+g.layout.task.realParent, 0)
		if _, err := g.CPU(nil); !errors.Is(err, ErrNotReady) {
			t.Errorf("with the kernel overwritten: %v", err)
		}
	})
}

// torn lies about one address for a number of reads.
type torn struct {
	*recorded
	pa    uint64
	times int
}

func (m *torn) ReadPhys(pa uint64, b []byte) error {
	err := m.recorded.ReadPhys(pa, b)
	if pa == m.pa && m.times > 0 {
		m.times--
		b[1] ^= 0x40
	}
	return err
}

func TestTornListIsReadAgain(t *testing.T) {
	onRecordings(t, func(t *testing.T, r *recorded, p *kernel.Profile) {
		m := &torn{recorded: r}
		g := attach(t, m, p)
		want := processes(t, g)
		var err error
		if m.pa, err = g.space.Translate(want[20].Task + g.layout.task.tasks + 8); err != nil {
			t.Fatal(err)
		}
		m.times = 3
		if got := processes(t, g); len(got) != len(want) || m.times != 0 {
			t.Errorf("%d processes after a torn read, want %d", len(got), len(want))
		}
		m.times = 1 << 30
		if _, err := g.Processes(); !errors.Is(err, ErrTorn) {
			t.Errorf("a list broken for good: %v", err)
		}
		if times, err := g.CPU(nil); !errors.Is(err, ErrTorn) || len(times) != 0 {
			t.Errorf("a list broken for good: %d times, %v", len(times), err)
		}
	})
}

// TestReadsAreBounded: a view that asks for more reading than its limit ends there, whatever it was doing.
func TestReadsAreBounded(t *testing.T) {
	onRecordings(t, func(t *testing.T, r *recorded, p *kernel.Profile) {
		g := attach(t, r, p)
		r.reads = 0
		list := processes(t, g)
		whole := r.reads
		t.Logf("%d reads for %d processes", whole, len(list))
		for limit := 1; limit < whole; limit += 97 {
			g.limit, r.reads = limit, 0
			if _, err := g.Processes(); !errors.Is(err, ErrEndless) && !errors.Is(err, ErrNotReady) {
				t.Fatalf("with %d reads of %d: %v", limit, whole, err)
			}
			if r.reads > limit+20 { // making sure of the kernel comes before
				t.Fatalf("%d reads, the limit is %d", r.reads, limit)
			}
		}
		g.limit = maxReads
		if again := processes(t, g); len(again) != len(list) {
			t.Errorf("%d processes afterwards, want %d", len(again), len(list))
		}
	})
}
