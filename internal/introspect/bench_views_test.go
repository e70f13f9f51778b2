package introspect

import (
	"testing"

	"vigia/internal/memory"
)

var _ = memory.ErrNoRAM

func BenchmarkLiveViews(b *testing.B) {
	g, _, _ := live(b)
	for _, v := range []struct {
		name string
		f    func() (int, error)
	}{
		{"processes", func() (int, error) { l, err := g.Processes(); return len(l), err }},
		{"modules", func() (int, error) { l, err := g.Modules(); return len(l), err }},
		{"sockets", func() (int, error) { l, err := g.Sockets(); return len(l), err }},
		{"tables", func() (int, error) { l, err := g.SocketsByTables(); return len(l), err }},
		{"files", func() (int, error) { l, err := g.Files(0); return len(l), err }},
		{"maps", func() (int, error) { l, err := g.Maps(1); return len(l), err }},
		{"system", func() (int, error) { _, err := g.System(); return 1, err }},
		{"cpu", func() (int, error) { l, err := g.CPU(nil); return len(l), err }},
	} {
		b.Run(v.name, func(b *testing.B) {
			b.ReportAllocs()
			n := 0
			for b.Loop() {
				var err error
				if n, err = v.f(); err != nil {
					b.Fatal(err)
				}
			}
			b.ReportMetric(float64(n), "rows")
			b.ReportMetric(float64(g.limit-g.meter.left), "reads")
		})
	}
}
