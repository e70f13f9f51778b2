package ledger

import (
	"os"
	"path/filepath"
	"runtime/debug"
	"strings"
	"syscall"
	"testing"
	"time"
)

// What an idle ledger costs. It takes long, so it runs only when asked: VIGIA_IDLE=20s.
func TestIdleCost(t *testing.T) {
	wait, err := time.ParseDuration(os.Getenv("VIGIA_IDLE"))
	if err != nil {
		t.Skip("set VIGIA_IDLE to how long to look")
	}
	began := time.Now()
	l := open(t, filepath.Join(t.TempDir(), "ledger"))
	t.Logf("ready in %v", time.Since(began))
	appendAll(t, l, entries(0, 1000))
	debug.FreeOSMemory()
	before := cpu()
	time.Sleep(wait)
	used := cpu() - before
	status, _ := os.ReadFile("/proc/self/status")
	for _, line := range strings.Split(string(status), "\n") {
		if strings.HasPrefix(line, "VmRSS") {
			t.Log(line)
		}
	}
	t.Logf("idle: %.2f %% of a core", 100*used.Seconds()/wait.Seconds())
	if share := used.Seconds() / wait.Seconds(); share > 0.01 {
		t.Errorf("more than 1 %% of a core")
	}
}

func cpu() time.Duration {
	var u syscall.Rusage
	syscall.Getrusage(syscall.RUSAGE_SELF, &u)
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}
