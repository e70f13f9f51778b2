package policy

import (
	"fmt"
	"math/rand/v2"
	"slices"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"vigia/internal/event"
)

// randomRules have steps of every sort with small windows, so that random events meet them often.
const randomRules = `
id: seq
title: t
severity: low
sequence:
  within: 20s
  steps:
    - name: one
      on: [disk.read, disk.write]
      when: event.path == "/a"
    - on: cpu.usage
      when: event.percent > 50.0
      for: 4s
      gap: 3s
    - on: net.flow
      when: event.bytes_out > 5 && steps.one.bytes >= 0
every: 5s
---
id: hold
title: t
severity: low
on: cpu.usage
when: event.percent > 40.0
for: 3s
every: 1s
---
id: count
title: t
severity: low
on: net.flow
count: {at_least: 4, within: 8s, by: event.remote}
every: 1s
---
id: distinct
title: t
severity: low
on: net.flow
count: {at_least: 4, within: 8s, distinct: event.remote}
every: 1s
---
id: weight
title: t
severity: low
on: net.denied
count: {at_least: 40, within: 8s, weight: event.count}
every: 1s
`

func randomEvent(r *rand.Rand, i int, at time.Time) event.Event {
	e := event.Event{ID: fmt.Sprintf("e%d", i), Machine: fmt.Sprint("m", r.IntN(3)), Time: at}
	switch r.IntN(5) {
	case 0:
		e.Kind, e.Fields = event.DiskRead, event.Fields{"path": []string{"/a", "/b"}[r.IntN(2)], "bytes": int64(r.IntN(3))}
	case 1:
		e.Kind, e.Fields = event.NetFlow, event.Fields{"remote": fmt.Sprint("h", r.IntN(6)), "bytes_out": int64(r.IntN(20))}
	case 2:
		e.Kind, e.Fields = event.NetDenied, event.Fields{"count": int64(r.IntN(20) - 2)}
	default:
		e.Kind, e.Fields = event.CPUUsage, event.Fields{"percent": 35 + 65*r.Float64()}
	}
	return e
}

func randomEvents(seed uint64, n int) []event.Event {
	r := rand.New(rand.NewPCG(seed, 1))
	at := Epoch
	var events []event.Event
	for i := range n {
		at = at.Add(time.Duration(r.IntN(900)) * time.Millisecond)
		late := at
		if r.IntN(10) == 0 {
			late = at.Add(-time.Duration(r.IntN(40_000)) * time.Millisecond)
		}
		events = append(events, randomEvent(r, i, late))
	}
	return events
}

func parseRules(t testing.TB, text string) []Rule {
	t.Helper()
	rules, err := Parse("test.yaml", []byte(text), responses)
	if err != nil {
		t.Fatal(err)
	}
	return rules
}

func runAll(e *Engine, events []event.Event) (all []Decision) {
	for _, ev := range events {
		all = append(all, e.Event(ev)...)
	}
	return all
}

// Whatever the wall clock: ticks, restarts and what other machines do change no alert.
func TestAlertsDependOnTheEventsAlone(t *testing.T) {
	rules := parseRules(t, randomRules)
	alerts := map[string]int{}
	for seed := range uint64(20) {
		events := randomEvents(seed, 800)
		want := runAll(NewEngine(rules), events)
		for _, d := range want {
			alerts[d.Rule]++
		}
		if diff := cmp.Diff(want, runTicking(rules, events)); diff != "" {
			t.Fatalf("seed %d, with ticks:\n%s", seed, diff)
		}
		if diff := cmp.Diff(want, runRestarting(t, rules, events, seed)); diff != "" {
			t.Fatalf("seed %d, with restarts:\n%s", seed, diff)
		}
		if diff := cmp.Diff(want, runApart(rules, events)); diff != "" {
			t.Fatalf("seed %d, machine by machine:\n%s", seed, diff)
		}
	}
	for _, r := range rules {
		if alerts[r.ID] == 0 {
			t.Errorf("%s never alerted: the test tests nothing of it", r.ID)
		}
	}
}

func runTicking(rules []Rule, events []event.Event) (all []Decision) {
	e := NewEngine(rules)
	newest := map[string]time.Time{}
	for i, ev := range events {
		all = append(all, e.Event(ev)...)
		if ev.Time.After(newest[ev.Machine]) {
			newest[ev.Machine] = ev.Time
		}
		least := ev.Time
		for _, n := range newest {
			if n.Before(least) {
				least = n
			}
		}
		if i%3 == 0 {
			all = append(all, e.Tick(least)...)
		}
	}
	return all
}

