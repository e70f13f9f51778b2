package image

import (
	"os"
	"testing"
	"time"
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
	t.Logf("%6.1f %+v %s", time.Since(began).Seconds(), img.Info, img.Cmdline)
}
