package jail

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"
)

func decode(t *testing.T, raw []byte, v any) {
	t.Helper()
	if err := json.Unmarshal(raw, v); err != nil {
		t.Fatalf("%v: %s", err, raw)
	}
}

// sleeper starts the captive in QEMU's place, from this very process.
func sleeper(t *testing.T, tag string) *Process {
	t.Helper()
	p, err := QEMU{Binary: captive, Args: []string{"try", "sleep"}, Tag: tag}.Start(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { p.Kill(); <-p.Done(); p.Close() })
	return p
}

func TestProcess(t *testing.T) {
	p := sleeper(t, "")
	select {
	case <-p.Done():
		t.Fatalf("it ended: %s", p.Exit())
	default:
	}
	if err := p.Kill(); err != nil {
		t.Fatal(err)
	}
	if e := p.Exit(); !e.Known || e.Signal != syscall.SIGKILL {
		t.Errorf("exit %s", e)
	}
	if err := p.Kill(); err != nil {
		t.Errorf("killing it again: %v", err)
	}
}

func TestAdopt(t *testing.T) {
	p := sleeper(t, "")
	if _, err := Adopt(p.PID, p.StartTime+1); !errors.Is(err, ErrGone) {
		t.Errorf("another start time: %v", err)
	}
	if _, err := Adopt(-1, 0); !errors.Is(err, ErrGone) {
		t.Errorf("pid -1 would be everything: %v", err)
	}
	again, err := Adopt(p.PID, p.StartTime)
	if err != nil {
		t.Fatal(err)
	}
	defer again.Close()
	if err := again.Kill(); err != nil {
		t.Fatal(err)
	}
	<-again.Done()
	if e := again.Exit(); e.Known {
		t.Errorf("an adopted process can't tell its exit: %s", e)
	}
	<-p.Done()
	if _, err := Adopt(p.PID, p.StartTime); !errors.Is(err, ErrGone) {
		t.Errorf("after its end: %v", err)
	}
}

// The one supplementary group that a user may be given is the one it has.
func TestDeviceGroup(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("needs root")
	}
	p, err := QEMU{Binary: captive, Args: []string{"try", "sleep"}, User: &User{UID: 1879048193, GID: 1879048193, Device: 1879048200}}.Start(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer p.Close()
	o, err := Observe(p.PID)
	p.Kill()
	<-p.Done()
	if err != nil || len(o.Groups) != 1 || o.Groups[0] != 1879048200 {
		t.Errorf("groups %v: %v", o.Groups, err)
	}
}

