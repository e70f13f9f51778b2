package introspect

import (
	"errors"
	"strings"
	"testing"
	"time"
)

// TestSavedClockAndRandomness: of each kernel both are found where they are known to lie.
func TestSavedClockAndRandomness(t *testing.T) {
	saved(t, func(t *testing.T, g *Guest) {
		now, err := g.Clock()
		if year := now.Year(); err != nil || year < 2025 || year > 2100 {
			t.Errorf("its clock says %s: %v", now, err)
		}
		n, err := g.Reseeds()
		if err != nil || n == 0 || n > 1000 {
			t.Errorf("it has reseeded %d times: %v", n, err)
		}
		// Debian's cloud kernel 6.1 is built without the driver, all others have it.
		if cloud := strings.Contains(g.profile.Version(), "cloud") && strings.HasPrefix(g.profile.Version(), "6.1."); HearsOfClones(g.profile) == cloud {
			t.Errorf("%s: has the driver of vmgenid: %v", g.profile.Version(), !cloud)
		}
		t.Logf("%s, %d reseeds, vmgenid %v", now.UTC().Format(time.RFC3339Nano), n, HearsOfClones(g.profile))
	})
}

// ignore takes one error for none.
func ignore(err, what error) error {
	if errors.Is(err, what) {
		return nil
	}
	return err
}
