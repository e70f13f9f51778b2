package probe

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"vigia/internal/event"
)

var errGone = errors.New("gone")

// scene is a guest made by hand.
type scene struct {
	pulse   Pulse
	tasks   []Glance
	who     map[int64]Process
	modules []Module
}

func (s *scene) Pulse() (Pulse, error) { return s.pulse, nil }

func (s *scene) Glances(list []Glance) ([]Glance, error) { return append(list, s.tasks...), nil }

func (s *scene) Describe(g Glance) (Process, error) {
	p, ok := s.who[g.PID]
	if !ok {
		return Process{}, errGone
	}
	return p, nil
}

func (s *scene) Modules() ([]Module, error) { return s.modules, nil }

// fork adds a process that is a copy of its parent; exec makes it another program.
func (s *scene) fork(pid int64) {
	s.pulse.Forks++
	s.tasks = append(s.tasks, Glance{Task: uint64(pid) << 8, StartTime: uint64(pid), PID: pid, Image: 1, Threads: 1, Forked: true})
	s.who[pid] = Process{Comm: "sh", Exe: "/bin/sh", Cmdline: "sh"}
}

func (s *scene) at(pid int64) *Glance {
	return &s.tasks[slices.IndexFunc(s.tasks, func(g Glance) bool { return g.PID == pid })]
}

func (s *scene) exec(pid int64, cmdline string) {
	g := s.at(pid)
	g.Image, g.Forked = g.Image+1, false
	s.who[pid] = Process{Comm: "x", Exe: "/bin/x", Cmdline: cmdline}
}

func (s *scene) end(pid int64) {
	s.tasks = slices.DeleteFunc(s.tasks, func(g Glance) bool { return g.PID == pid })
	delete(s.who, pid)
}

// sampled lets a sampler look after each step, and returns what it told, one word each.
func sampled(t *testing.T, steps ...func(*scene)) []string {
	t.Helper()
	s := &scene{pulse: Pulse{Life: 1, Forks: 100, Counted: true}, who: map[int64]Process{}}
	s.fork(1)
	s.exec(1, "init")
	var told []string
	sampler := NewSampler(func() (Guest, error) { return s, nil }, func(kind event.Kind, f event.Fields) {
		if err := (&event.Event{ID: event.MakeID("0123456789abcdef", 1), Machine: "m", Time: time.Unix(1, 0), Kind: kind, Fields: f}).Check(); err != nil {
			t.Error(err)
		}
		told = append(told, strings.TrimSpace(fmt.Sprintf("%s %v", strings.TrimPrefix(string(kind), "process."), word(f))))
	})
	steps = append(append([]func(*scene){func(*scene) {}}, steps...), func(*scene) {})
	for i, step := range steps {
		step(s)
		if _, err := sampler.Look(time.Unix(int64(i), 0)); err != nil {
			t.Fatal(err)
		}
	}
	return told
}

func word(f event.Fields) (w string) {
	for _, name := range []string{"pid", "cmdline", "count", "threads", "exit_code", "signal", "old_uid", "uid", "name"} {
		if v, ok := f[name]; ok && v != int64(0) && v != false {
			w += fmt.Sprintf("%s=%v ", name, v)
		}
	}
	return w
}

