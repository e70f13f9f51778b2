package cli

import (
	"bufio"
	"fmt"
	"io"
	"maps"
	"slices"

	"github.com/spf13/cobra"

	"vigia/internal/api/vigiav1/vigiav1connect"
)

type vigiaMachines = vigiav1connect.MachinesClient

// sheet is one thing described: a line per property, those without a value left out.
type sheet struct{ lines [][2]string }

func (s *sheet) add(name, value string) {
	if value != "" {
		s.lines = append(s.lines, [2]string{name, plain(value)})
	}
}

func (s *sheet) write(w io.Writer) error {
	width := 0
	for _, l := range s.lines {
		width = max(width, len(l[0]))
	}
	out := bufio.NewWriter(w)
	for _, l := range s.lines {
		fmt.Fprintf(out, "%-*s  %s\n", width+1, l[0]+":", l[1])
	}
	return out.Flush()
}

func number[N int32 | int64 | uint32 | uint64](n N) string { return fmt.Sprint(n) }

func yesNo(b bool) string {
	if b {
		return "yes"
	}
	return "NO"
}

func sortedKeys[V any](m map[string]V) []string { return slices.Sorted(maps.Keys(m)) }

// oneArg and twoArgs want exactly what they name, and say so.
func oneArg(name string) cobra.PositionalArgs { return wantArgs(name) }

func twoArgs(first, second string) cobra.PositionalArgs { return wantArgs(first, second) }

// argsBetween wants the first least of what it names, and takes the others.
func argsBetween(least int, names ...string) cobra.PositionalArgs {
	return func(c *cobra.Command, args []string) error {
		return wantArgs(names[:max(least, min(len(args), len(names)))]...)(c, args)
	}
}

func wantArgs(names ...string) cobra.PositionalArgs {
	return func(_ *cobra.Command, args []string) error {
		if len(args) < len(names) {
			return usagef("%s is missing", names[len(args)])
		}
		if len(args) > len(names) {
			return usagef("%q is one argument too many", args[len(names)])
		}
		return nil
	}
}

func atLeastOne(name string) cobra.PositionalArgs {
	return func(_ *cobra.Command, args []string) error {
		if len(args) == 0 {
			return usagef("%s is missing", name)
		}
		return nil
	}
}
