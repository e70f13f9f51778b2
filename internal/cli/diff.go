package cli

import (
	"context"
	"fmt"

	"connectrpc.com/connect"
	"github.com/spf13/cobra"

	"vigia/internal/api"
	"vigia/internal/api/vigiav1"
)

func (a *app) checkpointDiffCmd() *cobra.Command {
	return &cobra.Command{
		Use:   "diff NAME FROM [TO]",
		Short: "List the files and processes that differ between two checkpoints, or one and now",
		Long: "List the files and processes that differ between two checkpoints of a machine, or without TO, or with \"now\", between one and now. Disks\n" +
			"and memories are read from outside. A file that was written and given its old times again is found by its content.",
		Args: argsBetween(2, "NAME", "FROM", "TO"),
		RunE: a.remote(func(ctx context.Context, c *api.Client, args []string) error {
			req := &vigiav1.DiffRequest{Name: args[0], From: args[1]}
			if len(args) > 2 && args[2] != "now" {
				req.To = args[2]
			}
			res, err := c.Checkpoints.Diff(ctx, connect.NewRequest(req))
			if err != nil {
				return err
			}
			if a.json() {
				return a.printJSON(res.Msg)
			}
			return a.printDiff(res.Msg)
		}),
		ValidArgsFunction: a.machineNames,
	}
}

func (a *app) printDiff(d *vigiav1.DiffResponse) error {
	for _, n := range d.GetNotes() {
		a.note("%s", n)
	}
	if len(d.GetFiles())+len(d.GetProcesses()) == 0 {
		return a.printf("no difference was found\n")
	}
	if list := d.GetFiles(); len(list) > 0 {
		t := newTable("CHANGE", "WHAT", "MODE", "OWNER", ">SIZE", "PATH")
		for _, f := range list {
			b, n := f.GetBefore(), f.GetAfter()
			t.add(f.GetChange(), joined(f.GetWhat()), both(b, n, (*vigiav1.FileState).GetMode), both(b, n, owner), both(b, n, size), f.GetPath())
		}
		if err := a.printTable(t); err != nil {
			return err
		}
	}
	if list := d.GetProcesses(); len(list) > 0 {
		if len(d.GetFiles()) > 0 {
			if err := a.printf("\n"); err != nil {
				return err
			}
		}
		t := newTable("CHANGE", "WHAT", ">PID", ">PPID", ">UID", "COMMAND")
		for _, p := range list {
			command := p.GetCmdline()
			if command == "" {
				command = "[" + p.GetComm() + "]"
			}
			t.add(p.GetChange(), joined(p.GetWhat()), fmt.Sprint(p.GetPid()), fmt.Sprint(p.GetPpid()), fmt.Sprint(p.GetUid()), command)
		}
		if err := a.printTable(t); err != nil {
			return err
		}
	}
	if n, m := d.GetFilesLeftOut(), d.GetProcessesLeftOut(); n+m > 0 {
		a.note("%d files and %d processes more differ", n, m)
	}
	return nil
}

func owner(f *vigiav1.FileState) string { return fmt.Sprintf("%d:%d", f.GetUid(), f.GetGid()) }
func size(f *vigiav1.FileState) string  { return formatSize(uint64(f.GetSize())) }

// both is what was and what is, once where they are alike.
func both(before, after *vigiav1.FileState, get func(*vigiav1.FileState) string) string {
	switch {
	case before == nil:
		return get(after)
	case after == nil || get(before) == get(after):
		return get(before)
	}
	return get(before) + " → " + get(after)
}
