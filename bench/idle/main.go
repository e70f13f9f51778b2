// Idle measures what vigia costs when nothing happens: the CPU of all its processes for ten idle machines, and the memory
// of a guard and of a gate, also right after all checks of a guest's memory.
//
//	go run ./bench/idle [-machines 10] [-seconds 60] [-probe auto|off] [-checks=false]
//
// The same machines are watched twice: as they are by default, and with a daemon that has no checks of the guests' memory made, which
// shows what these cost; -checks=false leaves the first out. -probe off has processes sampled under software emulation too, as
// they are under KVM, instead of told of by QEMU's plugin. What a guard has resident is of three kinds: its own, pages of the
// program and of the kernel's profile that every process has in common, and the guest's memory, where it has looked at it.
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
	checks := flag.Bool("checks", true, "first with the checks of the guests' memory, at the daemon's own pace")
	probe := flag.String("probe", "auto", "how processes are seen: auto, off")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	defer stop()
	b := &bench{watch: time.Duration(*seconds) * time.Second, probe: *probe}
	if err := b.run(ctx, *machines, *checks); err != nil {
		fmt.Fprintln(os.Stderr, "bench/idle:", err)
		os.Exit(1)
	}
}

type bench struct {
	watch time.Duration
	probe string
	lab   *lab.Lab
	names []string
	pids  map[string][]int
}

var unchecked = []string{"--check-every", "0", "--check-full-every", "0"}

// serve begins a daemon, also for machines that run already.
func (b *bench) serve(ctx context.Context, flags ...string) (err error) {
	if b.lab != nil {
		b.lab.End()
	}
	b.lab, err = lab.Start(ctx, ".cache/bench", flags...)
	return err
}

func (b *bench) run(ctx context.Context, machines int, checks bool) error {
	if err := b.serve(ctx); err != nil {
		return err
	}
	defer func() { b.lab.End() }()
	if _, err := parts.Image(ctx, b.lab); err != nil {
		return err
	}
	defer func() {
		for _, name := range b.names {
			b.lab.Command(context.WithoutCancel(ctx), "rm", "--force", name)
		}
	}()
	for i := range machines {
		if err := b.boot(ctx, fmt.Sprintf("idle-%d", i)); err != nil {
			return err
		}
	}
	if checks {
		if err := b.measure(ctx, "with the checks of memory, by default"); err != nil {
			return err
		}
	}
	if err := b.serve(ctx, unchecked...); err != nil {
		return err
	}
	return b.measure(ctx, "without the checks of memory")
}

func (b *bench) boot(ctx context.Context, name string) error {
	b.lab.Command(ctx, "rm", "--force", name)
	if err := b.lab.Must(ctx, "run", "bench", name, "--memory", "128M", "--probe", b.probe); err != nil {
		return err
	}
	b.names = append(b.names, name)
	_, err := b.lab.Console(ctx, name, "true") // booted: one after the other, so that none starves
	return err
}

// find lists the processes: a daemon may have given a machine another guard.
func (b *bench) find(ctx context.Context) error {
	b.pids = map[string][]int{"daemon": {b.lab.PID()}}
	for _, name := range b.names {
		m, err := b.lab.Show(ctx, name)
		if err != nil {
			return err
		}
		b.pids["guard"] = append(b.pids["guard"], int(m.GuardPid))
		b.pids["gate"] = append(b.pids["gate"], int(m.GatePid))
		b.pids["qemu"] = append(b.pids["qemu"], int(m.Pid))
	}
	return nil
}

func (b *bench) measure(ctx context.Context, how string) error {
	sleep(ctx, 30*time.Second) // until boots are over and workers have settled
	if err := b.find(ctx); err != nil {
		return err
	}
	before, began := cpu(b.pids), time.Now()
	sleep(ctx, b.watch)
	after := cpu(b.pids)
	fmt.Printf("%s\n\n", how)
	report(b.pids, before, after, time.Since(began))
	for _, name := range b.names {
		b.lab.Command(ctx, "check", name)
	}
	fmt.Printf("\nright after all checks of each: %.1f MB resident in the median guard\n\n", memory(b.pids["guard"], "status", "VmRSS"))
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
