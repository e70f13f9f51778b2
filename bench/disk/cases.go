package main

import (
	"context"
	"fmt"
	"os/exec"
	"regexp"
	"strconv"
	"time"
)

// benchCase is one kind of load, as arguments for qemu-img bench.
type benchCase struct {
	name    string
	count   int
	args    []string
	floor   float64 // least ratio to the raw file driver that is asked for; 0: none is
	against bool    // also twice as fast as qemu-nbd with half its CPU
	after   bool    // on the overlay as the case before left it, not on a new one
}

func (c benchCase) write() bool { return c.args[0] == "-w" }

// A step of 251 blocks goes through the disk without meeting itself for long: qemu-img bench has no random mode.
const scatter = "1028096"

func cases(scale int) []benchCase {
	small := func(name string, count int, floor float64, against bool, args ...string) benchCase {
		return benchCase{name, count / scale, append(args, "-s", "4k", "-S", scatter), floor, against, false}
	}
	large := func(name string, count int, floor float64, after bool, args ...string) benchCase {
		return benchCase{name, count / scale, append(args, "-d", "8", "-s", "1M"), floor, false, after}
	}
	return []benchCase{
		small("4k scattered read, depth 1", 30000, 0.9, false, "-d", "1"),
		small("4k scattered read, depth 32", 80000, 0.9, true, "-d", "32"),
		small("4k scattered write, depth 1", 20000, 0.8, false, "-w", "-d", "1"),
		small("4k scattered write, depth 32", 40000, 0.8, true, "-w", "-d", "32"),
		large("1 MiB read of what that left", 2000, 0, true),
		large("1 MiB sequential read", 4000, 0.8, false),
		large("1 MiB sequential write", 2000, 0.8, false, "-w"),
	}
}

// sample is one run of one target. CPU is the server's, and that of qemu-img.
type sample struct{ wall, server, client time.Duration }

// row is all runs of a case, by round and target.
type row struct {
	benchCase
	rounds [][]sample
}

func (t *targets) measure(ctx context.Context, c benchCase, rounds int) (row, error) {
	if err := t.prepare(ctx, c); err != nil {
		return row{}, err
	}
	if !c.against {
		return inTurn(ctx, t.list[:theirs], c, rounds)
	}
	return inTurn(ctx, t.list, c, rounds)
}

// inTurn runs a case on every target in each round, a different one first each time.
func inTurn(ctx context.Context, list []target, c benchCase, rounds int) (row, error) {
	r := row{benchCase: c}
	for round := range rounds + 1 {
		samples := make([]sample, len(list))
		for i := range list {
			k := (i + round) % len(list)
			s, err := list[k].bench(ctx, c)
			if err != nil {
				return r, err
			}
			samples[k] = s
		}
		if round > 0 { // the first fills caches and makes overlay and file equally allocated
			r.rounds = append(r.rounds, samples)
		}
	}
	return r, nil
}

var completed = regexp.MustCompile(`Run completed in ([0-9.]+) seconds`)

func (t *target) bench(ctx context.Context, c benchCase) (sample, error) {
	args := append([]string{"bench", "-f", "raw", "-c", strconv.Itoa(c.count)}, c.args...)
	cmd := exec.CommandContext(ctx, "qemu-img", append(args, t.url)...)
	before := t.cpu()
	out, err := cmd.CombinedOutput()
	if err != nil {
		return sample{}, fmt.Errorf("qemu-img bench on %s: %w\n%s", t.name, err, out)
	}
	m := completed.FindSubmatch(out)
	if m == nil {
		return sample{}, fmt.Errorf("qemu-img bench on %s: %s", t.name, out)
	}
	seconds, err := strconv.ParseFloat(string(m[1]), 64)
	client := cmd.ProcessState.UserTime() + cmd.ProcessState.SystemTime()
	return sample{time.Duration(seconds * 1e9), t.cpu() - before, client}, err
}
