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
	floor   float64 // least ratio to the raw file driver that is asked for
	against bool    // also twice as fast as qemu-nbd with half its CPU
}

// A step of 251 blocks goes through the disk without meeting itself for long: qemu-img bench has no random mode.
const scatter = "1028096"

func cases(scale int) []benchCase {
	c := func(name string, count int, floor float64, against bool, args ...string) benchCase {
		return benchCase{name, count / scale, args, floor, against}
	}
	return []benchCase{
		c("4k scattered read, depth 1", 40000, 0.9, false, "-d", "1", "-s", "4k", "-S", scatter),
		c("4k scattered read, depth 32", 100000, 0.9, true, "-d", "32", "-s", "4k", "-S", scatter),
		c("4k scattered write, depth 1", 30000, 0.8, false, "-w", "-d", "1", "-s", "4k", "-S", scatter),
		c("4k scattered write, depth 32", 60000, 0.8, true, "-w", "-d", "32", "-s", "4k", "-S", scatter),
		c("1 MiB sequential read, depth 8", 3000, 0.8, false, "-d", "8", "-s", "1M"),
		c("1 MiB sequential write, depth 8", 2000, 0.8, false, "-w", "-d", "8", "-s", "1M"),
	}
}

// sample is one run of one target.
type sample struct{ wall, cpu time.Duration }

// row is all runs of a case, by round and target.
type row struct {
	benchCase
	rounds [][]sample
}

func (t *targets) measure(ctx context.Context, cs []benchCase, rounds int) ([]row, error) {
	var rows []row
	for _, c := range cs {
		r := row{benchCase: c}
		for round := range rounds + 1 {
			samples := make([]sample, len(t.list))
			for i := range t.list {
				k := (i + round) % len(t.list)
				s, err := t.list[k].bench(ctx, c)
				if err != nil {
					return nil, err
				}
				samples[k] = s
			}
			if round > 0 { // the first fills caches and makes overlay and file equally allocated
				r.rounds = append(r.rounds, samples)
			}
		}
		rows = append(rows, r)
	}
	return rows, nil
}

var completed = regexp.MustCompile(`Run completed in ([0-9.]+) seconds`)

func (t target) bench(ctx context.Context, c benchCase) (sample, error) {
	args := append([]string{"bench", "-f", "raw", "-c", strconv.Itoa(c.count)}, c.args...)
	cmd := exec.CommandContext(ctx, "qemu-img", append(args, t.url)...)
	before := cpuTime(t.pid)
	out, err := cmd.CombinedOutput()
	if err != nil {
		return sample{}, fmt.Errorf("qemu-img bench on %s: %w\n%s", t.name, err, out)
	}
	m := completed.FindSubmatch(out)
	if m == nil {
		return sample{}, fmt.Errorf("qemu-img bench on %s: %s", t.name, out)
	}
	seconds, err := strconv.ParseFloat(string(m[1]), 64)
	s := sample{wall: time.Duration(seconds * 1e9), cpu: cpuTime(t.pid) - before}
	if t.pid == 0 {
		s.cpu = cmd.ProcessState.UserTime() + cmd.ProcessState.SystemTime()
	}
	return s, err
}
