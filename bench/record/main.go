// Record measures what it costs a guest to be recorded: the same work in a machine of vigia's, under a QEMU that counts instructions and
// does no more, and in a machine of vigia's that is recorded.
//
//	go run ./bench/record [-rounds 5] [-idle 60s]
//
// Three guests of one image are up at a time and work in turns, so that they share whatever else the host does. Work is a fixed amount,
// timed by the host's clock between two marks on the serial line: a guest whose instructions are counted has a clock of its own. Then
// the recorded guest rests, and works, and it is looked how its log grows; at last the recording is replayed and compared, with the time
// that took beside the time it lasted. It needs bin/vigia and openssl in the image.
package main

import (
	"context"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"strings"
	"time"

	"vigia/bench/parts"
	"vigia/bench/table"
	"vigia/internal/lab"
)

// works are shell functions, typed once: a recorded machine is typed at slowly.
var works = []struct{ name, function, what string }{
	{"w1", "head -c 48000000 /dev/zero | sha256sum >/dev/null", "computing: sha256 of 48 MB"},
	{"w2", "i=0; while [ $i -lt 60 ]; do /bin/true; i=$((i+1)); done", "processes: 60 started and ended"},
	{"w3", "dd if=/dev/zero of=/root/x bs=64k count=512 conv=fsync 2>/dev/null", "disk: 32 MiB written and synced"},
}

type bench struct {
	*lab.Lab
	ctx      context.Context
	verdicts []table.Verdict
}

func main() {
	rounds := flag.Int("rounds", 5, "turns of each")
	idle := flag.Duration("idle", time.Minute, "how long the recorded guest rests, and works, for the size of its log")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	defer stop()
	if err := run(ctx, *rounds, *idle); err != nil {
		fmt.Fprintln(os.Stderr, "bench/record:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, rounds int, idle time.Duration) error {
	l, err := lab.Start(ctx, ".cache/bench", "--accelerator", "tcg")
	if err != nil {
		return err
	}
	defer l.End()
	b := &bench{Lab: l, ctx: ctx}
	img, err := parts.Image(ctx, l)
	if err != nil {
		return err
	}
	plain, err := b.machine("plain")
	if err != nil {
		return err
	}
	defer plain.end()
	counted, err := parts.Start(ctx, l, img, parts.ICount)
	if err != nil {
		return err
	}
	defer counted.End()
	began := time.Now()
	recorded, err := b.machine("recorded", "--record")
	if err != nil {
		return err
	}
	defer recorded.end()
	if err := b.compare(rounds, plain.line, newLine(ctx, counted.Line), recorded.line); err != nil {
		return err
	}
	if err := b.log(recorded, idle); err != nil {
		return err
	}
	if err := b.again(recorded, began); err != nil {
		return err
	}
	fmt.Println()
	table.Print(os.Stdout, b.verdicts)
	return nil
}

// compare lets them work in turns.
func (b *bench) compare(rounds int, plain, counted, recorded *line) error {
	lines := []*line{plain, counted, recorded}
	for _, l := range lines {
		for _, w := range works {
			if _, err := l.timed(fmt.Sprintf("%s() { %s; }", w.name, w.function)); err != nil {
				return err
			}
		}
	}
	var sums [3]float64
	for _, w := range works {
		took := make([][]float64, len(lines))
		for range rounds {
			for i, l := range lines {
				d, err := l.timed(w.name)
				if err != nil {
					return err
				}
				took[i] = append(took[i], d.Seconds())
			}
		}
		p, c, r := table.Quantile(took[0], .5), table.Quantile(took[1], .5), table.Quantile(took[2], .5)
		fmt.Printf("\n%s, seconds a round\nplain      %s\ncounted    %s\nrecorded   %s\nrecorded: %.2f× of counted alone, %.2f× of plain\n", w.what, row(took[0]), row(took[1]), row(took[2]), r/c, r/p)
		sums[0], sums[1], sums[2] = sums[0]+p, sums[1]+c, sums[2]+r
		b.verdicts = append(b.verdicts, table.Verdict{Claim: "recorded of counted alone, " + w.what, Measured: r / c, Target: 1.15, AtMost: true})
	}
	b.verdicts = append(b.verdicts, table.Verdict{Claim: "recorded of counted alone, all three", Measured: sums[2] / sums[1], Target: 1.15, AtMost: true})
	fmt.Printf("\nall three: recorded %.2f× of counted alone, %.2f× of plain\n", sums[2]/sums[1], sums[2]/sums[0])
	return nil
}

// log looks how the recording grows while the guest rests and while it works.
func (b *bench) log(m *machine, d time.Duration) error {
	fmt.Println()
	if _, err := m.line.timed("true"); err != nil {
		return err
	}
	from, began := m.logSize(), time.Now()
	time.Sleep(d)
	fmt.Printf("log, at rest: %.2f MiB a minute\n", perMinute(m.logSize()-from, time.Since(began)))
	for _, w := range works {
		from, began := m.logSize(), time.Now()
		for time.Since(began) < d/3 {
			if _, err := m.line.timed(w.name); err != nil {
				return err
			}
		}
		fmt.Printf("log, %s, again and again: %.2f MiB a minute\n", w.what, perMinute(m.logSize()-from, time.Since(began)))
	}
	return nil
}

func perMinute(bytes int64, d time.Duration) float64 { return float64(bytes) / (1 << 20) / d.Minutes() }

// again ends the recorded run, and replays it.
func (b *bench) again(m *machine, began time.Time) error {
	if err := b.Must(b.ctx, "stop", m.name); err != nil {
		return err
	}
	lasted := time.Since(began)
	log := float64(m.logSize()) / (1 << 20)
	began = time.Now()
	said, status, err := b.Command(b.ctx, "replay", m.name, "--verify")
	if err != nil {
		return err
	}
	fmt.Printf("\nreplay of %s recorded (%.1f MiB of log): %s (exit status %d) in %s: %s\n", lasted.Round(time.Second), log, verdict(status), status, time.Since(began).Round(time.Second), strings.TrimSpace(said))
	return nil
}

func verdict(status int) string {
	if status == 0 {
		return "exact"
	}
	return "NOT EXACT"
}

// machine is one of vigia's.
type machine struct {
	*bench
	name, id string
	line     *line
}

func (b *bench) machine(name string, flags ...string) (*machine, error) {
	name = "bench-" + name
	b.Command(b.ctx, "rm", "--force", name)
	if err := b.Must(b.ctx, append([]string{"run", "bench", name, "--memory", "256M"}, flags...)...); err != nil {
		return nil, err
	}
	m := &machine{bench: b, name: name}
	shown, err := b.Show(b.ctx, name)
	if err == nil {
		m.id = shown.Id
		m.line, err = b.attach(name)
	}
	if err != nil {
		m.end()
	}
	return m, err
}

func (m *machine) end() {
	if m.line != nil {
		m.line.close()
	}
	m.Command(context.WithoutCancel(m.ctx), "rm", "--force", m.name)
}

func (m *machine) logSize() int64 {
	info, err := os.Stat(filepath.Join(m.State, "machines", m.id, "recording.log"))
	if err != nil {
		return 0
	}
	return info.Size()
}

func row(seconds []float64) string {
	var out []string
	for _, v := range seconds {
		out = append(out, fmt.Sprintf("%7.2f", v))
	}
	return strings.Join(out, " ")
}
