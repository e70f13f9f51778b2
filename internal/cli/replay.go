package cli

import (
	"context"
	"strings"
	"time"

	"connectrpc.com/connect"
	"github.com/spf13/cobra"

	"vigia/internal/api"
	"vigia/internal/api/vigiav1"
)

// replayPoll is how often it is looked whether a replay has come to its end.
const replayPoll = 500 * time.Millisecond

func (a *app) replayCmd() *cobra.Command {
	var verify bool
	req := &vigiav1.ReplayRequest{}
	c := &cobra.Command{
		Use:   "replay NAME",
		Short: "Do again, under all eyes, what a recorded machine did in its last run",
		Long: "Do again, instruction by instruction, what a machine that was run with --record did in its last run. A machine of its own does it,\n" +
			"NAME-replay, without network and without touching the other one; ps, check, trace, events and console work on it as on any.\n" +
			"At the end console and disk are compared with the recording's: show NAME says whether it is exact.\n\n" +
			"With --verify the end is waited for and the machine removed again; exit status 3 if it is not exact.",
		Args: oneArg("NAME"),
		RunE: a.remote(func(ctx context.Context, c *api.Client, args []string) error {
			req.Name = args[0]
			res, err := c.Machines.Replay(ctx, connect.NewRequest(req))
			if err != nil {
				return err
			}
			if !verify {
				return a.printMachine(res.Msg)
			}
			verdict, err := a.untilReplayed(ctx, c, res.Msg.GetName())
			if _, rerr := c.Machines.Remove(context.WithoutCancel(ctx), connect.NewRequest(&vigiav1.RemoveRequest{Name: res.Msg.GetName(), Force: true})); err == nil {
				err = rerr
			}
			if err != nil {
				return err
			}
			exact := strings.HasPrefix(verdict, "exact")
			if a.json() {
				err = a.printValue(map[string]any{"name": req.Name, "exact": exact, "reason": verdict})
			} else {
				err = a.printf("%s\n", plain(verdict))
			}
			if err == nil && !exact {
				return ErrFound
			}
			return err
		}),
		ValidArgsFunction: a.machineNames,
	}
	c.Flags().StringVar(&req.NewName, "as", "", "the `name` of the machine that replays (default NAME-replay)")
	c.Flags().BoolVar(&verify, "verify", false, "wait for the end, say whether it is exact, and remove the machine that replayed")
	return c
}

// untilReplayed waits until the replay has ended and was judged.
func (a *app) untilReplayed(ctx context.Context, c *api.Client, name string) (string, error) {
	for {
		res, err := c.Machines.Show(ctx, machine(name))
		if err != nil {
			return "", err
		}
		if reason := res.Msg.GetReason(); res.Msg.GetPid() == 0 && (strings.HasPrefix(reason, "exact") || strings.HasPrefix(reason, "not known")) {
			return reason, nil
		}
		select {
		case <-time.After(replayPoll):
		case <-ctx.Done():
			return "", ctx.Err()
		}
	}
}
