package main

import (
	"fmt"
	"io"
	"slices"
	"text/tabwriter"
)

// row is one measurement.
type row struct {
	path      string
	reverse   bool
	round     int
	mbit      float64
	gbit      float64 // moved in all
	qemu, own float64 // CPU seconds
}

func (r *row) direction() string {
	if r.reverse {
		return "host→guest"
	}
	return "guest→host"
}

// goals are those that the project holds its network to.
var goals = map[string]float64{"slirp": 1.0, "passt": 0.8}

func print(w io.Writer, rows []row) {
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	fmt.Fprintln(t, "vigia against\tdirection\tratio\tat least\t")
	for _, other := range []string{"slirp", "passt"} {
		for _, reverse := range []bool{false, true} {
			theirs := median(rows, other, reverse, func(r *row) float64 { return r.mbit })
			if theirs == 0 {
				continue
			}
			ours := median(rows, "vigia", reverse, func(r *row) float64 { return r.mbit })
			verdict := ""
			if ours/theirs < goals[other] {
				verdict = "MISSED"
			}
			fmt.Fprintf(t, "%s\t%s\t%.2f\t%.1f\t%s\n", other, (&row{reverse: reverse}).direction(), ours/theirs, goals[other], verdict)
		}
	}
	for _, reverse := range []bool{false, true} {
		if kept := median(rows, "kept", reverse, func(r *row) float64 { return r.mbit }); kept > 0 {
			fmt.Fprintf(t, "what enters is kept, to not kept\t%s\t%.2f\t\t\n", (&row{reverse: reverse}).direction(), kept/median(rows, "vigia", reverse, func(r *row) float64 { return r.mbit }))
		}
	}
	fmt.Fprintln(t, "\nmedians\tdirection\tMbit/s\tCPU s/Gbit, all\tnetwork process alone\t")
	for _, name := range []string{"slirp", "vigia", "vigia1500", "kept", "passt"} {
		for _, reverse := range []bool{false, true} {
			mbit := median(rows, name, reverse, func(r *row) float64 { return r.mbit })
			if mbit == 0 {
				continue
			}
			all := median(rows, name, reverse, func(r *row) float64 { return (r.qemu + r.own) / r.gbit })
			own := median(rows, name, reverse, func(r *row) float64 { return r.own / r.gbit })
			fmt.Fprintf(t, "%s\t%s\t%.0f\t%.2f\t%.2f\t\n", name, (&row{reverse: reverse}).direction(), mbit, all, own)
		}
	}
	fmt.Fprintln(t, "\nround\tpath\tdirection\tMbit/s\tQEMU CPU s\tnetwork CPU s\t")
	for _, r := range rows {
		fmt.Fprintf(t, "%d\t%s\t%s\t%.0f\t%.2f\t%.2f\t\n", r.round+1, r.path, r.direction(), r.mbit, r.qemu, r.own)
	}
	t.Flush()
}

func median(rows []row, path string, reverse bool, of func(*row) float64) float64 {
	var v []float64
	for i := range rows {
		if rows[i].path == path && rows[i].reverse == reverse {
			v = append(v, of(&rows[i]))
		}
	}
	if len(v) == 0 {
		return 0
	}
	slices.Sort(v)
	return (v[(len(v)-1)/2] + v[len(v)/2]) / 2
}
