package introspect

import (
	"testing"

	"vigia/internal/kernel"
)

// strayLayout reads moments where there are none: what a task points to as its files is taken for a walk along a path, and any
// part of its stack for registers. That is what a guest that writes its own task_struct can do.
func strayLayout(g *Guest, p *kernel.Profile) *momentLayout {
	r := &resolver{p: p}
	l := &momentLayout{live: r.field("signal_struct", "live"), stack: r.field("task_struct", "stack"), nameData: r.field("task_struct", "mm"), regsSize: 168, ax: 80, orig: 120}
	if r.err != nil {
		return nil
	}
	for i := range l.args {
		l.args[i] = uint64(8 * i)
	}
	return l
}

// moments looks at every task as if a CPU were held in it.
func (g *Guest) allMoments(p *kernel.Profile) error {
	list, err := g.Glances(nil)
	if err != nil {
		return err
	}
	return g.view(func() error {
		l := strayLayout(g, p)
		for _, task := range list {
			m := Moment{Process: Process{Task: task.Task}}
			if l != nil && g.moment(l, &m) == nil {
				_, _ = g.opening(l, task.Task)
				_, _ = g.connection(l, task.Task)
				_, _ = g.called(l, task.Task)
			}
		}
		return nil
	})
}

// TestMoment holds what is seen of a held CPU's task to the thorough view of processes.
func TestMoment(t *testing.T) {
	onRecordings(t, func(t *testing.T, r *recorded, p *kernel.Profile) {
		g := attach(t, r, p)
		l := strayLayout(g, p)
		if l == nil {
			t.Fatal("the recording lacks a field")
		}
		for _, want := range processes(t, g) {
			m := Moment{Process: Process{Task: want.Task}}
			if err := g.view(func() error { return g.moment(l, &m) }); err != nil {
				t.Errorf("pid %d: %v", want.PID, err)
				continue
			}
			if m.PID != want.PID || m.PPID != want.PPID || m.UID != want.UID || m.EUID != want.EUID || m.Comm != want.Comm ||
				m.Exe != want.Exe || m.Cmdline != want.Cmdline || m.Kernel != want.Kernel || m.Thread || m.StartTime != want.StartTime {
				t.Errorf("%+v, want %+v", m, want)
			}
			if m.Last != (want.State == "Z") {
				t.Errorf("pid %d in state %s: its last thread ends: %v", m.PID, want.State, m.Last)
			}
		}
	})
}
