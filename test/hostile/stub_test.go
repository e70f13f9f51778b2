package hostile

import (
	"bytes"
	"context"
	"strings"
	"testing"
	"time"

	"connectrpc.com/connect"

	"vigia/internal/api/vigiav1"
	"vigia/internal/vm"
)

// Bounds of what an attack may take of the host.
const (
	answerMost   = 10 * time.Second // for the daemon to answer, on a busy machine
	entriesMost  = 250              // of the ledger, a second: 50 of each net kind, 20 lines, and what is told once
	ledgerMost   = 512 << 10        // bytes of the ledger on the disk, a second
	burstEntries = 1500             // and once: what the limiters let through before they bite
	burstBytes   = 8 << 20
	consoleMost  = (16 + 2*8) << 20
	attackTime   = 3 * time.Second
)

// attack is one sub-test: what the stub named so does, and what may come of it.
type attack struct {
	name string
	// use, if given, is what a person does meanwhile; its errors are his, its end is awaited.
	use func(h *host, ctx context.Context, name string)
	// told are kinds of events of which at least one must be there.
	told      []string
	additions []string
	refused   bool // the machine need not start
}

// TestHostileDisk has QEMU misuse the guard's NBD server.
func TestHostileDisk(t *testing.T) {
	attackAll(t, attack{name: "nbd-begin"}, attack{name: "nbd-requests"}, attack{name: "disk-reads", told: []string{"disk.read"}},
		attack{name: "disk-shadow", told: []string{"disk.read"}})
}

// TestHostileMonitor has QEMU lie on its monitor.
func TestHostileMonitor(t *testing.T) {
	t.Parallel() // most of it is waiting
	attackAll(t, attack{name: "qmp-endless"}, attack{name: "qmp-garbage", refused: true}, attack{name: "qmp-answers"}, attack{name: "qmp-nesting"},
		attack{name: "qmp-deaf", use: (*host).press}, attack{name: "qmp-resets", told: []string{"machine.rebooted"}})
}

// TestHostileCard has QEMU flood the gate.
func TestHostileCard(t *testing.T) {
	attackAll(t, attack{name: "net-length"}, attack{name: "net-zero"}, attack{name: "net-storm", told: []string{"net.denied"}},
		attack{name: "net-flows"}, attack{name: "net-deaf"}, attack{name: "net-names", told: []string{"net.dns"}})
}

// TestHostileConsole has QEMU write 100 MB of what terminals and line readers choke on.
func TestHostileConsole(t *testing.T) {
	attackAll(t, attack{name: "console-flood", told: []string{"console.line"}}, attack{name: "console-lines", told: []string{"console.line"}},
		attack{name: "console-escape", told: []string{"console.line"}})
}

// TestHostileAgent has a guest agent lie while a person runs commands and copies files.
func TestHostileAgent(t *testing.T) {
	var all []attack
	for _, name := range []string{"agent-endless", "agent-marks", "agent-lies", "agent-large", "agent-deaf"} {
		all = append(all, attack{name: name, additions: []string{vm.AdditionExec}, use: (*host).talk})
	}
	attackAll(t, all...)
}

// attackAll runs attacks one after the other, beside a machine that behaves.
func attackAll(t *testing.T, attacks ...attack) {
	h := stubHost(t)
	calm := h.run(&vigiav1.RunRequest{Image: "bare", Name: "calm"})
	for _, a := range attacks {
		t.Run(a.name, func(t *testing.T) { h.attacked(t, a, calm) })
	}
}

