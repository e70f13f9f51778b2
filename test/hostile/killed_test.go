package hostile

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"connectrpc.com/connect"

	"vigia/internal/api/vigiav1"
)

// TestKilledGuardIsCounted kills a guard that could not tell what it saw, since the daemon stood still: what is missing in
// the ledger is there as a number.
func TestKilledGuardIsCounted(t *testing.T) {
	h := stubHost(t)
	m := h.run(&vigiav1.RunRequest{Image: "bare", Name: "calm"})
	h.untilLines(m, 3)
	h.daemon.Process.Signal(syscall.SIGSTOP)
	h.untilLines(m, h.lines(m)+10)
	syscall.Kill(int(m.GuardPid), syscall.SIGKILL)
	syscall.Kill(int(m.GatePid), syscall.SIGKILL)
	time.Sleep(200 * time.Millisecond)
	seen := h.lines(m) // by the dead guard: it writes the log first
	h.daemon.Process.Signal(syscall.SIGCONT)
	h.untilLines(m, seen+3)
	h.wantDied(t, "calm", "guard")
	h.wantDied(t, "calm", "gate")

	first, told, lost := "", 0, int64(0)
	h.events("calm", func(e *vigiav1.Event) {
		source, _, _ := strings.Cut(e.Id, "-")
		switch {
		case e.Kind == "console.line" && (first == "" || source == first):
			first, told = source, told+1
		case e.Kind == "vigia.lost" && field(e, "source").GetStringValue() == first:
			lost += int64(field(e, "count").GetNumberValue())
		}
	})
	t.Logf("%d lines of the console were seen, %d of them told, %d events counted as lost", seen, told, lost)
	// Other events than lines are lost too: a count of disk requests, a load.
	if missing := int64(seen - told); missing < 3 || lost < missing || lost > missing+12 {
		t.Errorf("%d of %d lines are missing, and %d events counted as lost", missing, seen, lost)
	}
}

// TestKilledDaemonIsCounted kills a daemon whose ledger could not be written: what it took along is counted by the next.
func TestKilledDaemonIsCounted(t *testing.T) {
	h := stubHost(t)
	time.Sleep(3 * time.Second) // until what the start has asked is told
	thaw := h.freezeLedger(t)
	const asked = 7
	for range asked {
		if _, err := h.client.Machines.Pause(t.Context(), connect.NewRequest(&vigiav1.MachineRequest{Name: "none"})); err == nil {
			t.Fatal("a machine that is not there was paused")
		}
	}
	h.daemon.Process.Kill()
	<-h.ended
	thaw()
	lost := h.lostAfterStart()
	if len(lost) != 1 || lost[0] != asked {
		t.Errorf("%d calls did not come into the ledger, counted as lost: %v", asked, lost)
	}
	time.Sleep(3 * time.Second)
	h.daemon.Process.Kill()
	<-h.ended
	if again := h.lostAfterStart(); len(again) != 1 {
		t.Errorf("after another kill, with nothing to lose: %v", again)
	}
}

// lostAfterStart starts a daemon and lists what the ledger says of losses, by their counts; -1 where there is none.
func (h *host) lostAfterStart() (counts []int64) {
	h.t.Helper()
	h.start(stubDir + ":" + os.Getenv("PATH"))
	h.events("", func(e *vigiav1.Event) {
		if e.Kind != "vigia.lost" {
			return
		}
		if field(e, "count") == nil {
			counts = append(counts, -1)
		} else {
			counts = append(counts, int64(field(e, "count").GetNumberValue()))
		}
	})
	return counts
}

// freezeLedger holds the lock under which a batch is written, until the result is called.
func (h *host) freezeLedger(t *testing.T) (thaw func()) {
	t.Helper()
	f, err := os.OpenFile(filepath.Join(h.state, "ledger", ".state", "batch.lock"), os.O_RDWR, 0)
	if err == nil {
		err = syscall.Flock(int(f.Fd()), syscall.LOCK_EX)
	}
	if err != nil {
		t.Fatal(err)
	}
	return func() { f.Close() }
}

// lines are the whole lines that a machine's serial line has said.
func (h *host) lines(m *vigiav1.Machine) int { return strings.Count(h.console(m), "\n") }

func (h *host) untilLines(m *vigiav1.Machine, n int) {
	h.t.Helper()
	eventually(h.t, time.Minute, fmt.Sprintf("line %d of %s", n, m.Name), func() bool { return h.lines(m) >= n })
}

// wantDied waits for the word that a worker has died.
func (h *host) wantDied(t *testing.T, machine, worker string) {
	t.Helper()
	eventually(t, 20*time.Second, "word of the "+worker+"'s death", func() bool {
		found := false
		h.events(machine, func(e *vigiav1.Event) {
			found = found || e.Kind == "vigia.worker_died" && field(e, "worker").GetStringValue() == worker
		})
		return found
	})
}
