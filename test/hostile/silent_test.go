package hostile

import (
	"strings"
	"testing"
	"time"

	"connectrpc.com/connect"

	"vigia/internal/api/vigiav1"
)

// TestSilentMonitor starts a QEMU that runs and does not say a word on its monitor, and one that says one: the person is
// told so in half the time that a start may take at most, and nothing of it stays.
func TestSilentMonitor(t *testing.T) {
	t.Parallel() // all of it is waiting
	h := stubHost(t)
	for name, want := range map[string]string{"qmp-silent": "has not greeted on its monitor", "qmp-stuck": "has not answered"} {
		began := time.Now()
		_, err := h.client.Machines.Run(t.Context(), connect.NewRequest(&vigiav1.RunRequest{Image: "bare", Name: name, MemoryBytes: 96 << 20}))
		took := time.Since(began)
		if err == nil || !strings.Contains(err.Error(), want) || !strings.Contains(err.Error(), "log") {
			t.Errorf("%s: %v", name, err)
		}
		if took > 30*time.Second {
			t.Errorf("%s: it took %s to fail", name, took)
		}
		t.Log(took, err)
		if left := processesOf(h.state); len(left) != 1 {
			t.Errorf("%s: beside the daemon there are %v", name, left)
		}
	}
}