func runRestarting(t *testing.T, rules []Rule, events []event.Event, seed uint64) (all []Decision) {
	r := rand.New(rand.NewPCG(seed, 2))
	e := NewEngine(rules)
	for _, ev := range events {
		all = append(all, e.Event(ev)...)
		if r.IntN(10) == 0 {
			state, err := e.Snapshot()
			if err != nil {
				t.Fatal(err)
			}
			e = NewEngine(rules)
			if err := e.Restore(state); err != nil {
				t.Fatal(err)
			}
		}
	}
	return all
}

func runApart(rules []Rule, events []event.Event) (all []Decision) {
	engines := map[string]*Engine{}
	for _, ev := range events {
		if engines[ev.Machine] == nil {
			engines[ev.Machine] = NewEngine(rules)
		}
		all = append(all, engines[ev.Machine].Event(ev)...)
	}
	return all
}

// A guest that sends whatever it likes makes the engine keep no more than its bounds.
func TestStateIsBounded(t *testing.T) {
	rules := parseRules(t, `
id: a
title: t
severity: low
sequence:
  within: 168h
  steps:
    - on: disk.read
    - on: net.flow
      count: {at_least: 1000, within: 168h, by: event.remote, distinct: event.name}
    - on: machine.removed
---
id: b
title: t
severity: low
on: net.flow
count: {at_least: 1000, within: 168h, by: event.remote}
`)
	e := NewEngine(rules)
	at := Epoch
	for i := range 8_000 {
		at = at.Add(time.Millisecond)
		kind := event.NetFlow
		if i%50 == 0 {
			kind = event.DiskRead
		}
		ev := event.Event{ID: fmt.Sprint(i), Machine: "m", Time: at, Kind: kind, Fields: event.Fields{}}
		if kind == event.NetFlow {
			ev.Fields["remote"], ev.Fields["name"] = fmt.Sprint(i%3000), fmt.Sprint(i)
		}
		e.Event(ev)
	}
	m := e.machines["m"]
	for _, p := range m.rules {
		if len(p.open) > maxSequences {
			t.Errorf("%d sequences", len(p.open))
		}
		stages := []*stage{&p.root}
		for _, q := range p.open {
			stages = append(stages, &q.stage)
		}
		for _, st := range stages {
			marks := 0
			for _, g := range st.groups {
				marks += len(g.Marks)
			}
			if len(st.groups) > maxGroups || marks > maxMarks+1 || marks != st.marks {
				t.Errorf("%d groups, %d marks, %d known", len(st.groups), marks, st.marks)
			}
		}
	}
	for i := range maxMachines + 100 {
		e.Event(event.Event{ID: "x", Machine: fmt.Sprint(i), Time: at, Kind: event.DiskRead})
	}
	if len(e.machines) > maxMachines {
		t.Errorf("%d machines", len(e.machines))
	}
	s := e.Stats()
	if s.Dropped == 0 || s.Groups == 0 || s.Forgotten == 0 {
		t.Errorf("let go without counting: %+v", s)
	}
	e.Tick(at.Add(400 * 24 * time.Hour))
	if len(e.machines) != 0 {
		t.Errorf("%d machines kept for nothing", len(e.machines))
	}
}

func TestRemovedMachineIsForgotten(t *testing.T) {
	rules := parseRules(t, randomRules)
	e := NewEngine(rules)
	e.Event(event.Event{ID: "1", Machine: "m", Time: Epoch, Kind: event.DiskRead, Fields: event.Fields{"path": "/a"}})
	e.Event(event.Event{ID: "2", Machine: "m", Time: Epoch, Kind: event.MachineRemoved})
	if len(e.machines) != 0 {
		t.Error("kept")
	}
}

