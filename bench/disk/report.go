package main

import (
	"fmt"
	"slices"
	"strings"
	"time"
)

func median[T ~int64 | ~float64](v []T) T {
	v = slices.Sorted(slices.Values(v))
	if len(v) == 0 {
		return 0
	}
	return v[len(v)/2]
}

// over is the median over the rounds of what f makes of each.
func over[T ~int64 | ~float64](r row, f func(s []sample) T) T {
	var v []T
	for _, s := range r.rounds {
		v = append(v, f(s))
	}
	return median(v)
}

// ratio says how much faster target b was than a.
func (r row) ratio(a, b int) float64 {
	return over(r, func(s []sample) float64 { return float64(s[a].wall) / float64(s[b].wall) })
}

func (r row) each(d time.Duration) float64 { return float64(d) / float64(r.count) / 1e3 }

func (r row) wall(i int) float64 {
	return r.each(over(r, func(s []sample) time.Duration { return s[i].wall }))
}

func (r row) server(i int) float64 {
	return r.each(over(r, func(s []sample) time.Duration { return s[i].server }))
}

func (r row) client(i int) float64 {
	return r.each(over(r, func(s []sample) time.Duration { return s[i].client }))
}

const raw, ours, socketOnly, theirs = 0, 1, 2, 3

func verdict(x, asked float64, ok bool) string {
	if ok {
		return fmt.Sprintf("asked %.2f: met", asked)
	}
	return fmt.Sprintf("asked %.2f: MISSED", asked)
}

func printRatios(rows []row, layers []row, clone []time.Duration) {
	for _, r := range rows {
		asked := "none asked"
		x, top := r.ratio(raw, ours), r.ratio(raw, socketOnly)
		if r.floor > 0 {
			asked = verdict(x, r.floor, x >= r.floor)
		}
		if x < r.floor && top < r.floor {
			asked += ", by the socket alone too"
		}
		fmt.Printf("%-32s %5.2f of QEMU's raw file driver (%s); the socket alone %.2f\n", r.name, x, asked, top)
	}
	for _, r := range rows {
		if !r.against {
			continue
		}
		x, c := r.ratio(theirs, ours), r.server(ours)/max(r.server(theirs), 0.1)
		fmt.Printf("%-32s %5.2f times qemu-nbd (%s), with %.2f of its CPU (%s)\n", r.name, x, verdict(x, 2, x >= 2), c, verdict(c, 0.5, c <= 0.5))
	}
	for _, r := range layers {
		x := r.ratio(one, deep)
		fmt.Printf("%-32s %5.2f over 20 layers, of 1 layer (%s)\n", r.name, x, verdict(x, 0.95, x >= 0.95))
	}
	c := float64(median(clone)) / 1e6
	fmt.Printf("%-32s %5.2f ms (%s)\n\n", "clone of a 2 GiB volume", c, verdict(c, 1, c < 1))
}

// printRows gives µs for each request: what it took, and the CPU of server and client.
func printRows(rows []row, layers []row, clone []time.Duration) {
	fmt.Printf("%-32s %s\n", "median µs for each request", "wall (CPU of server + qemu-img)")
	fmt.Printf("%-32s %22s %22s %22s %22s\n", "", "raw file", "vigia", "socket alone", "qemu-nbd")
	for _, r := range rows {
		fmt.Printf("%-32s%s\n", r.name, r.cells())
	}
	fmt.Printf("\n%-32s %22s %22s\n", "", "1 layer", "20 layers")
	for _, r := range layers {
		fmt.Printf("%-32s%s\n", r.name, r.cells())
	}
	fmt.Printf("%-32s min %v, median %v, max %v of %d\n", "clone of a 2 GiB volume", clone[0], median(clone), clone[len(clone)-1], len(clone))
}

func (r row) cells() string {
	var b strings.Builder
	for i := range r.rounds[0] {
		fmt.Fprintf(&b, " %22s", fmt.Sprintf("%.1f (%.1f + %.1f)", r.wall(i), r.server(i), r.client(i)))
	}
	return b.String()
}
