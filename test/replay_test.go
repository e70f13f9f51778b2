package test

import (
	"bufio"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"
)

// TestReplay records a guest that is typed at and talked to, and replays it: the same console and disk, with eyes on it that were not there
// when it was recorded, and without touching the one that was.
func TestReplay(t *testing.T) {
	h := newHost(t)
	h.serve()
	h.refused(2, []string{"cpus", "recorded has one"}, "run", "tiny", "two", "--record", "--cpus", "2")
	h.must("run", "tiny", "one", "--memory", "256M", "--record", "--publish", "0:22", "--probe", "off")
	g := h.guest("one")
	h.untilSays(3*bootTime, "root@tiny", "console", "one", "--log")
	h.refused(1, []string{"runs", "stop it"}, "replay", "one")
	h.refused(1, []string{"recorded or replayed"}, "checkpoint", "one")
	h.vigiaWith(strings.NewReader("echo $$ >/root/kept; sync; echo did$((1+1))it\n"), "console", "one", "--wait", "10s")
	h.untilSays(time.Minute, "did2it", "console", "one", "--log")
	g.until("the published port answers", time.Minute, func() bool { return banner(g.port(0)) != "" })
	h.must("stop", "one")
	if said := h.show("one").text("recording"); !strings.Contains(said, "not yet replayed") {
		t.Errorf("show says of the recording: %q", said)
	}

	h.stopAndGo()
	h.must("rm", "--force", "again")
	if said := h.show("one").text("recording"); !strings.Contains(said, "not yet replayed") {
		t.Errorf("a replay that somebody ended is a verdict: %q", said)
	}

	verdict := h.json("replay", "one", "--verify")
	if exact, _ := verdict["exact"].(bool); !exact {
		t.Fatalf("not exact: %v", verdict)
	}
	if said := h.show("one").text("recording"); !strings.Contains(said, "exact: replayed to its end") {
		t.Errorf("show says of the recording: %q", said)
	}
	if reason := verdict.text("reason"); !strings.Contains(reason, " frames") || strings.Contains(reason, " 0 frames") {
		t.Errorf("the network's frames were not compared: %s", reason)
	}
	h.untilEvent("one-replay", "replay.ended", 10*time.Second, func(e event) bool { return e.Fields["exact"] == true })

	// A log that is not what was recorded ends the replay, and is not called exact.
	log := filepath.Join(h.path("machines"), h.show("one").text("id"), "recording.log")
	b, err := os.ReadFile(log)
	if err != nil {
		t.Fatal(err)
	}
	for i := len(b) / 2; i < len(b)/2+64; i++ {
		b[i] ^= 0x55
	}
	if err := os.WriteFile(log, b, 0o600); err != nil {
		t.Fatal(err)
	}
	h.refused(3, []string{"not known to be exact"}, "replay", "one", "--verify")
}