// A flood of its log ends a process at the bound, not the host's disk.
func TestMaxFile(t *testing.T) {
	log, err := os.Create(filepath.Join(t.TempDir(), "log"))
	if err != nil {
		t.Fatal(err)
	}
	defer log.Close()
	p, err := QEMU{Binary: captive, Args: []string{"try", "flood"}, Stderr: log, MaxFile: 1 << 20}.Start(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer p.Close()
	exit := p.Exit()
	if st, err := log.Stat(); err != nil || st.Size() > 1<<20 || st.Size() < 1<<19 || exit.Code == 0 && exit.Signal == 0 {
		t.Errorf("%s, and its log has %d bytes", exit, st.Size())
	}
}

// A process outlives the daemon that started it, and is found again.
func TestSurvivesTheDaemon(t *testing.T) {
	for _, c := range callers() {
		out, err := c.command("leave", c.give).Output()
		if err != nil {
			t.Fatalf("%v: %s", err, out)
		}
		var ref struct {
			PID   int
			Start uint64
		}
		decode(t, out, &ref)
		p, err := Adopt(ref.PID, ref.Start)
		if err != nil {
			t.Fatal(err)
		}
		if err := p.Kill(); err != nil {
			t.Error(err)
		}
		<-p.Done()
		p.Close()
	}
}

func TestStartErrors(t *testing.T) {
	dir := t.TempDir()
	script := filepath.Join(dir, "script")
	os.WriteFile(script, []byte("#!/bin/sh\n"), 0o755)
	truncated := filepath.Join(dir, "truncated")
	elf, _ := os.ReadFile(captive)
	os.WriteFile(truncated, elf[:5000], 0o755)
	for name, c := range map[string]struct {
		q    QEMU
		want string
	}{
		"no program":        {QEMU{}, "no program named"},
		"missing program":   {QEMU{Binary: "/nonexistent/qemu"}, "/nonexistent"},
		"not an executable": {QEMU{Binary: script}, "not an ELF"},
		"truncated":         {QEMU{Binary: truncated}, "truncated"},
		"missing bind":      {QEMU{Binary: captive, Binds: []Bind{{Source: "/nonexistent/ram"}}}, "/nonexistent/ram"},
		"relative bind":     {QEMU{Binary: captive, Binds: []Bind{{Source: "etc"}}}, "clean absolute"},
		"climbing bind":     {QEMU{Binary: captive, Binds: []Bind{{Source: "/etc", Target: "/a/../../b"}}}, "clean absolute"},
		"root as a bind":    {QEMU{Binary: captive, Binds: []Bind{{Source: "/"}}}, "clean absolute"},
	} {
		t.Run(name, func(t *testing.T) {
			p, err := c.q.Start(t.Context())
			if err == nil {
				p.Kill()
				<-p.Done()
				t.Fatal("started")
			}
			if !errors.Is(err, ErrNotStarted) || !strings.Contains(err.Error(), c.want) {
				t.Errorf("%v, want %q", err, c.want)
			}
		})
	}
}

// A worker that does not confine itself is ended when the time is over; so is one whose caller gives up.
func TestRogueWorker(t *testing.T) {
	for _, c := range callers() {
		o := c.drive(t, "rogue", "", "live")["live"]
		if !strings.Contains(o.Error, "not confined in time") {
			t.Errorf("%s: %+v", c.name, o)
		}
	}
}

// Confine in a process that was not told how refuses.
func TestConfineUnordered(t *testing.T) {
	out, err := exec.Command(captive, "worker", "guard", "live").CombinedOutput()
	if err == nil || !bytes.Contains(out, []byte("started by vigia serve")) {
		t.Errorf("%v: %s", err, out)
	}
	if _, err := Confine(Guard); !errors.Is(err, ErrNotOrdered) {
		t.Errorf("%v", err)
	}
}

// Killed at any instant of a start, a daemon leaves processes at most that Leftovers finds and removes.
func TestKilledDaemonLeavesNothing(t *testing.T) {
	state := "jailtest" + filepath.Base(t.TempDir()) + time.Now().Format("150405.000")
	search := Search{State: state, Known: func(string, int) bool { return false }, Keep: func(string) bool { return false }}
	found := 0
	for _, c := range callers() {
		for i := range 24 {
			cmd := c.command("leave", c.give, state+"/m/qemu")
			if err := cmd.Start(); err != nil {
				t.Fatal(err)
			}
			time.Sleep(time.Duration(i) * 400 * time.Microsecond)
			cmd.Process.Kill()
			cmd.Wait()
			found += sweep(t, search)
		}
		c.command("leave", c.give, state+"/m/qemu").Run()
		if sweep(t, search) < 1 { // or more: a start that was cut short may have been on its way
			t.Errorf("%s: the process that was left was not found", c.name)
		}
	}
	time.Sleep(50 * time.Millisecond)
	sweep(t, search)
	t.Logf("%d processes were left by killed starts", found)
}

// sweep removes until nothing is found: a start that was cut short may yet be on its way.
func sweep(t *testing.T, s Search) int {
	t.Helper()
	n := 0
	for range 50 {
		left, err := Leftovers(s)
		if err != nil {
			t.Fatal(err)
		}
		if len(left) == 0 {
			return n
		}
		for _, l := range left {
			if err := l.Remove(); err != nil {
				t.Fatalf("%s: %v", l, err)
			}
			n++
		}
	}
	t.Fatal("there is always more")
	return n
}

// Cancelling a start ends what was started.
func TestCancelledStart(t *testing.T) {
	state := "jailcancel" + time.Now().Format("150405.000")
	for i := range 10 {
		ctx, cancel := context.WithTimeout(t.Context(), time.Duration(i)*3*time.Millisecond)
		p, err := QEMU{Binary: captive, Args: []string{"try", "sleep"}, Tag: state + "/m/qemu"}.Start(ctx)
		cancel()
		if err == nil {
			p.Kill()
			<-p.Done()
			p.Close()
		}
	}
	search := Search{State: state, Known: func(string, int) bool { return false }, Keep: func(string) bool { return false }}
	if left, err := Leftovers(search); err != nil || len(left) > 0 {
		t.Errorf("%v %v", left, err)
	}
}
