// Probe measures what it costs a guest that everything its processes do is seen, and whether everything is.
//
//	go run ./bench/probe [-rounds 12] [-execs 400]
//
// Two machines are made of one image and differ in nothing but --probe: on one QEMU's plugin holds the virtual CPU at each fork, exec,
// exit and more, on the other processes are sampled. In turns each runs the same loop of short processes and the same
// computation, timed by the guest's own clock in one console command, while the other is idle; the order changes each round. It
// compares medians of the rounds' times, counts the events of all processes of the probed machine, and reads what the guards
// used of the host's CPU meanwhile. It needs bin/vigia with the plugin beside it.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"strconv"
	"strings"
	"time"

	"connectrpc.com/connect"

	"vigia/bench/parts"
	"vigia/bench/table"
	"vigia/internal/api/vigiav1"
	"vigia/internal/lab"
)

var machines = []string{"probed", "sampled"}

// work is what the guests do, and how often a second in the end.
type work struct {
	name, command string
	execs         int
	times         map[string][]float64 // milliseconds by machine
}

func main() {
	rounds := flag.Int("rounds", 12, "rounds")
	execs := flag.Int("execs", 400, "processes a round")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	defer stop()
	if err := run(ctx, *rounds, *execs); err != nil {
		fmt.Fprintln(os.Stderr, "bench/probe:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, rounds, execs int) error {
	l, err := lab.Start(ctx, ".cache/bench", "--accelerator", "tcg")
	if err != nil {
		return err
	}
	defer l.End()
	if _, err := parts.Image(ctx, l); err != nil {
		return err
	}
	for i, name := range machines {
		l.Command(ctx, "rm", "--force", name)
		if err := l.Must(ctx, "run", "bench", name, "--memory", "256M", "--cpus", "2", "--net", "off", "--probe", []string{"on", "off"}[i]); err != nil {
			return err
		}
		defer l.Command(context.WithoutCancel(ctx), "rm", "--force", name)
		if _, err := l.Console(ctx, name, "true"); err != nil {
			return err
		}
	}
	works := []*work{
		{name: "short processes", command: fmt.Sprintf("for i in $(seq %d); do /bin/true bench-$i; done", execs), execs: execs},
		{name: "open and read files", command: "for i in $(seq 20); do cat /etc/passwd /etc/group /etc/hostname /etc/fstab /etc/shadow >/dev/null; done", execs: 20},
		{name: "compute", command: "i=0; while [ $i -lt 30000 ]; do i=$((i+1)); done"},
	}
	guard := map[string]time.Duration{}
	begun := time.Now()
	for round := range rounds {
		for _, w := range works {
			for k := range machines {
				name := machines[(k+round)%len(machines)]
				before, err := guardTime(ctx, l, name)
				if err != nil {
					return err
				}
				if err := w.once(ctx, l, name); err != nil {
					return err
				}
				after, err := guardTime(ctx, l, name)
				if err != nil {
					return err
				}
				if w == works[0] {
					guard[name] += after - before
				}
			}
		}
	}
	return report(ctx, l, works, rounds, guard, time.Since(begun))
}

// once runs a work and keeps how long it took by the guest's clock.
func (w *work) once(ctx context.Context, l *lab.Lab, name string) error {
	out, err := l.Console(ctx, name, "a=$(date +%s%N); "+w.command+"; b=$(date +%s%N); echo took $(((b-a)/1000))")
	if err != nil {
		return err
	}
	_, text, ok := strings.Cut(out, "took ")
	us, err := strconv.ParseFloat(strings.TrimSpace(text), 64)
	if !ok || err != nil {
		return fmt.Errorf("%s on %s: %q", w.name, name, out)
	}
	if w.times == nil {
		w.times = map[string][]float64{}
	}
	w.times[name] = append(w.times[name], us/1000)
	return nil
}

// guardTime is the CPU time that a machine's guard has used.
func guardTime(ctx context.Context, l *lab.Lab, name string) (time.Duration, error) {
	m, err := l.Show(ctx, name)
	if err != nil {
		return 0, err
	}
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", m.GuardPid))
	if err != nil {
		return 0, err
	}
	words := strings.Fields(string(text[strings.LastIndexByte(string(text), ')')+1:]))
	var ticks int
	for _, i := range []int{11, 12} { // utime and stime
		n, err := strconv.Atoi(words[i])
		if err != nil {
			return 0, err
		}
		ticks += n
	}
	return time.Duration(ticks) * 10 * time.Millisecond, nil
}

func report(ctx context.Context, l *lab.Lab, works []*work, rounds int, guard map[string]time.Duration, took time.Duration) error {
	want := works[0].execs * rounds
	seen, missed, err := counted(ctx, l, "probed", want)
	if err != nil {
		return err
	}
	var verdicts []table.Verdict
	for _, w := range works {
		ratio := table.Quantile(w.times["probed"], 0.5) / table.Quantile(w.times["sampled"], 0.5)
		verdicts = append(verdicts, table.Verdict{Claim: w.name + ", probed against sampled, median", Measured: ratio, Target: 1.10, AtMost: true, Unit: "×"})
	}
	verdicts = append(verdicts, table.Verdict{Claim: "processes not told", Measured: float64(want-seen) + missed, Target: 0, AtMost: true, Unit: ""})
	table.Print(os.Stdout, verdicts)
	fmt.Printf("\nrounds %d in %.0f s; %d processes, %d told, %.0f told as missed\n", rounds, took.Seconds(), want, seen, missed)
	fmt.Println("ms, p10 p50 p90:           probed                        sampled")
	for _, w := range works {
		fmt.Printf("%-22s", w.name)
		for _, name := range machines {
			t := w.times[name]
			fmt.Printf("  %8.1f %8.1f %8.1f", table.Quantile(t, 0.1), table.Quantile(t, 0.5), table.Quantile(t, 0.9))
		}
		if w.execs > 1 {
			fmt.Printf("   %.0f a second when probed", 1000*float64(w.execs)/table.Quantile(w.times["probed"], 0.5))
		}
		fmt.Println()
	}
	for _, name := range machines {
		var spent float64
		for _, ms := range works[0].times[name] {
			spent += ms / 1000
		}
		fmt.Printf("guard of %-8s %.1f %% of a core during short processes\n", name, 100*guard[name].Seconds()/spent)
	}
	return nil
}

// counted waits for the events of the short processes, and adds up what they tell.
func counted(ctx context.Context, l *lab.Lab, name string, want int) (seen int, missed float64, err error) {
	for range 20 {
		seen, missed = 0, 0
		events, err := l.Client.Events.List(ctx, connect.NewRequest(&vigiav1.ListEventsRequest{Machine: name, Kinds: []string{"process.started", "process.missed"}}))
		if err != nil {
			return 0, 0, err
		}
		for events.Receive() {
			e := events.Msg()
			n := max(1, e.Fields.Fields["count"].GetNumberValue())
			switch {
			case e.Kind == "process.missed":
				missed += n
			case strings.HasPrefix(e.Fields.Fields["cmdline"].GetStringValue(), "/bin/true bench-"):
				seen += int(n)
			}
		}
		if err := errors.Join(events.Err(), events.Close()); err != nil {
			return 0, 0, err
		}
		if seen >= want {
			break
		}
		time.Sleep(500 * time.Millisecond)
	}
	return seen, missed, nil
}
