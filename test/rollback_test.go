package test

import (
	"encoding/json"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"
)

// reopened is what `rollback` lists.
type reopened struct {
	Left    string
	Reopens []struct{ Kind, Subject, Detail, Severity string }
}

func (r reopened) has(kind, subject string) bool {
	return slices.ContainsFunc(r.Reopens, func(i struct{ Kind, Subject, Detail, Severity string }) bool {
		return i.Kind == kind && i.Subject == subject
	})
}

// TestWhatARollbackReopens: an intruder's account and key are taken out of a guest, and a rollback would bring them back. It says
// so before, a rule forbids it, and once the rule is gone it happens; the state that was left can be gone back to.
func TestWhatARollbackReopens(t *testing.T) {
	h := newHost(t)
	rules := h.path("rules", "own.yaml")
	if err := os.MkdirAll(filepath.Dir(rules), 0o700); err != nil {
		t.Fatal(err)
	}
	const refuses = "id: no-way-back\ntitle: A rollback would let somebody in again\nseverity: high\non: checkpoint.reopens\nwhen: event.high + event.critical > 0\nrespond: [refuse]\n"
	if err := os.WriteFile(rules, []byte(refuses), 0o600); err != nil {
		t.Fatal(err)
	}
	h.serve()
	g := h.run("one", "--net", "off")
	g.sh("useradd -m -s /bin/bash eve && usermod -p '$6$salt$%s' eve && mkdir -p /root/.ssh && echo '%s' >/root/.ssh/authorized_keys && sync", strings.Repeat("h", 86), eveKey)
	h.must("checkpoint", "one", "--label", "intruded", "--stable")
	g.sh("usermod -L eve; rm /root/.ssh/authorized_keys; cp /bin/true /usr/local/bin/new-suid; sync")

	dry := h.reopens(3, "rollback", "one", "--dry-run")
	if !dry.has("account.enabled", "eve") || !dry.has("key.returns", "root") {
		t.Errorf("a locked account and a removed key would come back, and the list is %+v", dry.Reopens)
	}
	if n := len(h.list("checkpoints", "one")); n != 1 {
		t.Errorf("asking left %d checkpoints, of which one is the first", n)
	}
	h.refused(1, []string{"no-way-back", "refuses"}, "rollback", "one")
	if g.sh("ls /root/.ssh") != "" {
		t.Error("a refused rollback has happened")
	}
	h.untilEvent("one", "checkpoint.reopens", 10*time.Second, func(e event) bool { return e.Fields.text("left") != "" })

	if err := os.Remove(rules); err != nil {
		t.Fatal(err)
	}
	h.must("policy", "reload")
	done := h.reopens(0, "rollback", "one")
	if done.Left == "" || !done.has("account.enabled", "eve") {
		t.Errorf("rolled back: %+v", done)
	}
	g.hangUp()
	if got := g.sh("ls /root/.ssh"); !strings.Contains(got, "authorized_keys") {
		t.Errorf("the guest is not as it was: %q", got)
	}
	h.must("rollback", "one", done.Left, "--at-once")
	g.hangUp()
	if got := g.sh("ls /root/.ssh /usr/local/bin"); strings.Contains(got, "authorized_keys") || !strings.Contains(got, "new-suid") {
		t.Errorf("the state that was left is not there again: %q", got)
	}
	h.must("stop", "one", "--force")
	if off := h.reopens(3, "rollback", "one", "--dry-run"); !off.has("account.enabled", "eve") {
		t.Errorf("of a machine that does not run: %+v", off)
	}
	h.refused(2, []string{"no-such-file"}, "rollback", "one", "--dry-run", "--vulnerabilities", "/no-such-file")
}

const eveKey = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIEXiKb2wG0SkjFcVvCyzHqkFZMmh0kBTYoI5JfWVQqWP eve@far"

func (h *host) reopens(status int, args ...string) (r reopened) {
	h.t.Helper()
	got := h.vigia(append(args, "-o", "json")...)
	if got.status != status {
		h.t.Fatalf("want status %d: %s", status, got)
	}
	if err := json.Unmarshal([]byte(got.stdout), &r); err != nil {
		h.t.Fatalf("%v: %s", err, got)
	}
	return r
}
