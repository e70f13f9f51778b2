// Probe measures what it costs a guest that everything its processes do is seen, and whether everything is.
//
//	go run ./bench/probe [-rounds 12] [-execs 400] [-burst 2000]
//
// Two machines are made of one image and differ in nothing but --probe: on one QEMU's plugin holds the virtual CPU at each fork, exec,
// exit and more, on the other processes are sampled. In turns each runs the same loop of short processes and the same
// computation, timed by the guest's own clock in one console command, while the other is idle; the order changes each round. It
// compares medians of the rounds' times, counts the events of all processes of the probed machine, and reads what the guards
// used of the host's CPU meanwhile. A shell's processes are dear under emulation, some 30 a second: so burst/burst.c, which is
// compiled here (cc) and typed into the guest, begins them at the rate that the guest's kernel is able to. It needs bin/vigia with
// the plugin beside it.
package main

import (
	"bytes"
	"compress/gzip"
	"context"
	_ "embed"
	"encoding/base64"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"connectrpc.com/connect"
	"google.golang.org/protobuf/types/known/timestamppb"

	"vigia/bench/parts"
	"vigia/bench/table"
	"vigia/internal/api/vigiav1"
	"vigia/internal/lab"
)

var machines = []string{"probed", "sampled"}

// work is what the guests do, and how often a second in the end.
type work struct {
	name, command string
	file          string // where the guest counts what it did: a line on a busy serial line may be typed twice
	execs         int
	kinds         []string // that are counted: all those of processes, or but the one that has a command line
	told          func(e *vigiav1.Event) bool
	times         map[string][]float64 // milliseconds by machine
}

