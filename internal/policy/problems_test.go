package policy

import (
	"os"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/rogpeppe/go-internal/txtar"
)

// testdata/problems.txt has rules that are wrong, each with what Parse must say of it.
func TestProblems(t *testing.T) {
	const file = "testdata/problems.txt"
	a, err := txtar.ParseFile(file)
	if err != nil {
		t.Fatal(err)
	}
	for i := 0; i+1 < len(a.Files); i += 2 {
		rule, want := a.Files[i], &a.Files[i+1]
		t.Run(strings.TrimSuffix(rule.Name, ".yaml"), func(t *testing.T) {
			rules, err := Parse(rule.Name, rule.Data, responses)
			if err == nil || rules != nil {
				t.Fatalf("taken: %v", rules)
			}
			got := err.Error() + "\n"
			if *update {
				want.Data = []byte(got)
				return
			}
			if diff := cmp.Diff(string(want.Data), got); diff != "" {
				t.Errorf("want (-), got (+):\n%s", diff)
			}
		})
	}
	if *update {
		os.WriteFile(file, txtar.Format(a), 0o644)
	}
}

// The example of the design names responses that later versions have. Today's must refuse it, and say what there is.
func TestDesignExampleIsRefusedToday(t *testing.T) {
	const example = `id: password-cracking
title: The password file is read, then the CPU stays busy
severity: high
sequence:
  within: 10m
  steps:
    - on: disk.read
      when: event.path in ["/etc/shadow", "/etc/gshadow"]
    - on: cpu.usage
      when: event.percent >= 90.0
      for: 30s
respond: [checkpoint, quarantine, incident]
`
	_, err := Parse("cracking.yaml", []byte(example), responses)
	want := `cracking.yaml:12:11: unknown response "checkpoint": there are alert, pause, quarantine, stop
cracking.yaml:12:35: unknown response "incident": there are alert, pause, quarantine, stop`
	if err == nil || err.Error() != want {
		t.Fatalf("got\n%v\nwant\n%s", err, want)
	}
	later := append([]string{"checkpoint", "incident"}, responses...)
	if _, err := Parse("cracking.yaml", []byte(example), later); err != nil {
		t.Fatalf("with those responses: %v", err)
	}
}

func TestTooLarge(t *testing.T) {
	for name, data := range map[string]string{
		"bytes":    strings.Repeat("# long\n", MaxFile/6),
		"brackets": strings.Repeat("[", 100_000),
		"dashes":   strings.Repeat("- ", 100_000),
		"rules":    strings.Repeat("---\nid: a\n", maxRules+1),
		"when":     "id: a\ntitle: t\nseverity: low\non: disk.read\nwhen: \"" + strings.Repeat("true && ", 3000) + "true\"",
		"deep":     "id: a\ntitle: t\nseverity: low\non: disk.read\nwhen: \"" + strings.Repeat("(", 1000) + "true" + strings.Repeat(")", 1000) + "\"",
	} {
		if _, err := Parse(name, []byte(data), responses); err == nil {
			t.Errorf("%s: taken", name)
		}
	}
}

func TestWatchPaths(t *testing.T) {
	rules, err := Parse("w.yaml", []byte(`
id: a
title: t
severity: low
on: disk.read
when: >-
  event.path == "/a" || "/b" == event.path || event.path in ["/c", "/d"] || event.path.startsWith("/etc/ssh/")
  || (event.path.endsWith("/authorized_keys") && !(event.path == "/not/this")) || event.path.contains("/.ssh/")
  || event.path != "/nor/this"
---
id: b
title: t
severity: low
on: disk.write
when: event.path.matches("^/srv/.*[.]php$")
watch: /srv/**
---
id: c
title: t
severity: low
on: net.dns
when: event.name == "/e"
`), responses)
	if err != nil {
		t.Fatal(err)
	}
	want := []string{"**/.ssh/**", "**/authorized_keys", "/a", "/b", "/c", "/d", "/etc/ssh/**", "/srv/**"}
	if diff := cmp.Diff(want, NewEngine(rules).Watched()); diff != "" {
		t.Error(diff)
	}
}
