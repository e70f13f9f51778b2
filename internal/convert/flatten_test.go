package convert

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"vigia/internal/volume"
)

// TestLayersAreMergedByNumber: what comes as layers is merged into what comes last, and a question that makes no sense writes nothing.
func TestLayersAreMergedByNumber(t *testing.T) {
	dir := t.TempDir()
	base := layer(t, dir, "base", "root:x:0:0::/root:/bin/bash\n", "root:*:1:0:9:7:::\n")
	files := []string{base, filepath.Join(dir, "over.vol"), filepath.Join(dir, "merged.vol")}
	low, err := os.Open(base)
	if err != nil {
		t.Fatal(err)
	}
	info, err := volume.ReadInfo(low)
	if err != nil {
		t.Fatal(err)
	}
	over, err := os.Create(files[1])
	if err != nil {
		t.Fatal(err)
	}
	if err := volume.Create(over, volume.CreateOptions{Size: info.Size, Parent: info.ID}); err != nil {
		t.Fatal(err)
	}
	v, err := volume.Open([]*os.File{low}, over, volume.Options{})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := v.WriteAt([]byte(strings.Repeat("v", 8192)), 1<<20); err != nil {
		t.Fatal(err)
	}
	id, err := v.Freeze()
	if err != nil {
		t.Fatal(err)
	}
	v.Close()
	if _, err := os.Create(files[2]); err != nil {
		t.Fatal(err)
	}
	ask := func(n string) error {
		_, err := answer([]string{"flatten", n}, func(n int) *os.File {
			f, err := os.OpenFile(files[n], os.O_RDWR, 0)
			if err != nil {
				t.Fatal(err)
			}
			return f
		})
		return err
	}
	for _, bad := range []string{"", "1", "-2", "x", "255"} {
		if ask(bad) == nil {
			t.Errorf("%q layers are merged", bad)
		}
	}
	if st, err := os.Stat(files[2]); err != nil || st.Size() != 0 {
		t.Fatalf("written to: %v %v", st, err)
	}
	if err := ask("2"); err != nil {
		t.Fatal(err)
	}
	merged, err := os.Open(files[2])
	if err != nil {
		t.Fatal(err)
	}
	if is, err := volume.ReadInfo(merged); err != nil || !is.Frozen || is.ID != id || !is.Parent.IsZero() {
		t.Errorf("%+v %v", is, err)
	}
}