// attacked runs one attack and measures it.
func (h *host) attacked(t *testing.T, a attack, calm *vigiav1.Machine) {
	r := &vigiav1.RunRequest{Image: "bare", Name: a.name, MemoryBytes: 96 << 20, Additions: a.additions}
	entries, ledger := h.entries(), h.used("ledger")
	began := time.Now()
	ctx, cancel := context.WithTimeout(t.Context(), 60*time.Second)
	defer cancel()
	res, err := h.client.Machines.Run(ctx, connect.NewRequest(r))
	if a.refused {
		// A guard whose QEMU breaks the protocol gives it up: at the start the machine is not kept, a moment later it runs
		// for as long as replacements of its guard are tried.
		disk, net := h.progress(calm)
		if err == nil {
			h.remove(ctx, a.name)
		}
		h.wentOn(t, calm, disk, net)
		return
	}
	if err != nil {
		t.Fatalf("%v\n%s", err, h.said())
	}
	seen := h.watch(a.name, "calm")
	disk, net := h.progress(calm)
	if a.use != nil {
		use, cancel := context.WithTimeout(ctx, attackTime)
		a.use(h, use, a.name)
		cancel()
	}
	if left := attackTime - time.Since(began); left > 0 {
		time.Sleep(left)
	}
	h.answers(t, a.name)
	h.wentOn(t, calm, disk, net)
	seen.check(t)
	if used := h.used("machines", res.Msg.Id, "console.log") + h.used("machines", res.Msg.Id, "console.tail0") + h.used("machines", res.Msg.Id, "console.tail1"); used > consoleMost {
		t.Errorf("its console log takes %d MiB", used>>20)
	}
	if used := h.used("machines", res.Msg.Id); used > 192<<20 {
		t.Errorf("the machine takes %d MiB on the disk", used>>20)
	}
	h.remove(ctx, a.name)
	seconds := time.Since(began).Seconds()
	grown, room := h.entries()-entries, h.used("ledger")-ledger
	t.Logf("ledger: %.0f entries/s, %.0f KiB/s", float64(grown)/seconds, float64(room>>10)/seconds)
	if grown > burstEntries+int64(entriesMost*seconds) || room > burstBytes+int64(ledgerMost*seconds) {
		t.Errorf("the ledger grew by %d entries and %d KiB in %.0f seconds", grown, room>>10, seconds)
	}
	counts := h.events(a.name, nil)
	for _, kind := range a.told {
		if counts[kind] == 0 {
			t.Errorf("nothing was told of: no %s event in %v", kind, counts)
		}
	}
}

// answers asks the daemon what a person would.
func (h *host) answers(t *testing.T, name string) {
	t.Helper()
	began := time.Now()
	m, err := h.show(name)
	if err != nil {
		t.Errorf("show %s: %v", name, err)
	} else if !strings.Contains("running failed stopped", m.State) {
		t.Errorf("%s is %s: %s", name, m.State, m.Reason)
	}
	if _, err := h.show("calm"); err != nil {
		t.Errorf("show calm: %v", err)
	}
	if took := time.Since(began); took > answerMost {
		t.Errorf("the daemon took %s to answer", took)
	}
}

// progress counts the rounds of disk and network that a machine which behaves has done.
func (h *host) progress(m *vigiav1.Machine) (disk, net int) {
	said := h.console(m)
	return strings.Count(said, "disk "), strings.Count(said, "net ")
}

// wentOn waits for more rounds: some, however busy the host is.
func (h *host) wentOn(t *testing.T, m *vigiav1.Machine, diskBefore, netBefore int) {
	t.Helper()
	end := time.Now().Add(15 * time.Second)
	for {
		disk, net := h.progress(m)
		if disk >= diskBefore+2 && net >= netBefore+2 {
			break
		}
		if time.Now().After(end) {
			t.Errorf("the other machine stands still: %d rounds of disk, %d of network", disk-diskBefore, net-netBefore)
			return
		}
		time.Sleep(100 * time.Millisecond)
	}
	if strings.Contains(h.console(m), "corrupt") {
		t.Error("the other machine's disk is damaged")
	}
}

// talk tries the guest channel: what comes back may be nonsense, in bounds.
func (h *host) talk(ctx context.Context, name string) {
	done := make(chan struct{})
	go func() {
		defer close(done)
		s, err := h.client.Machines.Exec(ctx, connect.NewRequest(&vigiav1.ExecRequest{Name: name, Command: []string{"id"}, TimeoutSeconds: 3}))
		if err != nil {
			return
		}
		defer s.Close()
		for s.Receive() {
		}
	}()
	s, err := h.client.Machines.CopyOut(ctx, connect.NewRequest(&vigiav1.CopyOutRequest{Name: name, Path: "/etc/hostname"}))
	if err == nil {
		for s.Receive() {
		}
		s.Close()
	}
	in := h.client.Machines.CopyIn(ctx)
	if in.Send(&vigiav1.CopyInRequest{Name: name, Path: "/x", Mode: 0o644, Data: bytes.Repeat([]byte("x"), 100<<10)}) == nil {
		in.CloseAndReceive()
	}
	<-done
}

// press asks a deaf monitor for things.
func (h *host) press(ctx context.Context, name string) {
	h.client.Machines.Pause(ctx, connect.NewRequest(&vigiav1.MachineRequest{Name: name}))
}
