package hostile

import (
	"os"
	"path/filepath"
	"syscall"
	"testing"
	"time"

	"vigia/internal/api/vigiav1"
)

const heardRule = `
id: heard
title: The machine has said its first word
severity: high
on: console.line
when: event.line.startsWith("disk 2 ")
respond: [quarantine, pause]
`

// TestDaemonDiesBetweenAlertAndResponse kills the daemon when it has told an alert and carries out the first response: the
// next one carries out all of them.
func TestDaemonDiesBetweenAlertAndResponse(t *testing.T) {
	h := newHost(t, "")
	makeImage(t, filepath.Join(h.state, "images"))
	if err := os.MkdirAll(filepath.Join(h.state, "rules"), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(h.state, "rules", "heard.yaml"), []byte(heardRule), 0o600); err != nil {
		t.Fatal(err)
	}
	path := stubDir + ":" + os.Getenv("PATH")
	h.start(path)
	m := h.run(&vigiav1.RunRequest{Image: "bare", Name: "calm"})
	syscall.Kill(int(m.GatePid), syscall.SIGSTOP) // the first response waits for it
	responses := func() map[string]string {
		found := map[string]string{}
		h.events("calm", func(e *vigiav1.Event) {
			switch e.Kind {
			case "policy.alert":
				found["alert"] += "told "
			case "response.done", "response.failed":
				found[field(e, "response").GetStringValue()] += e.Kind + " "
			}
		})
		return found
	}
	eventually(t, time.Minute, "the alert", func() bool { return responses()["alert"] != "" })
	h.daemon.Process.Kill()
	<-h.ended
	syscall.Kill(int(m.GatePid), syscall.SIGCONT)
	h.start(path)
	eventually(t, time.Minute, "the last response", func() bool { return responses()["pause"] != "" })
	found := responses()
	t.Log(found)
	for _, r := range []string{"quarantine", "pause"} {
		if found[r] != "response.done " {
			t.Errorf("%s: %q", r, found[r])
		}
	}
	if found["alert"] != "told " {
		t.Errorf("the alert: %q", found["alert"])
	}
	if now, err := h.show("calm"); err != nil || now.State != "paused" {
		t.Errorf("the machine is %v, %v", now, err)
	}
	told := h.events("calm", nil)
	if told["response.quarantined"] != 1 || told["machine.paused"] != 1 {
		t.Errorf("events: %v", told)
	}
}