func TestSampler(t *testing.T) {
	nothing := func(*scene) {}
	for _, c := range []struct {
		name  string
		steps []func(*scene)
		want  []string
	}{
		{"what was there began before anybody looked", []func(*scene){nothing, nothing}, nil},
		{"fork, exec, exit", []func(*scene){
			func(s *scene) { s.fork(7) }, func(s *scene) { s.exec(7, "x 1") }, func(s *scene) { s.end(7) },
		}, []string{"forked pid=7 cmdline=sh", "started pid=7 cmdline=x 1", "exited pid=7 cmdline=x 1"}},
		{"fork and exec between two looks", []func(*scene){
			func(s *scene) { s.fork(7); s.exec(7, "x 1") },
		}, []string{"started pid=7 cmdline=x 1"}},
		{"in the middle of an exec there are no arguments", []func(*scene){
			func(s *scene) { s.fork(7); s.exec(7, "") }, func(s *scene) { s.who[7] = Process{Cmdline: "x 1"} }, nothing,
		}, []string{"started pid=7 cmdline=x 1"}},
		{"a program without arguments", []func(*scene){
			func(s *scene) { s.fork(7); s.exec(7, "") }, nothing, nothing,
		}, []string{"started pid=7"}},
		{"its end is seen", []func(*scene){
			func(s *scene) { s.fork(7); s.exec(7, "x") }, func(s *scene) { s.at(7).Zombie, s.at(7).Exit, s.at(7).Image = true, 3<<8, 0 }, nothing, func(s *scene) { s.end(7) },
		}, []string{"started pid=7 cmdline=x", "exited pid=7 cmdline=x exit_code=3"}},
		{"killed", []func(*scene){
			func(s *scene) { s.fork(7); s.exec(7, "x"); s.at(7).Zombie, s.at(7).Exit = true, 9 },
		}, []string{"started pid=7 cmdline=x", "exited pid=7 cmdline=x signal=9"}},
		{"credentials", []func(*scene){
			func(s *scene) { s.fork(7); s.exec(7, "x"); s.at(7).UID, s.at(7).EUID = 1000, 1000 },
			func(s *scene) { s.at(7).UID = 0 },
		}, []string{"started pid=7 cmdline=x uid=1000", "credentials pid=7 cmdline=x old_uid=1000"}},
		{"two are missed", []func(*scene){func(s *scene) { s.pulse.Forks += 2 }, nothing, nothing}, []string{"missed count=2"}},
		{"one is being made", []func(*scene){func(s *scene) { s.pulse.Forks++ }, func(s *scene) { s.fork(7); s.pulse.Forks-- }}, []string{"forked pid=7 cmdline=sh"}},
		{"one is seen before it is counted", []func(*scene){func(s *scene) { s.fork(7); s.pulse.Forks-- }, func(s *scene) { s.pulse.Forks++ }, nothing}, []string{"forked pid=7 cmdline=sh"}},
		{"threads are no processes", []func(*scene){func(s *scene) { s.pulse.Forks += 3; s.at(1).Threads = 4 }, nothing}, nil},
		{"threads that end can't be told apart", []func(*scene){func(s *scene) { s.pulse.Forks += 3; s.at(1).Ended = 9 }, nothing}, []string{"missed count=3 threads=true"}},
		{"kernel threads", []func(*scene){func(s *scene) { s.fork(7); s.at(7).Kernel = true }, func(s *scene) { s.end(7) }, nothing}, nil},
		{"a reused pid", []func(*scene){func(s *scene) { s.fork(7) }, func(s *scene) { s.end(7); s.fork(7); s.at(7).StartTime = 99 }},
			[]string{"forked pid=7 cmdline=sh", "forked pid=7 cmdline=sh", "exited pid=7 cmdline=sh"}},
		{"another life", []func(*scene){func(s *scene) { s.fork(7); s.pulse.Life, s.pulse.Forks = 2, 3 }, nothing, nothing}, nil},
		{"a module", []func(*scene){func(s *scene) { s.modules, s.pulse.Module = []Module{{"evil", 5, 6}}, 7 }, func(s *scene) { s.pulse.Module = 0 }}, []string{"module.loaded name=evil"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			if got := sampled(t, c.steps...); !slices.Equal(got, c.want) {
				t.Errorf("told %q, want %q", got, c.want)
			}
		})
	}
}

// TestPace: a storm of processes is told of as far as the pace allows, and counted beyond.
func TestPace(t *testing.T) {
	total, events := int64(0), 0
	emit := func(_ event.Kind, f event.Fields) {
		events++
		n, ok := f["count"].(int64)
		if !ok {
			n = 1
		}
		total += n
	}
	flood := event.NewFlood("test", func(e event.Event) { emit(e.Kind, e.Fields) })
	p := NewPace(emit, flood)
	p.now = func() time.Time { return time.Unix(1, 0) }
	const storm = 20_000
	for i := range storm {
		p.Emit(event.ProcessStarted, event.Fields{"pid": int64(i), "exe": "/bin/true"})
	}
	flood.Flush()
	if total != storm || events > paceBurst+100 {
		t.Errorf("%d events tell of %d processes, want %d", events, total, storm)
	}
}

// TestStillGuest: a guest that has not run is not walked through again, but for once a second; one that has run while no walk was
// due is, as soon as one is.
func TestStillGuest(t *testing.T) {
	s := &scene{pulse: Pulse{Life: 1, Forks: 100, Counted: true}, who: map[int64]Process{}}
	s.fork(1)
	sampler := NewSampler(func() (Guest, error) { return s, nil }, func(event.Kind, event.Fields) {})
	ran := false
	sampler.Used = func() (time.Duration, bool) {
		if ran {
			return time.Microsecond, true
		}
		return 0, true
	}
	at := time.Unix(100, 0)
	for i, c := range []struct {
		after time.Duration
		ran   bool
		busy  time.Duration // until when no walk is due
		want  bool
	}{
		{0, false, 0, true}, // its life is new
		{20 * time.Millisecond, false, 0, false},
		{20 * time.Millisecond, true, 0, true},
		{20 * time.Millisecond, false, 0, false},
		{20 * time.Millisecond, true, time.Second, false},
		{20 * time.Millisecond, false, 0, true}, // for what ran before
		{20 * time.Millisecond, false, 0, false},
		{time.Second, false, 0, true},
	} {
		at, ran = at.Add(c.after), c.ran
		sampler.due = at.Add(c.busy)
		if walked, err := sampler.Look(at); err != nil || walked != c.want {
			t.Errorf("look %d: walked %v, want %v: %v", i, walked, c.want, err)
		}
	}
}

