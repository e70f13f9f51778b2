package cli

import (
	"context"
	"fmt"
	"strings"

	"github.com/spf13/cobra"

	"vigia/internal/api"
	"vigia/internal/api/vigiav1"
)

func (a *app) checkCmd() *cobra.Command {
	var verbose bool
	c := &cobra.Command{
		Use:   "check NAME",
		Short: "Look for what hides in a machine's kernel, or has changed it; ends with 3 if something does",
		Long: "Look for what hides in a machine's kernel, or has changed it: lists of processes, modules and sockets that differ,\n" +
			"credentials that nobody gave, code and tables that are not the kernel file's. Ends with 3 if something was found.",
		Args: oneArg("NAME"),
		RunE: a.remote(func(ctx context.Context, c *api.Client, args []string) error {
			res, err := c.Views.Check(ctx, machine(args[0]))
			if err != nil {
				return err
			}
			if err := a.printCheck(res.Msg, verbose); err != nil {
				return err
			}
			for _, f := range res.Msg.GetFindings() {
				if f.GetSeverity() != "info" {
					return ErrFound
				}
			}
			return nil
		}),
		ValidArgsFunction: a.machineNames,
	}
	c.Flags().BoolVarP(&verbose, "verbose", "v", false, "print the evidence too, and what was compared")
	return c
}

func (a *app) printCheck(res *vigiav1.CheckResponse, verbose bool) error {
	if a.json() {
		return a.printJSON(res)
	}
	if len(res.GetFindings()) > 0 {
		t := newTable("SEVERITY", "KIND", "SUBJECT", "DETAIL")
		for _, f := range res.GetFindings() {
			t.add(strings.ToUpper(f.GetSeverity()), f.GetKind(), f.GetSubject(), f.GetDetail())
			if verbose {
				for _, e := range f.GetEvidence() {
					t.add("", "", "", evidence(e))
				}
			}
		}
		if err := a.printTable(t); err != nil {
			return err
		}
	}
	if n := res.GetDropped(); n > 0 {
		a.note("%d more findings are not shown", n)
	}
	if verbose {
		t := newTable("CHECK", "VIEW", ">COUNT", "UNKNOWN")
		for _, v := range res.GetViews() {
			t.add(v.GetCheck(), v.GetName(), number(v.GetCount()), v.GetUnknown())
		}
		if err := a.printTable(t); err != nil {
			return err
		}
	}
	unknown := 0
	for _, v := range res.GetViews() {
		if v.GetUnknown() != "" {
			unknown++
		}
	}
	text := fmt.Sprintf("%s, %s compared, %.0f ms", count(len(res.GetFindings()), "finding"), count(len(res.GetViews())-unknown, "view"), res.GetTookMs())
	if unknown > 0 && !verbose {
		text += fmt.Sprintf("; %d could not be read, see: vigia check -v", unknown)
	}
	return a.printf("%s\n", text)
}

func count(n int, what string) string {
	if n != 1 {
		what += "s"
	}
	return fmt.Sprintf("%d %s", n, what)
}

// evidence is one line of what was read.
func evidence(e *vigiav1.Evidence) string {
	var b strings.Builder
	fmt.Fprintf(&b, "at 0x%016x", e.GetAddress())
	if e.GetNote() != "" {
		fmt.Fprintf(&b, " %s", e.GetNote())
	}
	if e.GetBytes() != "" {
		fmt.Fprintf(&b, ": %s", e.GetBytes())
	}
	if e.GetExpected() != "" {
		fmt.Fprintf(&b, ", expected %s", e.GetExpected())
	}
	return b.String()
}
