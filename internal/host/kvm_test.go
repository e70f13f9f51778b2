package host

import (
	"os"
	"testing"
	"time"
)

// The try itself, where there is a device at all: it runs or it fails, but it comes back.
func TestRunGuestCode(t *testing.T) {
	if _, err := os.Stat("/dev/kvm"); err != nil {
		t.Skip("no /dev/kvm")
	}
	began := time.Now()
	err := runGuestCode("/dev/kvm")
	t.Logf("%v after %v", err, time.Since(began))
}
