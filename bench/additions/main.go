// Additions measures what the guest's agent does for checkpoints: what freezing the file systems costs, beside checkpoints of the same
// guest without it; and what a guest that goes on from one is like without and with the agent: its clock, and the random numbers of
// clones of one checkpoint.
//
//	go run ./bench/additions [-rounds 10] [-clones 6]
//
// It needs bin/vigia.
package main

import (
	"context"
	"flag"
	"fmt"
	"math"
	"os"
	"os/signal"
	"strings"
	"time"

	"connectrpc.com/connect"

	"vigia/bench/parts"
	"vigia/bench/table"
	"vigia/internal/api/vigiav1"
	"vigia/internal/lab"
)

type bench struct {
	*lab.Lab
	ctx      context.Context
	rounds   int
	clones   int
	verdicts []table.Verdict
}

func main() {
	rounds := flag.Int("rounds", 10, "checkpoints of each kind")
	clones := flag.Int("clones", 6, "clones of one checkpoint")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	defer stop()
	if err := run(ctx, *rounds, *clones); err != nil {
		fmt.Fprintln(os.Stderr, "bench/additions:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, rounds, clones int) error {
	l, err := lab.Start(ctx, ".cache/bench")
	if err != nil {
		return err
	}
	defer l.End()
	b := &bench{Lab: l, ctx: ctx, rounds: rounds, clones: clones}
	if _, err := parts.Image(ctx, l); err != nil {
		return err
	}
	for _, additions := range []bool{true, false} {
		if err := b.machine(additions); err != nil {
			return err
		}
	}
	fmt.Println()
	table.Print(os.Stdout, b.verdicts)
	return ctx.Err()
}

// machine measures one, with the agent or without.
func (b *bench) machine(additions bool) error {
	name, with := "bench-plain", "without the agent"
	args := []string{"run", "bench", name, "--memory", "256M"}
	if additions {
		name, with = "bench-agent", "with the agent"
		args = []string{"run", "bench", name, "--memory", "256M", "--additions", "exec"}
	}
	b.Command(b.ctx, "rm", "--force", name)
	if err := b.Must(b.ctx, args...); err != nil {
		return err
	}
	defer b.Command(context.WithoutCancel(b.ctx), "rm", "--force", name)
	if _, err := b.Console(b.ctx, name, "true"); err != nil {
		return err
	}
	if additions {
		if err := b.freezing(name); err != nil {
			return err
		}
	}
	return b.arriving(name, with)
}

// freezing takes checkpoints with and without it, in turns. Each finds some data that is not yet on the disk.
func (b *bench) freezing(name string) error {
	var pauses, bare, frozen []float64
	kept := 0
	for i := range 2 * b.rounds {
		if _, err := b.Console(b.ctx, name, "head -c 1000000 /dev/urandom > /root/unsynced"); err != nil {
			return err
		}
		r, err := b.Client.Checkpoints.Take(b.ctx, connect.NewRequest(&vigiav1.TakeCheckpointRequest{Name: name, AsItIs: i%2 == 1}))
		if err != nil {
			return err
		}
		c := r.Msg
		fmt.Printf("%3d  pause %6.1f ms  on disk %6.0f ms  %-16s  not written to for %6.1f ms  %s\n", i, c.PauseMs, c.TookMs, c.Disk, c.FrozenMs, c.DiskWhy)
		switch {
		case i == 0: // the first one reads all of memory
		case i%2 == 1:
			bare = append(bare, c.PauseMs)
		default:
			pauses, frozen = append(pauses, c.PauseMs), append(frozen, c.FrozenMs)
			if c.Disk == "frozen" {
				kept++
			}
		}
	}
	p := func(v []float64) float64 { return table.Quantile(v, .5) }
	fmt.Printf("     pause p50 %.1f ms, without freezing %.1f ms; the guest could not write for p50 %.0f ms, worst %.0f ms; frozen %d of %d\n",
		p(pauses), p(bare), p(frozen), table.Quantile(frozen, 1), kept, len(frozen))
	b.verdicts = append(b.verdicts,
		table.Verdict{Claim: "pause with frozen file systems, against without", Measured: p(pauses) / p(bare), Target: 1.5, AtMost: true},
		table.Verdict{Claim: "the guest can't write, worst", Measured: table.Quantile(frozen, 1), Target: 1000, AtMost: true, Unit: "ms"})
	return nil
}

// arriving makes clones of one checkpoint some seconds old.
func (b *bench) arriving(name, with string) error {
	r, err := b.Client.Checkpoints.Take(b.ctx, connect.NewRequest(&vigiav1.TakeCheckpointRequest{Name: name}))
	if err != nil {
		return err
	}
	time.Sleep(3 * time.Second)
	given := map[string]int{}
	worst, same := 0.0, 0
	for i := range b.clones {
		clone := fmt.Sprintf("%s-%d", name, i)
		if err := b.Must(b.ctx, "clone", name+"@"+r.Msg.Id, clone); err != nil {
			return err
		}
		said, err := b.Console(b.ctx, clone, "head -c 32 /dev/urandom | od -An -v -w16 -tx8 | tr -d ' '; head -c 32 /dev/urandom | od -An -v -w16 -tx8 | tr -d ' '")
		for _, word := range strings.Fields(said) {
			if given[word]++; len(word) == 32 && given[word] == 2 {
				same++
			}
		}
		time.Sleep(4 * time.Second) // its clock has been looked at
		if m, merr := b.Show(b.ctx, clone); merr == nil {
			worst = max(worst, math.Abs(m.GetClockBehindSeconds()))
			fmt.Printf("     clone %d: %s; clock: %s (%.3f s); random numbers: %s\n", i, strings.Join(strings.Fields(said), " "), m.GetClock(), m.GetClockBehindSeconds(), m.GetRandom())
		}
		b.Command(context.WithoutCancel(b.ctx), "rm", "--force", clone)
		if err != nil {
			return err
		}
	}
	fmt.Printf("     %s, %d clones: %d numbers of 128 bits given out by more than one; clocks off by up to %.1f s\n", with, b.clones, same, worst)
	if with == "with the agent" {
		b.verdicts = append(b.verdicts, table.Verdict{Claim: "random numbers that two clones gave out, with the agent", Measured: float64(same), Target: 0, AtMost: true},
			table.Verdict{Claim: "clock of a clone, off by at most, with the agent", Measured: worst, Target: 1, AtMost: true, Unit: "s"})
	}
	return nil
}
