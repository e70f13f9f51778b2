package introspect

import (
	"bufio"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"vigia/internal/kernel"
	"vigia/internal/memory"
)

// saved calls test with each guest whose memory is saved in the directory VIGIA_TEST_SAVED: NAME.ram, a q35 machine's RAM
// file, and NAME.txt, a line of which is "kernel FILE". They are too large to be kept with the sources.
func saved(t *testing.T, test func(t *testing.T, g *Guest)) {
	dir := os.Getenv("VIGIA_TEST_SAVED")
	if dir == "" {
		t.Skip("VIGIA_TEST_SAVED names no directory of saved memory")
	}
	files, err := filepath.Glob(filepath.Join(dir, "*.ram"))
	if err != nil || len(files) == 0 {
		t.Fatalf("no saved memory in %s: %v", dir, err)
	}
	for _, file := range files {
		t.Run(strings.TrimSuffix(filepath.Base(file), ".ram"), func(t *testing.T) { test(t, openSaved(t, file)) })
	}
}

var savedProfiles = map[string]*kernel.Profile{}

func openSaved(t testing.TB, file string) *Guest {
	t.Helper()
	p, m := openSavedWith(t, file)
	return attach(t, m, p)
}

func openSavedWith(t testing.TB, file string) (*kernel.Profile, *memory.RAM) {
	t.Helper()
	about, err := os.Open(strings.TrimSuffix(file, ".ram") + ".txt")
	if err != nil {
		t.Skip(err)
	}
	defer about.Close()
	image := ""
	for lines := bufio.NewScanner(about); lines.Scan(); {
		if name, value, ok := strings.Cut(lines.Text(), " "); ok && name == "kernel" {
			image = strings.TrimSpace(value)
		}
	}
	p := savedProfiles[image]
	if p == nil {
		kf, err := os.Open(image)
		if err != nil {
			t.Fatal(err)
		}
		defer kf.Close()
		st, err := kf.Stat()
		if err != nil {
			t.Fatal(err)
		}
		if p, err = kernel.Build(kf, st.Size()); err != nil {
			t.Fatal(err)
		}
		savedProfiles[image] = p
	}
	f, err := os.Open(file)
	if err != nil {
		t.Fatal(err)
	}
	st, err := f.Stat()
	if err != nil {
		t.Fatal(err)
	}
	m, err := memory.Map(f, memory.Q35Layout(uint64(st.Size())))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { m.Close() })
	return p, m
}

// TestSavedControl: nothing is wrong with a healthy guest. What is listed and how long it takes is shown with -v.
func TestSavedControl(t *testing.T) {
	saved(t, func(t *testing.T, g *Guest) {
		var all time.Duration
		for _, c := range controls {
			begin := time.Now()
			list, looked, err := g.control(c.look)
			took := time.Since(begin)
			all += took
			if err != nil {
				t.Errorf("%s: %v", c.name, err)
			}
			t.Logf("%s: %d followed, %d findings, %d reads, %v", c.name, looked, len(list), g.limit-g.meter.left, took)
			for _, f := range list {
				line := fmt.Sprintf("%s | %s | %s | %s", f.Severity, f.Kind, f.Subject, f.Detail)
				if f.Serious() {
					t.Error(line)
				} else {
					t.Log(line)
				}
			}
		}
		t.Logf("all: %v", all)
	})
}

// BenchmarkSavedControl measures the checks of control flow: those of each second, and all.
func BenchmarkSavedControl(b *testing.B) {
	files, _ := filepath.Glob(filepath.Join(os.Getenv("VIGIA_TEST_SAVED"), "*.ram"))
	for _, file := range files {
		for _, full := range []bool{false, true} {
			name := strings.TrimSuffix(filepath.Base(file), ".ram") + "/second"
			if full {
				name = strings.TrimSuffix(filepath.Base(file), ".ram") + "/all"
			}
			b.Run(name, func(b *testing.B) {
				g := openSaved(b, file)
				begin := cpuTime()
				for b.Loop() {
					for _, c := range controls {
						if full || c.cheap {
							if _, err := g.look(c.look); err != nil {
								b.Fatal(err)
							}
						}
					}
				}
				b.ReportMetric(float64((cpuTime()-begin).Microseconds())/1000/float64(b.N), "cpu-ms/op")
			})
		}
	}
}

// cpuTime is what this process has used: the same on a busy host.
func cpuTime() time.Duration {
	var u unix.Rusage
	_ = unix.Getrusage(unix.RUSAGE_SELF, &u)
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}
