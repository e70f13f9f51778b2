package test

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

const ownRules = `
id: secret-read
title: A secret is read
severity: high
on: disk.read
when: event.path == "/root/secret"
respond: [pause]
---
id: said-stop
title: The console says the word
severity: low
on: console.line
when: event.line.contains("xyzzy42")
respond: [stop]
`

// TestRules lets an owner's rules act on a real guest.
func TestRules(t *testing.T) {
	h := newHost(t)
	rules := h.path("rules", "own.yaml")
	if err := os.MkdirAll(filepath.Dir(rules), 0o700); err != nil {
		t.Fatal(err)
	}
	write := func(text string) {
		if err := os.WriteFile(rules, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	write("id: bad\ntitle: Bad\nseverity: high\non: disk.read\nwhen: event.nothing == 1\nrespond: [alert]\n")
	h.refused(1, []string{"own.yaml:5", "nothing"}, "serve")
	h.refused(3, []string{"own.yaml:5"}, "policy", "check", rules)
	write("id: bad\ntitle: Bad\nseverity: high\non: disk.read\nwhen: event.path == \"/x\"\nrespond: [explode]\n")
	h.refused(1, []string{"own.yaml:6", "explode"}, "serve")
	write(ownRules)
	h.refused(0, []string{"secret-read"}, "policy", "check", rules)
	h.serve()
	if out := h.must("policy", "ls"); !strings.Contains(out, "secret-read") || !strings.Contains(out, "password-cracking") {
		t.Errorf("policy ls:\n%s", out)
	}
	g := h.run("one", "--net", "off")
	if out := g.sh("ls -d /dev/virtio-ports /dev/vport* 2>/dev/null; cat /sys/class/virtio-ports/*/name 2>/dev/null; true"); out != "" {
		t.Errorf("a machine without --additions exec has a channel: %s", out)
	}
	g.sh("echo hush >/root/secret; " + dropCaches + "true")
	g.dies("cat /root/secret")
	h.untilState("one", "paused", time.Minute)
	h.untilEvent("one", "response.done", 10*time.Second, func(e event) bool { return e.Fields.text("response") == "pause" })
	h.must("resume", "one")
	g.hangUp()
	g.dies("echo xyz$((0))zy42 | tr -d 0") // so that the echo of what is typed is not the word
	m := h.untilState("one", "stopped", time.Minute)
	if m.text("ended") != "stopped" {
		t.Errorf("ended %s (%s)", m.text("ended"), m.text("reason"))
	}
	alert := h.untilEvent("one", "policy.alert", 10*time.Second, func(e event) bool { return e.Fields.text("rule") == "said-stop" })
	if ids, _ := alert.Fields["events"].([]any); len(ids) != 1 {
		t.Errorf("the alert names no event: %s", alert)
	}
	// What was recorded gives the same alerts again, anywhere.
	recorded := filepath.Join(t.TempDir(), "events.jsonl")
	var text strings.Builder
	for _, line := range strings.SplitAfter(h.must("events", "one", "-o", "json"), "\n") {
		text.WriteString(line)
	}
	if err := os.WriteFile(recorded, []byte(text.String()), 0o600); err != nil {
		t.Fatal(err)
	}
	h.refused(0, []string{"secret-read", "said-stop", "2 alerts"}, "policy", "test", rules, "--events", recorded)
	// A wrong rule leaves the old ones in force.
	write("id: [")
	h.refused(2, []string{"own.yaml"}, "policy", "reload")
	if out := h.must("policy", "ls"); !strings.Contains(out, "secret-read") {
		t.Errorf("after a wrong reload:\n%s", out)
	}
	write(ownRules)
	ledgerFindsTampering(h)
}

// ledgerFindsTampering verifies the ledger of what was done, and copies of it that were changed.
func ledgerFindsTampering(h *host) {
	h.t.Helper()
	h.must("ledger", "verify")
	head := h.json("ledger", "head")
	if head.number("size") < 10 || len(head.text("root")) < 40 {
		h.t.Errorf("head: %v", head)
	}
	h.stopDaemon()
	h.must("ledger", "verify")
	for name, change := range map[string]func(b []byte) []byte{
		"a flipped bit": func(b []byte) []byte { b[len(b)/2] ^= 4; return b },
		"a cut end":     func(b []byte) []byte { return b[:len(b)*2/3] },
	} {
		dir := filepath.Join(h.t.TempDir(), "ledger")
		if err := os.CopyFS(dir, os.DirFS(h.path("ledger"))); err != nil {
			h.t.Fatal(err)
		}
		var bundle string
		filepath.WalkDir(filepath.Join(dir, "tile", "entries"), func(path string, d os.DirEntry, err error) error {
			if err == nil && d.Type().IsRegular() && bundle == "" {
				bundle = path
			}
			return err
		})
		data, err := os.ReadFile(bundle)
		if err != nil {
			h.t.Fatal(err)
		}
		os.Chmod(bundle, 0o600)
		if err := os.WriteFile(bundle, change(data), 0o600); err != nil {
			h.t.Fatal(err)
		}
		if r := h.vigia("ledger", "verify", "--dir", dir); r.status != 3 {
			h.t.Errorf("%s: %s", name, r)
		}
	}
}
