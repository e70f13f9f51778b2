package inputs

import (
	"fmt"
	"testing"
)

// BenchmarkAdd is what a frame loop pays for a record, and how fast the disk's side follows.
func BenchmarkAdd(b *testing.B) {
	for _, size := range []int{100, 1500, 64 << 10} {
		b.Run(fmt.Sprint(size), func(b *testing.B) {
			l := open(b, files(b, 14), Bounds{Bytes: 56 << 20})
			data := make([]byte, size)
			b.SetBytes(int64(size))
			for b.Loop() {
				l.Add(Record{Kind: Data, Flow: 1, Data: data})
			}
			l.mu.Lock()
			b.ReportMetric(float64(l.missing.Flow)/float64(b.N), "missing/op")
			l.mu.Unlock()
			l.Close()
		})
	}
}
