// Package table prints what a bench measured: ratios against their targets first, raw rows after.
package table

import (
	"fmt"
	"io"
	"slices"
	"strings"
	"text/tabwriter"
)

// Verdict is one claim and what was measured of it.
type Verdict struct {
	Claim    string
	Measured float64
	Target   float64
	AtMost   bool // else at least
	Unit     string
}

// Print writes the verdicts.
func Print(w io.Writer, verdicts []Verdict) {
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	fmt.Fprintln(t, "CLAIM\tMEASURED\tTARGET\t")
	for _, v := range verdicts {
		sign, met := "≥", v.Measured >= v.Target
		if v.AtMost {
			sign, met = "≤", v.Measured <= v.Target
		}
		word := "met"
		if !met {
			word = "MISSED"
		}
		fmt.Fprintf(t, "%s\t%s\t%s %s\t%s\n", v.Claim, number(v.Measured, v.Unit), sign, number(v.Target, v.Unit), word)
	}
	t.Flush()
}

func number(f float64, unit string) string {
	return strings.TrimSpace(fmt.Sprintf("%.4g %s", f, unit))
}

// Quantile returns the q-th quantile (0 to 1) of the values, by the nearest rank.
func Quantile(values []float64, q float64) float64 {
	if len(values) == 0 {
		return 0
	}
	s := slices.Sorted(slices.Values(values))
	return s[min(len(s)-1, int(q*float64(len(s))))]
}
