package cli

import (
	"context"
	"fmt"
	"strings"
	"time"

	"connectrpc.com/connect"
	"github.com/spf13/cobra"

	"vigia/internal/api"
	"vigia/internal/api/vigiav1"
)

// replayPoll is how often it is looked whether a replay has come to its end, or where it was to stop.
const replayPoll = 500 * time.Millisecond

// moments is how a place in a recording is written.
const moments = "A place in a recording (MOMENT) is a count of instructions (123456789), a time after the recorded run's begin (+90s), a time as it was on the\n" +
	"host while it was recorded (2026-11-22T10:00:00Z), both right to some seconds, or the first event of a kind, with fields that it must have:\n" +
	"process.started,exe=/usr/bin/passwd or file.opened,path=*shadow. At an event of a probe it stops there, at others as soon as they are known."

func (a *app) replayCmd() *cobra.Command {
	var verify bool
	var again reenactment
	req := &vigiav1.ReplayRequest{}
	c := &cobra.Command{
		Use:   "replay NAME[@CHECKPOINT]",
		Short: "Do again, under all eyes, what a recorded machine did in its last run",
		Long: "Do again, instruction by instruction, what a machine that was run with --record did in its last run. A machine of its own does it,\n" +
			"NAME-replay, without network and without touching the other one; ps, check, trace, events and console work on it as on any.\n" +
			"At the end console, disk and network frames are compared with the recording's: show NAME says whether it is exact.\n\n" +
			"With --verify the end is waited for and the machine removed again; exit status 3 if it is not exact.\n" +
			"With --until it stops by itself and waits there, to be looked at: go on with resume, or with seek to another moment.\n\n" + moments + "\n\n" +
			"With a checkpoint, of any machine: a clone of it is given again all that has entered the machine since (flows, console, guest channel), cut off\n" +
			"the network, at its pace, and the timeline says which process followed from which input. Not bit-exact. See doc/tutorial/re-enact.md.",
		Example: `  vigia replay web --verify
  vigia replay web --until process.started,exe=*/sh && vigia ps web-replay
  vigia seek web-replay +30s`,
		Args: oneArg("NAME"),
		RunE: a.remote(func(ctx context.Context, c *api.Client, args []string) error {
			req.Name = args[0]
			if name, checkpoint, found := strings.Cut(req.Name, "@"); found {
				again.as = req.NewName
				return a.reenact(ctx, c, name, checkpoint, again)
			}
			if verify && (req.Until != "" || req.Gdb) {
				return usagef("--verify replays to the end: use it without --until and --gdb")
			}
			res, err := c.Machines.Replay(ctx, connect.NewRequest(req))
			if err != nil {
				return err
			}
			switch {
			case verify:
				return a.verified(ctx, c, req.Name, res.Msg.GetName())
			case req.Until != "":
				return a.stoppedThere(ctx, c, res.Msg.GetName())
			}
			if at := res.Msg.GetReplay().GetGdb(); at != "" && !a.json() {
				a.note("for a debugger: gdb -ex 'target remote %s'", at)
			}
			return a.printMachine(res.Msg)
		}),
		ValidArgsFunction: a.machineNames,
	}
	c.Flags().StringVar(&req.NewName, "as", "", "the `name` of the machine that replays (default NAME-replay)")
	c.Flags().StringVar(&req.Until, "until", "", "stop at this `MOMENT`, and wait for it")
	c.Flags().BoolVar(&req.Gdb, "gdb", false, "let a debugger in, on a socket that only you can open: show says which")
	c.Flags().BoolVar(&verify, "verify", false, "wait for the end, say whether it is exact, and remove the machine that replayed")
	c.Flags().DurationVar(&again.wait, "wait", 0, "of a checkpoint: cut waits in which nothing entered to so long (default: as they were)")
	c.Flags().BoolVar(&again.remove, "rm", false, "of a checkpoint: remove the clone at the end")
	return c
}

func (a *app) seekCmd() *cobra.Command {
	return &cobra.Command{
		Use:   "seek REPLAY MOMENT",
		Short: "Have a replay go to a moment, ahead or behind, and stop there",
		Long: "Have a machine that replays go on to a moment, and stop there. What lies behind is reached from the beginning again: the replay is ended\n" +
			"and another one of the same name begins, which takes as long as the first time. An event is looked for from where the replay is.\n\n" + moments,
		Args: twoArgs("REPLAY", "MOMENT"),
		RunE: a.remote(func(ctx context.Context, c *api.Client, args []string) error {
			res, err := c.Machines.Seek(ctx, connect.NewRequest(&vigiav1.SeekRequest{Name: args[0], To: args[1]}))
			if err != nil {
				return err
			}
			return a.stoppedThere(ctx, c, res.Msg.GetName())
		}),
		ValidArgsFunction: a.machineNames,
	}
}

// verified waits for a replay's end, and tells the verdict.
func (a *app) verified(ctx context.Context, c *api.Client, name, replay string) error {
	verdict, err := a.untilReplayed(ctx, c, replay)
	if _, rerr := c.Machines.Remove(context.WithoutCancel(ctx), connect.NewRequest(&vigiav1.RemoveRequest{Name: replay, Force: true})); err == nil {
		err = rerr
	}
	if err != nil {
		return err
	}
	exact := strings.HasPrefix(verdict, "exact")
	if a.json() {
		err = a.printValue(map[string]any{"name": name, "exact": exact, "reason": verdict})
	} else {
		err = a.printf("%s\n", plain(verdict))
	}
	if err == nil && !exact {
		return ErrFound
	}
	return err
}

// stoppedThere waits until a replay has stopped where it was to, and says where that is; exit status 3 where it has ended before.
func (a *app) stoppedThere(ctx context.Context, c *api.Client, name string) error {
	for {
		res, err := c.Machines.Show(ctx, machine(name))
		if err != nil {
			return err
		}
		r := res.Msg.GetReplay()
		switch {
		case res.Msg.GetPid() == 0:
			if err := a.printStop(res.Msg, "ended before it came there: "+res.Msg.GetReason()); err != nil {
				return err
			}
			return ErrFound
		case r.GetUntil() == "":
			return a.printStop(res.Msg, inWords(r))
		}
		select {
		case <-time.After(replayPoll):
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

func (a *app) printStop(m *vigiav1.Machine, words string) error {
	if a.json() {
		return a.printJSON(m)
	}
	return a.printf("%s %s\n", plain(m.GetName()), plain(words))
}

func inWords(r *vigiav1.Replay) string {
	s := fmt.Sprintf("stopped at instruction %d", r.GetInstruction())
	if e := r.GetEvent(); e != "" {
		s += ", at " + e
		if !r.GetExact() {
			s += " (as soon as it was known)"
		}
	}
	if t := r.GetRecorded(); t != nil {
		s += "; recorded about " + t.AsTime().UTC().Format(time.RFC3339)
	}
	return s
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
