package main

import (
	"fmt"
	"slices"
	"time"
)

func median[T ~int64 | ~float64](v []T) T {
	v = slices.Sorted(slices.Values(v))
	if len(v) == 0 {
		return 0
	}
	return v[len(v)/2]
}

// ratio is the median over rounds of how much faster target b was than a.
func (r row) ratio(a, b int) float64 {
	var v []float64
	for _, s := range r.rounds {
		v = append(v, float64(s[a].wall)/float64(s[b].wall))
	}
	return median(v)
}

func (r row) cpu(i int) time.Duration {
	var v []time.Duration
	for _, s := range r.rounds {
		v = append(v, s[i].cpu/time.Duration(r.count))
	}
	return median(v)
}

func (r row) wall(i int) time.Duration {
	var v []time.Duration
	for _, s := range r.rounds {
		v = append(v, s[i].wall)
	}
	return median(v)
}

func verdict(ok bool) string {
	if ok {
		return ""
	}
	return "  BELOW"
}

const raw, ours, theirs = 0, 1, 2

func printRatios(rows []row, deep []pair, clone []time.Duration) {
	for _, r := range rows {
		x := r.ratio(raw, ours)
		fmt.Printf("%-34s %5.2f of QEMU's raw file driver (asked %.2f)%s\n", r.name, x, r.floor, verdict(x >= r.floor))
	}
	for _, r := range rows {
		if !r.against {
			continue
		}
		x, c := r.ratio(theirs, ours), float64(r.cpu(ours))/float64(max(r.cpu(theirs), 1))
		fmt.Printf("%-34s %5.2f times qemu-nbd (asked 2.00)%s, %.2f of its CPU (asked 0.50)%s\n", r.name, x, verdict(x >= 2), c, verdict(c <= 0.5))
	}
	for _, p := range deep {
		x := p.ratio()
		fmt.Printf("%-34s %5.2f over 20 layers, of 1 layer (asked 0.95)%s\n", p.name, x, verdict(x >= 0.95))
	}
	c := median(clone)
	fmt.Printf("%-34s %5.2f ms (asked below 1)%s\n\n", "clone of a 2 GiB volume", float64(c)/1e6, verdict(c < time.Millisecond))
}

func (p pair) ratio() float64 {
	var v []float64
	for i := 1; i < len(p.one); i++ {
		v = append(v, float64(p.one[i])/float64(p.deep[i]))
	}
	return median(v)
}

func printRows(rows []row, deep []pair, clone []time.Duration) {
	fmt.Printf("%-34s %10s %10s %10s   %s\n", "seconds, median", "raw file", "vigia", "qemu-nbd", "CPU per request: qemu-img on raw, vigia, qemu-nbd")
	for _, r := range rows {
		fmt.Printf("%-34s %10.3f %10.3f %10.3f   %v %v %v\n", r.name, r.wall(raw).Seconds(), r.wall(ours).Seconds(), r.wall(theirs).Seconds(),
			r.cpu(raw).Round(100*time.Nanosecond), r.cpu(ours).Round(100*time.Nanosecond), r.cpu(theirs).Round(100*time.Nanosecond))
	}
	for _, p := range deep {
		fmt.Printf("%-34s 1 layer %v, 20 layers %v\n", p.name, median(p.one[1:]), median(p.deep[1:]))
	}
	fmt.Printf("clone of a 2 GiB volume            min %v, median %v, max %v of %d\n", clone[0], median(clone), clone[len(clone)-1], len(clone))
}
