package policy

import (
	"flag"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/rogpeppe/go-internal/txtar"
)

var responses = []string{"alert", "pause", "quarantine", "stop"}

var update = flag.Bool("update", false, "write the alerts that the scenarios give into them")

func starterRules(t testing.TB) []Rule {
	t.Helper()
	rules, err := Starter(responses)
	if err != nil {
		t.Fatal(err)
	}
	return rules
}

func scenarios(t testing.TB) []string {
	t.Helper()
	names, err := filepath.Glob("testdata/*.txtar")
	if err != nil || len(names) == 0 {
		t.Fatal("no scenarios", err)
	}
	return names
}

func scenario(t testing.TB, file string) *Scenario {
	t.Helper()
	data, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	s, err := ParseScenario(filepath.Base(file), data, responses)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func TestScenarios(t *testing.T) {
	for _, file := range scenarios(t) {
		t.Run(strings.TrimSuffix(filepath.Base(file), ".txtar"), func(t *testing.T) {
			s := scenario(t, file)
			got := FormatAlerts(s.Run())
			if *update {
				rewrite(t, file, got)
				return
			}
			if diff := cmp.Diff(s.Alerts, got); diff != "" {
				t.Errorf("%s\nwant (-), got (+):\n%s", s.Comment, diff)
			}
		})
	}
}

func rewrite(t *testing.T, file, alerts string) {
	t.Helper()
	a, err := txtar.ParseFile(file)
	if err != nil {
		t.Fatal(err)
	}
	for i := range a.Files {
		if a.Files[i].Name == "alerts" {
			a.Files[i].Data = []byte(alerts)
		}
	}
	if err := os.WriteFile(file, txtar.Format(a), 0o644); err != nil {
		t.Fatal(err)
	}
}

// Each rule that ships must be shown at work: alerting in one scenario at least.
func TestEveryStarterRuleHasItsScenario(t *testing.T) {
	found := map[string]bool{}
	for _, file := range scenarios(t) {
		for _, d := range scenario(t, file).Run() {
			found[d.Rule] = true
		}
	}
	for _, r := range starterRules(t) {
		if !found[r.ID] {
			t.Errorf("no scenario makes %s alert", r.ID)
		}
	}
}