// stopAndGo replays the machine one as the machine again, which stops at a time, goes on to an event and by a number of instructions, and goes back; each time it is
// what it was there before. A debugger sees it too.
func (h *host) stopAndGo() {
	h.t.Helper()
	t := h.t
	h.refused(2, []string{"process.begun"}, "replay", "one", "--until", "process.begun")
	h.refused(2, []string{"moment"}, "replay", "one", "--until", "+soon")
	h.refused(2, []string{"it was recorded from"}, "replay", "one", "--until", "+100h")
	h.refused(1, []string{"does not replay"}, "seek", "one", "1000")

	// Nobody watched what processes did when it was recorded.
	early := h.stoppedAt(h.json("replay", "one", "--as", "again", "--gdb", "--until", "+1s"))
	at := h.json("seek", "again", "socket.listening,local=*:22")
	listening := h.stoppedAt(at)
	if early >= listening {
		t.Errorf("a second after the begin it is at instruction %d, and sshd listens at %d", early, listening)
	}
	if exact, _ := at.object("replay")["exact"].(bool); !exact {
		t.Errorf("it did not stop at the event: %v", at["replay"])
	}
	if n := len(h.events("one", "--kind", "socket.listening")); n != 0 {
		t.Errorf("%d sockets were told of while it was recorded, with --probe off", n)
	}
	there := h.processes("again")
	if !strings.Contains(there, "sshd") {
		t.Errorf("sshd listens, and is not among the processes:\n%s", there)
	}
	h.untilEvent("again", "replay.stopped", 10*time.Second, func(e event) bool { return e.Fields["exact"] == true })

	ahead := listening + 20_000_000
	if n := h.stoppedAt(h.json("seek", "again", strconv.FormatInt(ahead, 10))); n != ahead {
		t.Errorf("it was to stop at instruction %d, and is at %d", ahead, n)
	}
	later := h.processes("again")
	// Back: from the beginning again.
	if n := h.stoppedAt(h.json("seek", "again", strconv.FormatInt(listening, 10))); n != listening {
		t.Errorf("it was to go back to instruction %d, and is at %d", listening, n)
	}
	if now := h.processes("again"); now != there {
		t.Errorf("at instruction %d there are now the processes\n%s\nbefore\n%s", listening, now, there)
	}
	if n := h.stoppedAt(h.json("seek", "again", strconv.FormatInt(ahead, 10))); n != ahead {
		t.Errorf("it was to stop at instruction %d, and is at %d", ahead, n)
	}
	if now := h.processes("again"); now != later {
		t.Errorf("at instruction %d there are now the processes\n%s\nbefore\n%s", ahead, now, later)
	}
	h.debug(h.show("again").object("replay").text("gdb"))
}

// stoppedAt is where a replay stands.
func (h *host) stoppedAt(m object) int64 {
	h.t.Helper()
	if m.text("state") != "paused" {
		h.t.Errorf("a replay that has stopped is %s", m.text("state"))
	}
	n := int64(m.object("replay").number("instruction"))
	if n <= 0 {
		h.t.Fatalf("a replay stopped at %v", m["replay"])
	}
	return n
}

// processes are all of a machine's, as text.
func (h *host) processes(name string) string {
	var lines []string
	for _, p := range h.list("ps", name) {
		lines = append(lines, fmt.Sprint(p["pid"], p["ppid"], p["comm"], p["cpu_seconds"], p["start"]))
	}
	slices.Sort(lines)
	return strings.Join(lines, "\n")
}

// debug asks the debugger's port for the registers (the remote serial protocol of gdb's manual), and goes away.
func (h *host) debug(path string) {
	h.t.Helper()
	info, err := os.Stat(filepath.Dir(path))
	if err != nil || info.Mode().Perm()&0o077 != 0 && os.Geteuid() != 0 {
		h.t.Errorf("the debugger's port lies where others come: %v, %v", info, err)
	}
	c, err := net.Dial("unix", path)
	if err != nil {
		h.t.Fatal(err)
	}
	defer c.Close()
	c.SetDeadline(time.Now().Add(30 * time.Second))
	in := bufio.NewReader(c)
	ask := func(packet string) string {
		sum := byte(0)
		for i := range len(packet) {
			sum += packet[i]
		}
		fmt.Fprintf(c, "$%s#%02x", packet, sum)
		if _, err := in.ReadString('$'); err != nil {
			h.t.Fatalf("the debugger's port does not answer %s: %v", packet, err)
		}
		answer, err := in.ReadString('#')
		if err != nil {
			h.t.Fatal(err)
		}
		io.CopyN(io.Discard, in, 2)
		fmt.Fprint(c, "+")
		return strings.TrimSuffix(answer, "#")
	}
	if s := ask("?"); !strings.HasPrefix(s, "T") {
		h.t.Errorf("it stands: %q", s)
	}
	if s := ask("g"); len(s) < 16*17 {
		h.t.Errorf("registers: %q", s)
	}
}
