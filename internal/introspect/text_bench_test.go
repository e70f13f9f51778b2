package introspect

import (
	"io/fs"
	"os"
	"path/filepath"
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
