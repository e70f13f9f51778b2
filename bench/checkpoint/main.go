// Checkpoint measures checkpoints, rollbacks and clones, beside QEMU's own savevm, loadvm and migration to a file on the same
// guest.
//
//	go run ./bench/checkpoint [-rounds 10] [-clones 20] [-successive 100] [-only pause|idle|back|bare]
//
// The pause is told twice: QEMU's, from stop to cont as the guard sees it, and the guest's, the longest time without a character
// on a serial line on which the guest writes without end; the latter has the host's load in it, so the same is measured
// without a checkpoint. It needs bin/vigia; as an ordinary user memory is copied in the pause, which is what is measured then.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"connectrpc.com/connect"

	"vigia/bench/parts"
	"vigia/bench/table"
	"vigia/internal/api/vigiav1"
	"vigia/internal/lab"
)

const mib = 1 << 20

type bench struct {
	*lab.Lab
	ctx      context.Context
	img      *vigiav1.Image
	rounds   int
	verdicts []table.Verdict
}

func main() {
	rounds := flag.Int("rounds", 10, "checkpoints of each case")
	clones := flag.Int("clones", 20, "clones at once")
	successive := flag.Int("successive", 100, "checkpoints of an idle guest")
	bare := flag.Bool("bare", true, "measure QEMU's own ways too")
	only := flag.String("only", "", "one `part`: pause, idle, back or bare")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	defer stop()
	if err := run(ctx, *rounds, *clones, *successive, *bare, *only); err != nil {
		fmt.Fprintln(os.Stderr, "bench/checkpoint:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, rounds, clones, successive int, bare bool, only string) error {
	l, err := lab.Start(ctx, ".cache/bench", "--verbose", "--spares", strconv.Itoa(spareClones))
	if err != nil {
		return err
	}
	defer l.End()
	b := &bench{Lab: l, ctx: ctx, rounds: rounds}
	if b.img, err = parts.Image(ctx, l); err != nil {
		return err
	}
	for _, part := range []struct {
		name string
		do   func() error
	}{
		{"pause", func() error { return b.saving("256M", 40, 5, 25, 0) }},
		{"pause", func() error { return b.saving("512M", 300, 0, 0, 400) }},
		{"pause", func() error { return b.saving("2G", 300, 100, 35, 0) }},
		{"idle", func() error { return b.idle(successive) }},
		{"back", func() error { return b.back(clones) }},
		{"bare", b.qemu},
	} {
		if only != "" && only != part.name || part.name == "bare" && !bare {
			continue
		}
		if err := part.do(); err != nil {
			return err
		}
	}
	fmt.Println()
	table.Print(os.Stdout, b.verdicts)
	return ctx.Err()
}

// machine runs a machine with so many MiB of memory touched.
func (b *bench) machine(name, memory string, touched int) (end func(), err error) {
	b.Command(b.ctx, "rm", "--force", name)
	if err := b.Must(b.ctx, "run", "bench", name, "--memory", memory); err != nil {
		return nil, err
	}
	end = func() { b.Command(context.WithoutCancel(b.ctx), "rm", "--force", name) }
	_, err = b.Console(b.ctx, name, fill(touched))
	return end, err
}

// fill is a command that writes so many MiB of memory that can't be compressed. A line that is typed while a guest boots may be
// heard twice: so it does the same twice.
func fill(touched int) string {
	return fmt.Sprintf("mkdir -p /mnt; grep -q ' /mnt ' /proc/mounts || mount -t tmpfs -o size=90%% t /mnt; dd if=/dev/urandom of=/mnt/a bs=1M count=%d 2>/dev/null", touched)
}

func (b *bench) take(name string) (*vigiav1.Checkpoint, error) {
	r, err := b.Client.Checkpoints.Take(b.ctx, connect.NewRequest(&vigiav1.TakeCheckpointRequest{Name: name}))
	if err != nil {
		return nil, err
	}
	return r.Msg, nil
}

// saving takes checkpoints of a guest that has written dirty MiB since the last. Targets of 0 are not claimed.
func (b *bench) saving(memory string, touched, dirty int, pause, whole float64) error {
	name := "bench-checkpoint"
	end, err := b.machine(name, memory, touched)
	if err != nil {
		return err
	}
	defer end()
	m, err := b.meter(name)
	if err != nil {
		return err
	}
	defer m.end()
	fmt.Printf("\n%s, %d MiB touched, %d MiB written before each checkpoint\n", memory, touched, dirty)
	var pauses, gaps, quiet, took []float64
	for i := range b.rounds {
		if _, err := m.command(fmt.Sprintf("head -c %d /mnt/a > /mnt/b", dirty*mib)); err != nil {
			return err
		}
		m.longest()
		time.Sleep(500 * time.Millisecond)
		calm := m.longest()
		c, err := b.take(name)
		if err != nil {
			return err
		}
		time.Sleep(100 * time.Millisecond)
		gap := m.longest()
		fmt.Printf("%3d  pause %6.1f ms  guest's %6.1f ms (without a checkpoint %5.1f)  on disk %6.0f ms  %7.2f MiB  %s\n", i, c.PauseMs, gap, calm, c.TookMs, float64(c.Bytes)/mib, c.How)
		pauses, quiet = append(pauses, c.PauseMs), append(quiet, calm)
		if gaps = append(gaps, gap); i > 0 {
			took = append(took, c.TookMs)
		}
	}
	fmt.Printf("     pause p50 %.1f p99 %.1f; guest's p50 %.1f p99 %.1f, without p50 %.1f p99 %.1f\n", table.Quantile(pauses, .5), table.Quantile(pauses, .99),
		table.Quantile(gaps, .5), table.Quantile(gaps, .99), table.Quantile(quiet, .5), table.Quantile(quiet, .99))
	if pause > 0 {
		b.verdicts = append(b.verdicts, table.Verdict{Claim: fmt.Sprintf("pause, %s with %d MiB written", memory, dirty), Measured: table.Quantile(gaps, .5), Target: pause, AtMost: true, Unit: "ms"})
	}
	if whole > 0 {
		b.verdicts = append(b.verdicts, table.Verdict{Claim: fmt.Sprintf("complete and durable, %s with %d MiB written", memory, dirty), Measured: table.Quantile(took, .5), Target: whole, AtMost: true, Unit: "ms"})
	}
	return nil
}

// idle takes one checkpoint after the other of a guest that does nothing.
func (b *bench) idle(n int) error {
	end, err := b.machine("bench-idle", "256M", 20)
	if err != nil {
		return err
	}
	defer end()
	first, err := b.take("bench-idle")
	if err != nil {
		return err
	}
	sum := first.Bytes
	for range n - 1 {
		c, err := b.take("bench-idle")
		if err != nil {
			return err
		}
		sum += c.Bytes
	}
	fmt.Printf("\n%d checkpoints of an idle guest: the first %.2f MiB, all %.2f MiB\n", n, float64(first.Bytes)/mib, float64(sum)/mib)
	b.verdicts = append(b.verdicts, table.Verdict{Claim: fmt.Sprintf("%d checkpoints of an idle guest, against one", n), Measured: float64(sum) / float64(first.Bytes), Target: 1.3, AtMost: true})
	return nil
}

// back rolls back and clones: all is asked of the daemon over its socket, so that the command line's own start is not in it.
func (b *bench) back(clones int) error {
	name := "bench-back"
	end, err := b.machine(name, "512M", 60)
	if err != nil {
		return err
	}
	defer end()
	c, err := b.take(name)
	if err != nil {
		return err
	}
	var rolled []float64
	for range b.rounds {
		began := time.Now()
		if _, err := b.Client.Checkpoints.Rollback(b.ctx, connect.NewRequest(&vigiav1.RollbackRequest{Name: name, Checkpoint: c.Id, AtOnce: true})); err != nil {
			return err
		}
		rolled = append(rolled, ms(began))
		time.Sleep(restTime)
	}
	defer func() {
		for i := range clones {
			b.Command(context.WithoutCancel(b.ctx), "rm", "--force", cloneName(i))
		}
	}()
	cold, ahead, err := b.clones(name, c.Id, clones)
	if err != nil {
		return err
	}
	pss, err := b.memory(clones)
	if err != nil {
		return err
	}
	fmt.Printf("\nrollback: %s\nclone: the first, which puts the memory together, %.0f ms; others %s; made ahead %s\n", quantiles(rolled), cold[0], quantiles(cold[1:]), quantiles(ahead))
	b.verdicts = append(b.verdicts,
		table.Verdict{Claim: "rollback, until the guest runs", Measured: table.Quantile(rolled, .5), Target: 200, AtMost: true, Unit: "ms"},
		table.Verdict{Claim: "clone, until the guest runs: cold", Measured: table.Quantile(cold[1:], .5), Target: 120, AtMost: true, Unit: "ms"},
		table.Verdict{Claim: "clone, until the guest runs: made ahead", Measured: table.Quantile(ahead, .5), Target: 30, AtMost: true, Unit: "ms"},
		table.Verdict{Claim: fmt.Sprintf("memory of each of %d idle clones: QEMU", clones), Measured: table.Quantile(pss, .5), Target: 36, AtMost: true, Unit: "MiB"})
	return nil
}

func cloneName(i int) string { return "bench-clone-" + strconv.Itoa(i) }

func quantiles(v []float64) string {
	return fmt.Sprintf("p50 %.0f ms, p99 %.0f ms", table.Quantile(v, .5), table.Quantile(v, .99))
}

// spareClones is how many the daemon makes ahead.
const spareClones = 3

// restTime lets a clone come to rest, whose translation cache is cold, before the next is made; a daemon makes some ahead after a second.
const restTime = 700 * time.Millisecond

// clones makes clones: half of them one after the other, faster than the daemon makes any ahead, the others when it has.
func (b *bench) clones(name, id string, n int) (cold, ahead []float64, err error) {
	ready := 0
	for i := range n {
		if i >= n/2 {
			if ready, err = b.awaitSpare(ready); err != nil {
				return nil, nil, err
			}
		}
		began := time.Now()
		if _, err := b.Client.Checkpoints.Clone(b.ctx, connect.NewRequest(&vigiav1.CloneRequest{Name: name, Checkpoint: id, NewName: cloneName(i)})); err != nil {
			return nil, nil, err
		}
		if took := ms(began); i < n/2 {
			cold = append(cold, took)
			time.Sleep(restTime)
		} else {
			ahead = append(ahead, took)
		}
	}
	return cold, ahead, nil
}

// awaitSpare waits until the daemon has made more clones ahead than so many, and a moment more.
func (b *bench) awaitSpare(had int) (int, error) {
	for range 600 {
		log, err := os.ReadFile(filepath.Join(b.State, "serve.log"))
		if err != nil {
			return 0, err
		}
		if n := strings.Count(string(log), "a clone was made ahead"); n > had {
			time.Sleep(300 * time.Millisecond)
			return had + 1, nil
		}
		time.Sleep(100 * time.Millisecond)
	}
	return 0, errors.New("the daemon makes no clones ahead")
}

// memory is the share of memory of each clone's QEMU, in MiB.
func (b *bench) memory(clones int) (pss []float64, err error) {
	time.Sleep(5 * time.Second)
	var guards, gates []float64
	for i := range clones {
		m, err := b.Show(b.ctx, cloneName(i))
		if err != nil {
			return nil, err
		}
		pss, guards, gates = append(pss, proportional(m.Pid)), append(guards, proportional(m.GuardPid)), append(gates, proportional(m.GatePid))
	}
	fmt.Printf("\n%d idle clones, memory of each: QEMU p50 %.1f MiB (p99 %.1f), guard %.1f, gate %.1f\n", clones, table.Quantile(pss, .5), table.Quantile(pss, .99),
		table.Quantile(guards, .5), table.Quantile(gates, .5))
	return pss, nil
}

func ms(since time.Time) float64 { return float64(time.Since(since).Microseconds()) / 1000 }

// proportional is a process's share of memory, in MiB.
func proportional(pid int64) float64 {
	raw, err := os.ReadFile(fmt.Sprintf("/proc/%d/smaps_rollup", pid))
	if err != nil {
		return 0
	}
	for line := range strings.Lines(string(raw)) {
		if words := strings.Fields(line); len(words) > 1 && words[0] == "Pss:" {
			kb, _ := strconv.ParseFloat(words[1], 64)
			return kb / 1024
		}
	}
	return 0
}
