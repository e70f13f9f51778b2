// Check measures what looking for tampering costs: how long all checks take, what share of a core the schedule has at its
// defaults, and what the guest feels of it.
//
//	go run ./bench/check [-rounds 5] [-seconds 60]
//
// One guest computes, with the schedule and without it in turns: a daemon that starts tells the guards it finds how often to
// check. It needs bin/vigia and openssl in the image.
package main

import (
	"context"
	"encoding/json"
	"flag"
	"fmt"
	"maps"
	"os"
	"os/signal"
	"slices"
	"strconv"
	"strings"
	"time"

	"vigia/bench/parts"
	"vigia/bench/table"
	"vigia/internal/lab"
)

// work is OpenSSL hashing for three seconds; the last column of the answer is thousands of bytes a second.
const work = "openssl speed -seconds 3 -bytes 8192 sha256 2>/dev/null | tail -n 1"

const name = "checked"

func main() {
	rounds := flag.Int("rounds", 5, "turns with the schedule and without")
	seconds := flag.Int("seconds", 60, "how long the schedule's share of a core is watched, each way")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	defer stop()
	b := &bench{rounds: *rounds, watch: time.Duration(*seconds) * time.Second}
	if err := b.run(ctx); err != nil {
		fmt.Fprintln(os.Stderr, "bench/check:", err)
		os.Exit(1)
	}
}

type bench struct {
	rounds int
	watch  time.Duration
	lab    *lab.Lab
	guard  int

	full         []float64 // ms
	slow         map[string][]float64
	on, off      float64   // the guard's share of a core, percent
	busy, unseen []float64 // MB/s
}

var silent = []string{"--check-every", "0", "--check-full-every", "0"}

// serve begins a daemon with the schedule at its defaults, or without; the machine goes on meanwhile.
func (b *bench) serve(ctx context.Context, schedule bool) (err error) {
	if b.lab != nil {
		b.lab.End()
	}
	flags := silent
	if schedule {
		flags = nil
	}
	b.lab, err = lab.Start(ctx, ".cache/bench", flags...)
	return err
}

func (b *bench) run(ctx context.Context) error {
	if err := b.serve(ctx, false); err != nil {
		return err
	}
	defer func() { b.lab.End() }()
	if _, err := parts.Image(ctx, b.lab); err != nil {
		return err
	}
	b.lab.Command(ctx, "rm", "--force", name)
	if err := b.lab.Must(ctx, "run", "bench", name, "--memory", "512M", "--cpus", "2"); err != nil {
		return err
	}
	defer func() { b.lab.Command(context.WithoutCancel(ctx), "rm", "--force", name) }()
	if _, err := b.lab.Console(ctx, name, "for i in $(seq 50); do sleep 100000 & done; true"); err != nil {
		return err
	}
	m, err := b.lab.Show(ctx, name)
	if err != nil {
		return err
	}
	b.guard = int(m.GuardPid)
	for _, step := range []func(context.Context) error{b.checks, b.share, b.guest} {
		if err := step(ctx); err != nil {
			return err
		}
	}
	b.report()
	return ctx.Err()
}

// checks makes all checks some times. The first, which has everything still to learn of the kernel, is not counted.
func (b *bench) checks(ctx context.Context) error {
	b.slow = map[string][]float64{}
	for i := range 21 {
		out, status, err := b.lab.Command(ctx, "check", name, "-o", "json")
		var r struct {
			Findings []struct{ Kind, Severity string }
			Views    []struct {
				Check  string
				TookMS float64 `json:"took_ms"`
			}
			TookMS float64 `json:"took_ms"`
		}
		if err == nil {
			err = json.Unmarshal([]byte(out), &r)
		}
		if err != nil || status != 0 {
			return fmt.Errorf("check: status %d, %v: %.500s", status, err, out)
		}
		if i == 0 {
			fmt.Printf("the first: %.1f ms\n", r.TookMS)
			continue
		}
		b.full = append(b.full, r.TookMS)
		for _, v := range r.Views {
			if v.TookMS > 0 {
				b.slow[v.Check] = append(b.slow[v.Check], v.TookMS)
			}
		}
	}
	return nil
}

// share watches the guard with the schedule and without; the guest has nothing to do.
func (b *bench) share(ctx context.Context) error {
	for _, schedule := range []bool{false, true} {
		if err := b.serve(ctx, schedule); err != nil {
			return err
		}
		time.Sleep(5 * time.Second)
		before, began := cpu(b.guard), time.Now()
		select {
		case <-time.After(b.watch):
		case <-ctx.Done():
			return ctx.Err()
		}
		share := 100 * (cpu(b.guard) - before) / time.Since(began).Seconds()
		if schedule {
			b.on = share
		} else {
			b.off = share
		}
	}
	return nil
}

// guest lets it compute, in turns.
func (b *bench) guest(ctx context.Context) error {
	for range b.rounds {
		for _, schedule := range []bool{true, false} {
			if err := b.serve(ctx, schedule); err != nil {
				return err
			}
			line, err := b.lab.Console(ctx, name, work)
			if err != nil {
				return err
			}
			words := strings.Fields(line)
			if len(words) < 2 {
				return fmt.Errorf("openssl says %q", line)
			}
			k, err := strconv.ParseFloat(strings.TrimSuffix(words[len(words)-1], "k"), 64)
			if err != nil {
				return err
			}
			if schedule {
				b.busy = append(b.busy, k/1000)
			} else {
				b.unseen = append(b.unseen, k/1000)
			}
		}
	}
	return nil
}

// cpu is the CPU time of a process in seconds: fields 14 and 15 of /proc/PID/stat, in ticks of 10 ms.
func cpu(pid int) float64 {
	text, _ := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	_, rest, _ := strings.Cut(string(text), ") ")
	f := strings.Fields(rest)
	if len(f) < 13 {
		return 0
	}
	user, _ := strconv.ParseFloat(f[11], 64)
	system, _ := strconv.ParseFloat(f[12], 64)
	return (user + system) / 100
}

func (b *bench) report() {
	table.Print(os.Stdout, []table.Verdict{
		{Claim: "all checks, median of 20", Measured: table.Quantile(b.full, 0.5), Target: 150, Unit: "ms", AtMost: true},
		{Claim: "the schedule at its defaults, of a core", Measured: b.on - b.off, Target: 2, Unit: "%", AtMost: true},
		{Claim: "guest CPU work, with the schedule of without", Measured: table.Quantile(b.busy, 0.5) / table.Quantile(b.unseen, 0.5), Target: 0.98},
	})
	fmt.Printf("\nall checks, ms%s\nthe guard, %% of a core: with the schedule %.2f, without %.2f\nsha256, MB/s a round\nwith    %s\nwithout %s\n\nms of a check, median\n",
		row(b.full), b.on, b.off, row(b.busy), row(b.unseen))
	for _, k := range slices.Sorted(maps.Keys(b.slow)) {
		fmt.Printf("%-20s %8.2f\n", k, table.Quantile(b.slow[k], 0.5))
	}
}

func row(values []float64) string {
	var out strings.Builder
	for _, v := range values {
		fmt.Fprintf(&out, " %.1f", v)
	}
	return out.String()
}
