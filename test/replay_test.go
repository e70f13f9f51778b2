package test

import (
	"os"
	"path/filepath"
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

	h.must("replay", "one", "--as", "again")
	h.untilSays(bootTime, "sshd", "ps", "again")
	// Nobody watched what processes did when it was recorded.
	h.untilEvent("again", "socket.listening", bootTime, func(e event) bool { return strings.HasSuffix(e.Fields.text("local"), ":22") })
	if n := len(h.events("one", "--kind", "socket.listening")); n != 0 {
		t.Errorf("%d sockets were told of while it was recorded, with --probe off", n)
	}
	h.must("rm", "--force", "again")

	verdict := h.json("replay", "one", "--verify")
	if exact, _ := verdict["exact"].(bool); !exact {
		t.Fatalf("not exact: %v", verdict)
	}
	if said := h.show("one").text("recording"); !strings.Contains(said, "exact: replayed to its end") {
		t.Errorf("show says of the recording: %q", said)
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