func main() {
	rounds := flag.Int("rounds", 12, "rounds")
	execs := flag.Int("execs", 400, "processes a round")
	burst := flag.Int("burst", 2000, "processes a round, as fast as the guest can")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	defer stop()
	if err := run(ctx, *rounds, *execs, *burst); err != nil {
		fmt.Fprintln(os.Stderr, "bench/probe:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, rounds, execs, burst int) error {
	l, err := lab.Start(ctx, ".cache/bench", "--accelerator", "tcg")
	if err != nil {
		return err
	}
	defer l.End()
	if _, err := parts.Image(ctx, l); err != nil {
		return err
	}
	program, err := compile(ctx)
	if err != nil {
		return err
	}
	since := time.Now()
	for i, name := range machines {
		l.Command(ctx, "rm", "--force", name)
		if err := l.Must(ctx, "run", "bench", name, "--memory", "256M", "--cpus", "2", "--net", "off", "--probe", []string{"on", "off"}[i]); err != nil {
			return err
		}
		defer l.Command(context.WithoutCancel(ctx), "rm", "--force", name)
		if _, err := l.Console(ctx, name, "echo "+program+" | base64 -d | gunzip >/run/burst; chmod +x /run/burst"); err != nil {
			return err
		}
	}
	works := []*work{
		{name: "short processes", command: fmt.Sprintf("for i in $(seq %d); do /bin/true bench-$i; done", execs), execs: execs, file: "short",
			kinds: []string{"process.started"}, told: func(e *vigiav1.Event) bool {
				return strings.HasPrefix(e.Fields.Fields["cmdline"].GetStringValue(), "/bin/true bench-")
			}},
		{name: "bursts", command: fmt.Sprintf("/run/burst %d", burst), execs: burst, file: "burst", kinds: []string{"process.forked", "process.started", "process.exited"},
			told: func(e *vigiav1.Event) bool { return e.Fields.Fields["exe"].GetStringValue() == "/run/burst" }},
		{name: "open and read files", command: "for i in $(seq 20); do cat /etc/passwd /etc/group /etc/hostname /etc/fstab /etc/shadow >/dev/null; done", execs: 20, file: "open"},
		{name: "compute", command: "i=0; while [ $i -lt 30000 ]; do i=$((i+1)); done", file: "compute"},
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
	return report(ctx, l, works, rounds, guard, since, time.Since(begun))
}

// once runs a work and keeps how long it took by the guest's clock.
func (w *work) once(ctx context.Context, l *lab.Lab, name string) error {
	out, err := l.Console(ctx, name, "a=$(date +%s%N); "+w.command+"; b=$(date +%s%N); echo "+strconv.Itoa(w.execs)+" >>/run/made-"+w.file+"; echo took $(((b-a)/1000))")
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

func report(ctx context.Context, l *lab.Lab, works []*work, rounds int, guard map[string]time.Duration, since time.Time, took time.Duration) error {
	var verdicts []table.Verdict
	for _, w := range works {
		ratio := table.Quantile(w.times["probed"], 0.5) / table.Quantile(w.times["sampled"], 0.5)
		verdicts = append(verdicts, table.Verdict{Claim: w.name + ", probed against sampled, median", Measured: ratio, Target: 1.10, AtMost: true, Unit: "×"})
	}
	for _, w := range works {
		for _, kind := range w.kinds {
			want, runs, err := made(ctx, l, w)
			if err != nil {
				return err
			}
			if w.file == "burst" && kind != "process.forked" { // it was a shell's fork that began and ended as burst
				want += runs
			}
			seen, err := counted(ctx, l, "probed", kind, since, want, w.told)
			if err != nil {
				return err
			}
			verdicts = append(verdicts, table.Verdict{Claim: fmt.Sprintf("%s: %s not told, of %d", w.name, kind, want), Measured: float64(want - seen), Target: 0, AtMost: true})
		}
	}
	missed, err := counted(ctx, l, "probed", "process.missed", since, 0, func(*vigiav1.Event) bool { return true })
	if err != nil {
		return err
	}
	verdicts = append(verdicts, table.Verdict{Claim: "told as missed", Measured: float64(missed), Target: 0, AtMost: true},
		table.Verdict{Claim: "bursts when probed, median", Measured: 1000 * float64(works[1].execs) / table.Quantile(works[1].times["probed"], 0.5), Target: 200, Unit: "a second"})
	table.Print(os.Stdout, verdicts)
	fmt.Printf("\nrounds %d in %.0f s\n", rounds, took.Seconds())
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

// made asks the guest what it did, and how many times.
func made(ctx context.Context, l *lab.Lab, w *work) (many, runs int, err error) {
	out, err := l.Console(ctx, "probed", "cat /run/made-"+w.file)
	if err != nil {
		return 0, 0, err
	}
	for _, line := range strings.Fields(out) {
		n, err := strconv.Atoi(line)
		if err != nil {
			return 0, 0, fmt.Errorf("what the guest did: %q", out)
		}
		many, runs = many+n, runs+1
	}
	return many, runs, nil
}

// counted waits for so many events of a kind that fit, and adds up what they tell.
func counted(ctx context.Context, l *lab.Lab, name, kind string, since time.Time, want int, fits func(*vigiav1.Event) bool) (seen int, err error) {
	for range 20 {
		seen = 0
		events, err := l.Client.Events.List(ctx, connect.NewRequest(&vigiav1.ListEventsRequest{Machine: name, Kinds: []string{kind}, Since: timestamppb.New(since)}))
		if err != nil {
			return 0, err
		}
		for events.Receive() {
			if e := events.Msg(); fits(e) {
				seen += int(max(1, e.Fields.Fields["count"].GetNumberValue()))
			}
		}
		if err := errors.Join(events.Err(), events.Close()); err != nil {
			return 0, err
		}
		if seen >= want {
			break
		}
		time.Sleep(500 * time.Millisecond)
	}
	return seen, nil
}

//go:embed burst/burst.c
var burstSource []byte

// compile returns burst, packed and in base64: some 700 bytes, short enough to be typed.
func compile(ctx context.Context) (string, error) {
	dir, err := os.MkdirTemp("", "burst")
	if err != nil {
		return "", err
	}
	defer os.RemoveAll(dir)
	source, out := filepath.Join(dir, "burst.c"), filepath.Join(dir, "burst")
	if err := os.WriteFile(source, burstSource, 0o600); err != nil {
		return "", err
	}
	cc := exec.CommandContext(ctx, "cc", "-O1", "-nostdlib", "-static", "-ffreestanding", "-fno-stack-protector", "-fno-asynchronous-unwind-tables",
		"-Wl,-N,--build-id=none,--no-warn-rwx-segments", "-s", "-o", out, source)
	if said, err := cc.CombinedOutput(); err != nil {
		return "", fmt.Errorf("compile burst.c: %w: %s", err, said)
	}
	raw, err := os.ReadFile(out)
	if err != nil {
		return "", err
	}
	var packed bytes.Buffer
	z, _ := gzip.NewWriterLevel(&packed, gzip.BestCompression)
	if _, err := z.Write(raw); err != nil {
		return "", err
	}
	if err := z.Close(); err != nil {
		return "", err
	}
	return base64.StdEncoding.EncodeToString(packed.Bytes()), nil
}