// TestCalmGuest: a guest that hardly works is looked at less often after a while, and at once as often as before when it does.
func TestCalmGuest(t *testing.T) {
	s := &scene{pulse: Pulse{Life: 1, Forks: 100, Counted: true}, who: map[int64]Process{}}
	s.fork(1)
	sampler := NewSampler(func() (Guest, error) { return s, nil }, func(event.Kind, event.Fields) {})
	used, known := time.Duration(0), true
	sampler.Used = func() (time.Duration, bool) { return used, known }
	turns := func(n int, want time.Duration) {
		t.Helper()
		for range n {
			sampler.looked = time.Now().Add(-SamplePeriod) // so long ago, whatever the host is busy with
			if got := sampler.turn(); got != want {
				t.Fatalf("looks again after %v, want %v", got, want)
			}
		}
	}
	turns(calmLooks, SamplePeriod)
	turns(3, calmPeriod)
	used = time.Hour
	turns(1, SamplePeriod)
	used = time.Microsecond
	turns(calmLooks-1, SamplePeriod)
	turns(1, calmPeriod)
	s.fork(2)
	turns(1, SamplePeriod)
	turns(calmLooks-1, SamplePeriod)
	turns(1, calmPeriod)
	known = false
	turns(1, SamplePeriod)
}

// TestPluginSilenced: while the plugin tells of what the kernel counts there is nothing to sample; once it does not, that is told and
// the sampler looks; when it is heard again, it rests.
func TestPluginSilenced(t *testing.T) {
	s := &scene{pulse: Pulse{Life: 1, Forks: 100, Counted: true}, who: map[int64]Process{}}
	s.fork(1)
	var missed []int64
	sampler := NewSampler(func() (Guest, error) { return s, nil }, func(kind event.Kind, f event.Fields) {
		if kind == event.ProcessMissed {
			missed = append(missed, f["count"].(int64))
		}
	})
	heard, alive := uint64(7), true
	sampler.Verify(func() (uint64, bool) { return heard, alive })
	look := func(forks, told uint64, rests bool) {
		t.Helper()
		s.pulse.Forks, heard = s.pulse.Forks+forks, heard+told
		if _, err := sampler.Look(time.Now()); errors.Is(err, ErrTold) != rests || sampler.Silenced() == (rests && alive) {
			t.Fatalf("after %d tasks, of which %d were told: %v, silenced: %v", forks, told, err, sampler.Silenced())
		}
	}
	look(0, 0, true)
	look(5, 5, true)
	look(1, 0, true) // it is counted, and has not run yet
	look(0, 1, true)
	look(0, 0, true)
	look(900, 300, true) // a storm
	look(0, 600, true)
	if missed != nil {
		t.Fatalf("missed %v", missed)
	}
	look(2, 0, true)
	look(0, 0, true)
	look(1, 0, false)
	look(1, 0, false)
	look(0, 0, false)
	if !slices.Equal(missed, []int64{3}) {
		t.Errorf("missed %v", missed)
	}
	look(1, 1, true)
	alive = false
	if _, err := sampler.Look(time.Now()); err != nil {
		t.Errorf("without a plugin: %v", err)
	}
}

// TestPluginWithholds: a plugin that tells of some new tasks and keeps others back is found out by their number, as soon as they can't be
// those that have yet to run.
func TestPluginWithholds(t *testing.T) {
	s := &scene{pulse: Pulse{Life: 1, Forks: 100, Counted: true}, who: map[int64]Process{}}
	s.fork(1)
	var missed int64
	sampler := NewSampler(func() (Guest, error) { return s, nil }, func(kind event.Kind, f event.Fields) {
		if kind == event.ProcessMissed {
			missed += f["count"].(int64)
		}
	})
	heard := uint64(0)
	sampler.Verify(func() (uint64, bool) { return heard, true })
	look := func(forks, told uint64, want int64) {
		t.Helper()
		s.pulse.Forks, heard = s.pulse.Forks+forks, heard+told
		if _, err := sampler.Look(time.Now()); !errors.Is(err, ErrTold) || missed != want {
			t.Fatalf("after %d tasks, of which %d were told: %v, %d missed, want %d", forks, told, err, missed, want)
		}
	}
	look(0, 0, 0)
	for range 100 { // each look, ten of the last one's have not run yet
		look(50, 40, 0)
		look(50, 60, 0)
	}
	look(0, 0, 0)
	look(20, 17, 0) // three are kept back
	look(10, 10, 0)
	look(2, 2, 0)
	look(0, 0, 0) // a guest that does not run: they may be waiting for their turn
	look(1, 1, 2) // the third could be the new one
	look(9, 4, 2)
	look(1, 1, 2)
	look(0, 0, 2)
	look(1, 1, 7)
	s.pulse.Life++ // after a reboot all begins anew
	look(5, 0, 7)
	look(1, 1, 7)
	look(0, 0, 7)
	look(1, 1, 7)
}
