package daemon

import (
	"context"
	"errors"
	"io"
	"log/slog"
	"strings"
	"testing"
	"time"

	"vigia/internal/checkpoint"
	"vigia/internal/event"
	"vigia/internal/inventory"
	"vigia/internal/policy"
)

// TestRulesTurnAMachineBackAFewTimesOnly.
func TestRulesTurnAMachineBackAFewTimesOnly(t *testing.T) {
	var turns []time.Time
	now := time.Unix(1_000_000, 0)
	for i := range turnsMost {
		var err error
		if turns, err = turned(turns, now.Add(time.Duration(i)*time.Minute)); err != nil {
			t.Fatalf("turn %d: %v", i+1, err)
		}
	}
	if _, err := turned(turns, now.Add(turnsWindow-time.Second)); !errors.Is(err, errState) {
		t.Errorf("one too many: %v", err)
	}
	if again, err := turned(turns, now.Add(turnsWindow)); err != nil || len(again) != turnsMost {
		t.Errorf("when the first is old: %v, %v", again, err)
	}
	if again, err := turned(turns, now.Add(-time.Hour)); err != nil || len(again) != 1 {
		t.Errorf("after the clock went back: %v, %v", again, err)
	}
}

// ruled is a daemon with rules and nothing else.
func ruled(t *testing.T, text string) (*Daemon, *[]policy.Decision) {
	t.Helper()
	rules, err := policy.Parse("test.yaml", []byte(text), Responses)
	if err != nil {
		t.Fatal(err)
	}
	b := newBus("0123456789abcdef", slog.New(slog.NewTextHandler(io.Discard, nil)))
	b.engine = policy.NewEngine(rules)
	var decided []policy.Decision
	b.decide = func(p policy.Decision) { decided = append(decided, p) }
	return &Daemon{bus: b, log: b.log}, &decided
}

// TestARuleForbidsEachRollbackItIsToldOf: also one that comes right after another, of another machine too.
func TestARuleForbidsEachRollbackItIsToldOf(t *testing.T) {
	d, decided := ruled(t, "id: no-way-back\ntitle: No\nseverity: high\non: checkpoint.reopens\nwhen: event.high > 0\nmachines: [web]\nrespond: [refuse]\n")
	bad := reopening{items: []inventory.Item{{Kind: "account.enabled", Subject: "eve", Severity: inventory.High}}}
	web, db := newMachine(d, record{}), newMachine(d, record{})
	web.rec.Spec.Name, db.rec.Spec.Name = "web", "db"
	for range 3 {
		if err := web.tellReopens(context.Background(), checkpoint.Record{ID: "ab"}, bad); !errors.Is(err, errState) || !strings.Contains(err.Error(), "no-way-back") {
			t.Errorf("not refused: %v", err)
		}
	}
	if err := web.tellReopens(context.Background(), checkpoint.Record{}, reopening{}); err != nil {
		t.Errorf("nothing comes back: %v", err)
	}
	if err := db.tellReopens(context.Background(), checkpoint.Record{}, bad); err != nil {
		t.Errorf("a machine that the rule is not about: %v", err)
	}
	if len(*decided) != 3 {
		t.Errorf("%d alerts, want 3", len(*decided))
	}
}

// TestAPanicIsAnsweredOnce: what rules ask for of a guest that stands still is not queued beside, and every panic is told.
func TestAPanicIsAnsweredOnce(t *testing.T) {
	d, decided := ruled(t, "id: save\ntitle: Save\nseverity: high\non: machine.panicked\nrespond: [checkpoint]\n")
	var told [][]policy.Decision
	d.bus.panicked = func(machine string, p []policy.Decision) { told = append(told, p) }
	d.bus.emit("web", event.MachinePanicked, nil)
	if len(told) != 1 || len(told[0]) != 1 || !needsGuest(told[0][0]) || len(*decided) != 0 {
		t.Errorf("told %v, queued %v", told, *decided)
	}
	d.bus.emit("web", event.MachinePanicked, nil) // the rule is quiet
	if len(told) != 2 || len(told[1]) != 0 {
		t.Errorf("told %v", told)
	}
	if !saysOf("guard", event.MachinePanicked) || saysOf("gate", event.MachinePanicked) {
		t.Error("a guard tells of panics, a gate does not")
	}
}
