package image

import (
	"os"
	"testing"
	"time"

	"vigia/internal/volume"
)

// TestBuildForReal runs mmdebstrap: too heavy for every run. VIGIA_BUILD_IMAGES names the store to build into, and
// VIGIA_BUILD_RECIPES the recipes.
func TestBuildForReal(t *testing.T) {
	dir := os.Getenv("VIGIA_BUILD_IMAGES")
	if dir == "" {
		t.Skip("VIGIA_BUILD_IMAGES is not set")
	}
	s, err := Open(dir, Options{Cache: dir + "-cache"})
	if err != nil {
		t.Fatal(err)
	}
	r, err := Load(os.Getenv("VIGIA_BUILD_RECIPE"))
	if err != nil {
		t.Fatal(err)
	}
	began, last := time.Now(), ""
	img, err := s.Build(t.Context(), r, "", func(step string, done, total int64) {
		if step != last {
			t.Logf("%6.1f %s", time.Since(began).Seconds(), step)
		}
		last = step
	})
	if err != nil {
		t.Fatal(err)
	}
	if raw := os.Getenv("VIGIA_BUILD_RAW"); raw != "" {
		exportRaw(t, img, raw)
	}
	t.Logf("%6.1f %+v %s", time.Since(began).Seconds(), img.Info, img.Cmdline)
}

// exportRaw writes an image's disk as a raw file.
func exportRaw(t *testing.T, img Image, name string) {
	layers, err := img.OpenDisk()
	if err != nil {
		t.Fatal(err)
	}
	defer layers[0].Close()
	v, err := volume.Open(layers, nil, volume.Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer v.Close()
	if err := create(name, func(f *os.File) error { return v.Export(f, nil) }); err != nil {
		t.Fatal(err)
	}
}
