package cli

import (
	"context"
	"path/filepath"
	"strings"

	"connectrpc.com/connect"
	"github.com/spf13/cobra"

	"vigia/internal/api"
	"vigia/internal/api/vigiav1"
)

func (a *app) rollbackCmd() *cobra.Command {
	var dryRun bool
	req := &vigiav1.RollbackRequest{}
	c := &cobra.Command{
		Use:   "rollback NAME [CHECKPOINT]",
		Short: "Put a machine back to a checkpoint: what it did since is gone",
		Long: "Put a machine back to a checkpoint, or without one to its last stable one: memory, devices and disk. Its open connections are cut,\n" +
			"and its clock is behind by as long as the checkpoint is old.\n\n" +
			"The state that is left is saved first, as a checkpoint, and what comes back that was mended since is listed: accounts that were\n" +
			"locked, keys that were taken out, packages with holes. With --dry-run it is only listed; exit status 3 if there is any.",
		Args: argsBetween(1, "NAME", "CHECKPOINT"),
		RunE: a.remote(func(ctx context.Context, c *api.Client, args []string) error {
			req.Name = args[0]
			if len(args) > 1 {
				req.Checkpoint = args[1]
			}
			if req.Vulnerabilities != "" {
				path, err := filepath.Abs(req.Vulnerabilities)
				if err != nil {
					return err
				}
				req.Vulnerabilities = path
			}
			if dryRun {
				return a.reopens(ctx, c, req)
			}
			res, err := c.Checkpoints.Rollback(ctx, connect.NewRequest(req))
			if err != nil {
				return err
			}
			if a.json() {
				return a.printJSON(res.Msg)
			}
			if left := res.Msg.GetLeft(); left != "" {
				a.note("the state that was left is checkpoint %s", left)
			}
			if list := res.Msg.GetReopens(); len(list) > 0 {
				a.note("this is back, and had been mended:")
				if err := a.printReopened(list); err != nil {
					return err
				}
			}
			a.noteArrival(res.Msg.GetMachine())
			return a.printMachine(res.Msg.GetMachine())
		}),
		ValidArgsFunction: a.machineNames,
	}
	c.Flags().BoolVar(&dryRun, "dry-run", false, "only list what would come back; the machine goes on")
	c.Flags().BoolVar(&req.AtOnce, "at-once", false, "save nothing first, and list nothing")
	c.Flags().StringVar(&req.Vulnerabilities, "vulnerabilities", "", "also list the holes in packages, by this `file`: the JSON of Debian's security tracker, or of OSV")
	c.MarkFlagsMutuallyExclusive("dry-run", "at-once")
	c.MarkFlagsMutuallyExclusive("vulnerabilities", "at-once")
	return c
}

// noteArrival says what is not as it should be in a guest that goes on from a checkpoint, as far as it is known by now.
func (a *app) noteArrival(m *vigiav1.Machine) {
	const right = 1 // second
	if behind := m.GetClockBehindSeconds(); behind > right || behind < -right {
		a.note("the guest's clock is %s", plain(m.GetClock()))
	}
	if strings.HasPrefix(m.GetRandom(), "may repeat") {
		a.note("the guest's random numbers %s", plain(m.GetRandom()))
	}
}

func (a *app) reopens(ctx context.Context, c *api.Client, req *vigiav1.RollbackRequest) error {
	res, err := c.Checkpoints.Reopens(ctx, connect.NewRequest(req))
	if err != nil {
		return err
	}
	list := res.Msg.GetReopens()
	switch {
	case a.json():
		err = a.printJSON(res.Msg)
	case len(list) == 0:
		err = a.printf("nothing that was mended since checkpoint %s would come back\n", plain(res.Msg.GetCheckpoint()))
	default:
		err = a.printReopened(list)
	}
	if err == nil && len(list) > 0 {
		return ErrFound
	}
	return err
}

func (a *app) printReopened(list []*vigiav1.Reopened) error {
	t := newTable("SEVERITY", "KIND", "SUBJECT", "DETAIL")
	for _, r := range list {
		t.add(strings.ToUpper(r.GetSeverity()), r.GetKind(), r.GetSubject(), r.GetDetail())
	}
	return a.printTable(t)
}
