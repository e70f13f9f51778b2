package main

import (
	"fmt"
	"os"
	"runtime"
	"syscall"
	"text/tabwriter"
	"time"

	"vigia/bench/table"
	"vigia/internal/introspect"
	"vigia/internal/kernel"
)

// view is one way to look; n is how many rows it gives.
type view struct {
	name string
	call func(*introspect.Guest) (n int, err error)
}

var views = []view{
	{"process list (pid, start, CPU time, name)", func(g *introspect.Guest) (int, error) {
		var err error
		load, err = g.CPU(load[:0])
		return len(load), err
	}},
	{"processes, all of them", func(g *introspect.Guest) (int, error) { l, err := g.Processes(); return len(l), err }},
	{"modules", func(g *introspect.Guest) (int, error) { l, err := g.Modules(); return len(l), err }},
	{"sockets", func(g *introspect.Guest) (int, error) { l, err := g.Sockets(); return len(l), err }},
	{"files", func(g *introspect.Guest) (int, error) { l, err := g.Files(0); return len(l), err }},
	{"maps of pid 1", func(g *introspect.Guest) (int, error) { l, err := g.Maps(1); return len(l), err }},
	{"kernel", func(g *introspect.Guest) (int, error) { _, err := g.System(); return 1, err }},
}

var load []introspect.TaskTime

type row struct {
	view            string
	rows            int
	shared, private float64 // microseconds
}

func look(g *guest, rounds int) error {
	p, err := build(g.kernel)
	if err != nil {
		return err
	}
	attach, err := measure(max(1, rounds/5), func() error { _, err := introspect.Attach(g.shared, p); return err })
	if err != nil {
		return err
	}
	shared, err := introspect.Attach(g.shared, p)
	if err != nil {
		return err
	}
	private, err := introspect.Attach(g.private, p)
	if err != nil {
		return err
	}
	warm, err := opened(p, rounds)
	if err != nil {
		return err
	}
	var list []row
	all := row{view: "all views but the list"}
	for i, v := range views {
		r := row{view: v.name}
		call := func(g *introspect.Guest) func() error {
			return func() (err error) { r.rows, err = v.call(g); return err }
		}
		if r.shared, err = measure(rounds, call(shared)); err == nil {
			r.private, err = measure(rounds, call(private))
		}
		if err != nil {
			return fmt.Errorf("%s: %w", v.name, err)
		}
		if i > 0 {
			all.shared, all.private = all.shared+r.shared, all.private+r.private
		}
		list = append(list, r)
	}
	tasks := float64(list[0].rows) / 100
	table.Print(os.Stdout, []table.Verdict{
		{Claim: "warm process list of 100 tasks", Measured: list[0].shared / tasks, Target: 100, AtMost: true, Unit: "µs"},
		{Claim: "with command lines, executables and all else, of 100", Measured: list[1].shared / tasks, Target: 800, AtMost: true, Unit: "µs"},
		{Claim: "all views", Measured: all.shared / 1e3, Target: 5, AtMost: true, Unit: "ms"},
		{Claim: "all views of private memory", Measured: all.private / 1e3, Target: 5, AtMost: true, Unit: "ms"},
		{Claim: "attach", Measured: attach / 1e6, Target: 1, AtMost: true, Unit: "s"},
		{Claim: "profile opened and verified, 40 look-ups", Measured: warm / 1e3, Target: 2, AtMost: true, Unit: "ms"},
	})
	fmt.Println()
	t := tabwriter.NewWriter(os.Stdout, 0, 0, 2, ' ', 0)
	fmt.Fprintln(t, "VIEW\tROWS\tSHARED FILE\tPRIVATE\tPRIVATE/SHARED")
	for _, r := range append(list, all) {
		fmt.Fprintf(t, "%s\t%d\t%.0f µs\t%.0f µs\t%.1f\n", r.view, r.rows, r.shared, r.private, r.private/r.shared)
	}
	return t.Flush()
}

// opened measures a profile's file as a guard finds it: opened, its checksum verified, and asked for 40 things.
func opened(p *kernel.Profile, rounds int) (float64, error) {
	f, err := os.CreateTemp("", "profile")
	if err != nil {
		return 0, err
	}
	defer os.Remove(f.Name())
	defer f.Close()
	if err := p.Encode(f); err != nil {
		return 0, err
	}
	return measure(max(1, rounds/5), func() error {
		p, err := kernel.Open(f)
		if err != nil {
			return err
		}
		defer p.Close()
		for range 20 {
			if _, err := p.Symbol("init_task"); err != nil {
				return err
			}
			if _, err := p.Offset("task_struct", "se.sum_exec_runtime"); err != nil {
				return err
			}
		}
		return nil
	})
}

// profiles measures building the profile of kernel files, whole-process CPU time: unpacking may use several threads.
func profiles(files []string) error {
	if len(files) == 0 {
		return nil
	}
	var verdicts []table.Verdict
	for _, file := range files {
		best := time.Hour
		for range 3 {
			runtime.GC()
			began := processTime()
			if _, err := build(file); err != nil {
				return fmt.Errorf("%s: %w", file, err)
			}
			best = min(best, processTime()-began)
		}
		verdicts = append(verdicts, table.Verdict{Claim: "profile of " + file, Measured: best.Seconds() * 1e3, Target: 400, AtMost: true, Unit: "ms"})
	}
	fmt.Println()
	table.Print(os.Stdout, verdicts)
	return nil
}

func processTime() time.Duration {
	var u syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &u); err != nil {
		return 0
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}
