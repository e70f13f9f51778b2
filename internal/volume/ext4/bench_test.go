package ext4

import (
	"flag"
	"os"
	"testing"
	"time"
)

var benchImage = flag.String("image", "", "a disk image with ext4 on it, for BenchmarkBuildImage")

// BenchmarkBuildImage builds the index of a real disk: go test -bench BuildImage -image disk.img
func BenchmarkBuildImage(b *testing.B) {
	if *benchImage == "" {
		b.Skip("no -image")
	}
	f, err := os.Open(*benchImage)
	if err != nil {
		b.Fatal(err)
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		b.Fatal(err)
	}
	found, err := Find(f, info.Size())
	if err != nil || len(found) == 0 {
		b.Fatal(found, err)
	}
	var s Stats
	b.ReportAllocs()
	for b.Loop() {
		w, err := NewTracker(f, found[0], Options{Watch: []string{"/etc/shadow"}})
		if err != nil {
			b.Fatal(err)
		}
		s = w.Stats()
		w.Close()
	}
	b.ReportMetric(float64(s.Inodes), "inodes")
	b.ReportMetric(float64(s.Bytes), "index-bytes")
	b.ReportMetric(float64(s.Runs), "runs")
}

func BenchmarkRead(b *testing.B) {
	tr := loadTrace(b, "htree")
	d := tr.disk()
	for _, r := range tr.records {
		d.apply(r)
	}
	for name, watch := range map[string][]string{"nothing-watched": nil, "watching": {"/etc/shadow", "/etc/passwd"}} {
		w := newTracker(b, d, tr.size, Options{Watch: watch, Access: func(Access) {}})
		for size, n := range map[string]int64{"4k": 4096, "1M": 1 << 20} {
			b.Run(name+"/"+size, func(b *testing.B) {
				off := int64(0)
				for b.Loop() {
					w.Read(off, n)
					if off += 13 * 4096; off+n > tr.size {
						off = 0
					}
				}
			})
			b.Run(name+"/"+size+"/parallel", func(b *testing.B) {
				b.RunParallel(func(pb *testing.PB) {
					off := int64(0)
					for pb.Next() {
						w.Read(off, n)
						if off += 13 * 4096; off+n > tr.size {
							off = 0
						}
					}
				})
			})
		}
	}
}

// BenchmarkOverwrite writes to blocks with a known owner.
func BenchmarkOverwrite(b *testing.B) {
	tr := loadTrace(b, "plain")
	d := tr.disk()
	w := newTracker(b, d, tr.size, Options{})
	f, err := w.fs.Open("/etc/passwd")
	if err != nil {
		b.Fatal(err)
	}
	buf := make([]byte, 4096)
	for b.Loop() {
		w.Written(int64(f.spans[0].start)*4096, buf)
	}
}

// BenchmarkCommit follows whole traces and gives the time of one commit.
func BenchmarkCommit(b *testing.B) {
	for _, name := range []string{"plain", "wrap", "htree", "ext3", "journal"} {
		b.Run(name, func(b *testing.B) {
			tr := loadTrace(b, name)
			var spent time.Duration
			var commits uint64
			for b.Loop() {
				b.StopTimer()
				d := tr.disk()
				w := newTracker(b, d, tr.size, Options{Watch: []string{"/etc/shadow"}})
				b.StartTimer()
				for _, r := range tr.records {
					d.play(w, r)
				}
				s := w.Stats()
				spent, commits = spent+s.CommitTime, commits+s.Commits
			}
			b.ReportMetric(float64(spent.Microseconds())/float64(commits), "µs/commit")
		})
	}
}