func TestRestoreLeavesOutWhatChanged(t *testing.T) {
	const text = "id: a\ntitle: t\nseverity: low\nsequence: {within: 1m, steps: [{on: disk.read}, {on: disk.write}]}\n"
	rules := parseRules(t, text)
	e := NewEngine(rules)
	read := event.Event{ID: "1", Machine: "m", Time: Epoch, Kind: event.DiskRead}
	write := event.Event{ID: "2", Machine: "m", Time: Epoch.Add(time.Second), Kind: event.DiskWrite}
	e.Event(read)
	state, err := e.Snapshot()
	if err != nil {
		t.Fatal(err)
	}
	same, other := NewEngine(rules), NewEngine(parseRules(t, text+"about: changed\n"))
	for _, e := range []*Engine{same, other} {
		if err := e.Restore(state); err != nil {
			t.Fatal(err)
		}
	}
	if n := len(same.Event(write)); n != 1 {
		t.Errorf("the same rule forgot: %d alerts", n)
	}
	if n := len(other.Event(write)); n != 0 {
		t.Errorf("another rule took over: %d alerts", n)
	}
	for _, bad := range []string{"", "{}", "[]", `{"version":1,"machines":{"m":null}}`,
		`{"version":1,"machines":{"m":{"rules":{"a":{"print":"` + rules[0].print + `","open":[{"next":7}]}}}}}`} {
		if err := same.Restore([]byte(bad)); err == nil {
			t.Errorf("took %q", bad)
		}
	}
}

// A condition that costs too much does not hold, is counted, and stops nothing else.
func TestDearConditionIsCutOff(t *testing.T) {
	rules := parseRules(t, `
id: dear
title: t
severity: low
on: net.dns
when: event.answers.all(a, event.answers.all(b, event.answers.all(c, a + b + c != "")))
---
id: cheap
title: t
severity: low
on: net.dns
`)
	e := NewEngine(rules)
	began := time.Now()
	got := e.Event(event.Event{ID: "1", Machine: "m", Time: Epoch, Kind: event.NetDNS,
		Fields: event.Fields{"answers": slices.Repeat([]string{"192.0.2.1"}, 1000)}})
	if len(got) != 1 || got[0].Rule != "cheap" || e.Stats().Errors != 1 {
		t.Fatalf("%v, %+v", got, e.Stats())
	}
	if took := time.Since(began); took > 5*time.Second {
		t.Errorf("took %v", took)
	}
}

func FuzzParse(f *testing.F) {
	for _, name := range []string{"rules/password-cracking.yaml", "rules/persistence.yaml", "rules/ssh-brute-force.yaml"} {
		data, _ := starter.ReadFile(name)
		f.Add(data)
	}
	f.Add([]byte("id: &a [*a]\n? - - x\n"))
	f.Add([]byte("sequence: {steps: [{on: disk.read, when: |\n  event.\n}]}"))
	f.Fuzz(func(t *testing.T, data []byte) {
		rules, err := Parse("fuzz.yaml", data, responses)
		if (err == nil) == (len(rules) == 0) {
			t.Fatalf("%d rules and %v", len(rules), err)
		}
		runAll(NewEngine(rules), randomEvents(1, 50))
	})
}

func FuzzEngine(f *testing.F) {
	rules, err := Parse("fuzz.yaml", []byte(randomRules), responses)
	if err != nil {
		f.Fatal(err)
	}
	f.Add(uint64(1), uint64(2), []byte("0123456789"))
	f.Fuzz(func(t *testing.T, seed, step uint64, kinds []byte) {
		r := rand.New(rand.NewPCG(seed, step))
		var events []event.Event
		at := Epoch
		for i, k := range kinds {
			at = at.Add(time.Duration(int8(k)) * time.Duration(step%2000+1) * time.Millisecond)
			events = append(events, randomEvent(r, i, at))
		}
		a, b := runAll(NewEngine(rules), events), runRestarting(t, rules, events, seed)
		if diff := cmp.Diff(a, b); diff != "" {
			t.Fatal(diff)
		}
	})
}

func BenchmarkStarterRules(b *testing.B) {
	e := NewEngine(starterRules(b))
	events := []event.Event{
		{ID: "a", Machine: "m", Kind: event.DiskRead, Fields: event.Fields{"path": "/etc/shadow", "bytes": int64(4096)}},
		{ID: "b", Machine: "m", Kind: event.CPUUsage, Fields: event.Fields{"percent": 12.0}},
		{ID: "c", Machine: "m", Kind: event.NetFlow, Fields: event.Fields{"direction": "out", "protocol": "tcp", "remote": "192.0.2.1:443", "bytes_in": int64(9)}},
		{ID: "d", Machine: "m", Kind: event.DiskWrite, Fields: event.Fields{"path": "/var/log/syslog"}},
	}
	b.ReportAllocs()
	for i := range b.N {
		ev := events[i%len(events)]
		ev.Time = Epoch.Add(time.Duration(i) * 100 * time.Millisecond)
		e.Event(ev)
	}
}
