package hostile

import (
	"context"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"connectrpc.com/connect"

	"vigia/internal/api/vigiav1"
	"vigia/internal/vm"
)

// rogueAttacks are what a guard or gate does that its guest has taken over, those of a row at once. With "!": the ledger
// tells that the worker was replaced, since it breaks the protocol.
var rogueAttacks = [][]string{
	{"large", "half", "replies", "cancels", "silent", "deaf!"},
	{"garbage!", "huge!", "zero!", "nesting!", "same-id", "other-machine!"},
	{"large-calls", "endless-lines", "endless-facts", "descriptors", "unclaimed!"},
	{"other-source!", "other-kind!", "daemons-kind!", "no-kind!", "other-workers-kind!"},
	{"other-calls", "large-answers", "wrong-answers", "refusing", "long-hello"},
}

// TestRogueGuard and TestRogueGate put a program in a worker's place that speaks to the daemon as badly as it can.
func TestRogueGuard(t *testing.T) { rogueAll(t, "guard") }
func TestRogueGate(t *testing.T)  { rogueAll(t, "gate") }

func rogueAll(t *testing.T, worker string) {
	h := newHost(t, "")
	makeImage(t, filepath.Join(h.state, "images"))
	dir, err := os.MkdirTemp(filepath.Dir(rogue), "rogue-") // of its own: the word of who is rogue lies beside the program
	if err != nil {
		t.Fatal(err)
	}
	os.Chmod(dir, 0o755)
	h.program = filepath.Join(dir, "vigia")
	if err := os.Link(rogue, h.program); err != nil {
		t.Fatal(err)
	}
	h.start(stubDir + ":" + os.Getenv("PATH"))
	calm := h.run(&vigiav1.RunRequest{Image: "bare", Name: "calm"})
	ledger, descriptors := h.used("ledger"), descriptorsOf(t, h.daemon.Process.Pid)
	for _, row := range rogueAttacks {
		t.Run(strings.Join(row, " "), func(t *testing.T) {
			seen := h.watch("calm")
			disk, net := h.progress(calm)
			var all sync.WaitGroup
			for _, a := range row {
				name, told := strings.TrimSuffix(a, "!"), strings.HasSuffix(a, "!")
				if h.startRogue(t, dir, name, worker) {
					all.Go(func() { h.rogue(t, name, worker, told) })
				}
			}
			h.wentOn(t, calm, disk, net)
			asked := time.Now()
			if _, err := h.show("calm"); err != nil || time.Since(asked) > answerMost {
				t.Errorf("show calm took %s: %v", time.Since(asked), err)
			}
			all.Wait()
			seen.check(t)
		})
	}
	for kind, n := range h.events("calm", nil) {
		if kind == "vigia.worker_died" || kind == "vigia.lost" {
			t.Errorf("of the other machine there are %d %s", n, kind)
		}
	}
	if now := descriptorsOf(t, h.daemon.Process.Pid); now > descriptors+20 {
		t.Errorf("the daemon holds %d descriptors, %d before", now, descriptors)
	}
	grown := h.used("ledger") - ledger
	t.Logf("the ledger grew by %d KiB", grown>>10)
	if grown > 96<<20 { // the day's budgets of two machines, and what tells of the others
		t.Errorf("the ledger grew by %d MiB", grown>>20)
	}
}

// startRogue starts a machine one of whose workers is rogue; if it dies, a real one takes its place.
func (h *host) startRogue(t *testing.T, dir, name, worker string) bool {
	t.Helper()
	as := filepath.Join(dir, "rogue")
	if err := os.WriteFile(as, []byte(worker+" "+name), 0o644); err != nil {
		t.Fatal(err)
	}
	defer os.Remove(as)
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	_, err := h.client.Machines.Run(ctx, connect.NewRequest(&vigiav1.RunRequest{Image: "bare", Name: name, MemoryBytes: 96 << 20}))
	if err != nil && name != "long-hello" {
		t.Logf("%s is not started: %v", name, err)
	}
	return err == nil
}

// rogueTime is how long an attack lasts before somebody looks at its machine.
const rogueTime = 2 * time.Second

func (h *host) rogue(t *testing.T, name, worker string, told bool) {
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	time.Sleep(rogueTime)
	h.askRogue(t, ctx, name, worker)
	if told {
		h.wantDied(t, name, worker)
	}
	h.remove(ctx, name)
}

// askRogue asks for what needs the worker: an answer or an error comes, in time; and what shuts the machine off its network
// does not depend on the gate's will.
func (h *host) askRogue(t *testing.T, ctx context.Context, name, worker string) {
	t.Helper()
	began := time.Now()
	if _, err := h.show(name); err != nil {
		t.Errorf("show %s: %v", name, err)
	}
	if took := time.Since(began); took > answerMost {
		t.Errorf("show %s took %s", name, took)
	}
	if worker == "guard" {
		short, cancel := context.WithTimeout(ctx, 2*time.Second)
		defer cancel()
		h.client.Views.Processes(short, connect.NewRequest(&vigiav1.MachineRequest{Name: name}))
		return
	}
	began = time.Now()
	if _, err := h.client.Machines.Quarantine(ctx, connect.NewRequest(&vigiav1.MachineRequest{Name: name})); err != nil {
		if m, _ := h.show(name); m == nil || m.State != string(vm.Failed) {
			t.Errorf("quarantine %s: %v", name, err)
		}
		return
	}
	if m, err := h.show(name); err != nil || m.State != "quarantined" && m.State != string(vm.Failed) {
		t.Errorf("%s after quarantine: %v, %v", name, m.GetState(), err)
	}
	if took := time.Since(began); took > answerMost {
		t.Errorf("quarantine %s took %s", name, took)
	}
}

func descriptorsOf(t *testing.T, pid int) int {
	t.Helper()
	entries, err := os.ReadDir(filepath.Join("/proc", itoa(pid), "fd"))
	if err != nil {
		t.Fatal(err)
	}
	return len(entries)
}
