package introspect

import (
	"cmp"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"vigia/internal/kernel"
)

// packed is a pack of the modules that a guest has loaded, as an image has it.
func packed(b *testing.B, g *Guest, files fileTree) ModuleFiles {
	list, err := g.Modules()
	if err != nil {
		b.Fatal(err)
	}
	var names []string
	for _, m := range list {
		names = append(names, files[m.Name])
	}
	f, err := os.CreateTemp(b.TempDir(), "modules")
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { f.Close() })
	read := func(file string) ([]byte, error) {
		if strings.HasSuffix(file, ".xz") {
			name := kernel.ModuleName(file)
			return files.Module(name)
		}
		return fs.ReadFile(os.DirFS("/"), file[1:])
	}
	if _, err := kernel.PackModules(f, names, read); err != nil {
		b.Fatal(err)
	}
	st, _ := f.Stat()
	pack, err := kernel.OpenModulePack(f, st.Size())
	if err != nil {
		b.Fatal(err)
	}
	return pack
}

// BenchmarkSavedCheck measures all checks of a guest together, made again, but for what is asked of QEMU and of the guest's agent.
func BenchmarkSavedCheck(b *testing.B) {
	files, _ := filepath.Glob(filepath.Join(os.Getenv("VIGIA_TEST_SAVED"), "*.ram"))
	for _, file := range files {
		name := strings.TrimSuffix(filepath.Base(file), ".ram")
		g := openSaved(b, file)
		ref, modules := savedCode(b, g, name)
		g.UseReference(ref, nil, packed(b, g, modules))
		c := NewChecker(g, nil)
		run := func() map[string]float64 {
			r, err := c.Run(true)
			if err != nil {
				b.Fatal(err)
			}
			for _, f := range r.Findings {
				if f.Serious() {
					b.Errorf("%+v", f)
				}
			}
			took := map[string]float64{}
			for _, v := range r.Views {
				took[v.Check] += v.TookMS
			}
			return took
		}
		begin := cpuTime()
		run()
		first := cpuTime() - begin
		b.Run(name, func(b *testing.B) {
			begin := cpuTime()
			least := map[string]float64{}
			for b.Loop() {
				for check, ms := range run() {
					if was, ok := least[check]; !ok || ms < was {
						least[check] = ms
					}
				}
			}
			b.ReportMetric(float64((cpuTime()-begin).Microseconds())/1000/float64(b.N), "cpu-ms/op")
			b.ReportMetric(float64(first.Microseconds())/1000, "first-cpu-ms")
			for _, check := range slices.SortedFunc(maps.Keys(least), func(x, y string) int { return cmp.Compare(least[y], least[x]) })[:6] {
				b.Logf("%-18s %.2f ms at best", check, least[check])
			}
		})
	}
}

// BenchmarkSavedText measures the comparison of code: the kernel's alone and with its modules', when it is made again.
func BenchmarkSavedText(b *testing.B) {
	files, _ := filepath.Glob(filepath.Join(os.Getenv("VIGIA_TEST_SAVED"), "*.ram"))
	for _, file := range files {
		name := strings.TrimSuffix(filepath.Base(file), ".ram")
		g := openSaved(b, file)
		ref, modules := savedCode(b, g, name)
		pack := packed(b, g, modules)
		for _, c := range []struct {
			name  string
			files ModuleFiles
		}{{"kernel", nil}, {"all", pack}} {
			b.Run(name+"/"+c.name, func(b *testing.B) {
				if _, _, err := g.CheckText(ref, c.files); err != nil {
					b.Fatal(err)
				}
				begin := cpuTime()
				for b.Loop() {
					if _, _, err := g.CheckText(ref, c.files); err != nil {
						b.Fatal(err)
					}
				}
				b.ReportMetric(float64((cpuTime()-begin).Microseconds())/1000/float64(b.N), "cpu-ms/op")
			})
		}
	}
}
