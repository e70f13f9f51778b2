// Idle measures what vigia costs when nothing happens: the CPU of all its processes for ten idle machines, and the memory
// of a guard and of a gate.
//
//	go run ./bench/idle [-machines 10] [-seconds 60] [-checks=false]
//
// A guard that makes its checks of the guest's memory each second and minute is not idle; -checks=false leaves them out, which shows
// what they cost. What a guard has resident is of three kinds: its own, pages of the program and of the kernel's profile that every
// process has in common, and the guest's memory, where it has looked at it.
//
// QEMU's own cost is not counted; it is printed beside. It needs bin/vigia.
package main

import (
	"context"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"strconv"
	"strings"
	"time"

	"vigia/bench/parts"
	"vigia/bench/table"
	"vigia/internal/lab"
)

func main() {
	machines := flag.Int("machines", 10, "idle machines")
	seconds := flag.Int("seconds", 60, "how long to watch")
	checks := flag.Bool("checks", true, "with the checks of the guests' memory, at the daemon's own pace")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	defer stop()
	if err := run(ctx, *machines, time.Duration(*seconds)*time.Second, *checks); err != nil {
		fmt.Fprintln(os.Stderr, "bench/idle:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, machines int, watch time.Duration, checks bool) error {
	var serve []string
	if !checks {
		serve = []string{"--check-every", "0", "--check-full-every", "0"}
	}
	l, err := lab.Start(ctx, ".cache/bench", serve...)
	if err != nil {
		return err
	}
	defer l.End()
	if _, err := parts.Image(ctx, l); err != nil {
		return err
	}
	pids := map[string][]int{"daemon": {l.PID()}}
	for i := range machines {
		name := fmt.Sprintf("idle-%d", i)
		l.Command(ctx, "rm", "--force", name)
		if err := l.Must(ctx, "run", "bench", name, "--memory", "128M"); err != nil {
			return err
		}
		defer l.Command(context.WithoutCancel(ctx), "rm", "--force", name)
		if _, err := l.Console(ctx, name, "true"); err != nil { // booted: one after the other, so that none starves
			return err
		}
		m, err := l.Show(ctx, name)
		if err != nil {
			return err
		}
		pids["guard"] = append(pids["guard"], int(m.GuardPid))
		pids["gate"] = append(pids["gate"], int(m.GatePid))
		pids["qemu"] = append(pids["qemu"], int(m.Pid))
	}
	sleep(ctx, 30*time.Second) // until boots are over and workers have settled
	before := cpu(pids)
	began := time.Now()
	sleep(ctx, watch)
	after := cpu(pids)
	report(pids, before, after, time.Since(began))
	return ctx.Err()
}

func sleep(ctx context.Context, d time.Duration) {
	select {
	case <-time.After(d):
	case <-ctx.Done():
	}
}

// cpu is the CPU time of each kind of process, in seconds: fields 14 and 15 of /proc/PID/stat, in ticks of 10 ms.
func cpu(pids map[string][]int) map[string]float64 {
	out := map[string]float64{}
	for kind, list := range pids {
		for _, pid := range list {
			text, _ := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
			_, rest, _ := strings.Cut(string(text), ") ")
			if f := strings.Fields(rest); len(f) > 12 {
				user, _ := strconv.ParseFloat(f[11], 64)
				system, _ := strconv.ParseFloat(f[12], 64)
				out[kind] += (user + system) / 100
			}
		}
	}
	return out
}

// memory is a field of /proc/PID/smaps_rollup or status, in MB: of the median process.
func memory(list []int, file, field string) float64 {
	var mb []float64
	for _, pid := range list {
		text, _ := os.ReadFile(fmt.Sprintf("/proc/%d/%s", pid, file))
		for line := range strings.Lines(string(text)) {
			if f := strings.Fields(line); len(f) > 1 && f[0] == field+":" {
				kb, _ := strconv.ParseFloat(f[1], 64)
				mb = append(mb, kb*1024/1e6)
			}
		}
	}
	return table.Quantile(mb, 0.5)
}

func report(pids map[string][]int, before, after map[string]float64, took time.Duration) {
	percent := func(kind string) float64 { return 100 * (after[kind] - before[kind]) / took.Seconds() }
	resident := func(kind string) float64 { return memory(pids[kind], "status", "VmRSS") }
	all := percent("daemon") + percent("guard") + percent("gate")
	table.Print(os.Stdout, []table.Verdict{
		{Claim: fmt.Sprintf("CPU of all of vigia, %d idle machines, %% of a core", len(pids["guard"])), Measured: all, Target: 3, AtMost: true, Unit: "%"},
		{Claim: "resident memory of an idle guard", Measured: resident("guard"), Target: 25, AtMost: true, Unit: "MB"},
		{Claim: "resident memory of an idle gate", Measured: resident("gate"), Target: 25, AtMost: true, Unit: "MB"},
	})
	fmt.Printf("\n%-8s %9s %9s %9s %9s %9s %9s   memory in MB, of the median process\n", "", "CPU %", "resident", "its own", "files", "guest's", "share")
	for _, kind := range []string{"daemon", "guard", "gate", "qemu"} {
		of := func(field string) float64 { return memory(pids[kind], "status", field) }
		fmt.Printf("%-8s %9.2f %9.1f %9.1f %9.1f %9.1f %9.1f   %d processes\n", kind, percent(kind), resident(kind), of("RssAnon"), of("RssFile"),
			of("RssShmem"), memory(pids[kind], "smaps_rollup", "Pss"), len(pids[kind]))
	}
}
