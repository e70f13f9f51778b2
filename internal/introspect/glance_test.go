package introspect

import (
	"testing"

	"vigia/internal/kernel"
)

// TestGlances holds the quick look to the thorough one, on memory that does not change.
func TestGlances(t *testing.T) {
	onRecordings(t, func(t *testing.T, r *recorded, p *kernel.Profile) {
		g := attach(t, r, p)
		list, err := g.Glances(nil)
		if err != nil {
			t.Fatal(err)
		}
		want := processes(t, g)
		if len(list) != len(want) {
			t.Fatalf("%d processes, want %d", len(list), len(want))
		}
		zombies := 0
		for i, p := range list {
			w := want[i]
			if p.Task != w.Task || p.PID != w.PID || p.StartTime != w.StartTime || p.Kernel != w.Kernel || p.Zombie != (w.State == "Z") {
				t.Errorf("pid %d: %+v, want %+v", w.PID, p, w)
			}
			if !p.Kernel && (p.UID != w.UID || p.EUID != w.EUID || p.Threads != int64(w.Threads)) {
				t.Errorf("pid %d: %+v, want %+v", w.PID, p, w)
			}
			if p.Zombie {
				zombies++
			}
		}
		if zombies != 1 {
			t.Errorf("%d zombies, want one", zombies)
		}
	})
}

func BenchmarkGlances(b *testing.B) {
	r, p := load(b, recordings[0])
	g := attach(b, r, p)
	var list []Glance
	b.ReportAllocs()
	for b.Loop() {
		list, _ = g.Glances(list[:0])
	}
}
