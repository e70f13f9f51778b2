package cli

import (
	"context"
	"fmt"
	"strings"

	"connectrpc.com/connect"
	"github.com/spf13/cobra"

	"vigia/internal/api"
	"vigia/internal/api/vigiav1"
)

func (a *app) checkpointCmd() *cobra.Command {
	req := &vigiav1.TakeCheckpointRequest{}
	c := &cobra.Command{
		Use:   "checkpoint NAME",
		Short: "Save a running machine: memory, devices and disk at one instant",
		Long: "Save a running machine: memory, devices and disk at one instant. The guest stands still for some milliseconds, whatever its\n" +
			"memory; what is told as its pause. A checkpoint holds what differs from the one before.\n\n" +
			"With --additions exec the guest's agent is asked to freeze the file systems around it, for a second at most: then all that was\n" +
			"written is on the disk. Else, or where it does not answer, the disk is as after a power cut.",
		Args: oneArg("NAME"),
		RunE: a.remote(func(ctx context.Context, c *api.Client, args []string) error {
			req.Name = args[0]
			res, err := c.Checkpoints.Take(ctx, connect.NewRequest(req))
			if err != nil {
				return err
			}
			return a.printCheckpoint(res.Msg)
		}),
		ValidArgsFunction: a.machineNames,
	}
	c.Flags().StringVar(&req.Label, "label", "", "what to call it, as `text`")
	c.Flags().BoolVar(&req.Stable, "stable", false, "mark it as a state to fall back to")
	c.Flags().BoolVar(&req.AsItIs, "as-it-is", false, "do not have the guest's agent freeze the file systems")
	c.AddCommand(a.checkpointMarkCmd(), a.checkpointRmCmd(), a.checkpointKeepCmd(), a.checkpointDiffCmd())
	return c
}

func (a *app) printCheckpoint(c *vigiav1.Checkpoint) error {
	if a.json() {
		return a.printJSON(c)
	}
	if c.GetWhy() != "" {
		a.note("the guest stood still while its memory was copied: %s", c.GetWhy())
	}
	if c.GetDiskWhy() != "" {
		a.note("the disk is as after a power cut: %s", c.GetDiskWhy())
	}
	return a.printf("%s pause %.1f ms, on disk after %.0f ms, %s, disk %s\n", plain(c.GetId()), c.GetPauseMs(), c.GetTookMs(), formatSize(uint64(c.GetBytes())), plain(c.GetDisk()))
}

func (a *app) checkpointMarkCmd() *cobra.Command {
	var label string
	var stable bool
	c := &cobra.Command{
		Use:   "mark ID",
		Short: "Give a checkpoint a label, or mark it as a state to fall back to",
		Args:  oneArg("ID"),
	}
	c.RunE = a.remote(func(ctx context.Context, cl *api.Client, args []string) error {
		req := &vigiav1.ChangeCheckpointRequest{Id: args[0]}
		if c.Flags().Changed("label") {
			req.Label = &label
		}
		if c.Flags().Changed("stable") {
			req.Stable = &stable
		}
		res, err := cl.Checkpoints.Change(ctx, connect.NewRequest(req))
		if err != nil {
			return err
		}
		if a.json() {
			return a.printJSON(res.Msg)
		}
		return a.printf("%s %s%s\n", plain(res.Msg.GetId()), plain(res.Msg.GetLabel()), map[bool]string{true: " (stable)"}[res.Msg.GetStable()])
	})
	c.Flags().StringVar(&label, "label", "", "what to call it, as `text`")
	c.Flags().BoolVar(&stable, "stable", false, "a state to fall back to; --stable=false takes the mark away")
	return c
}

func (a *app) checkpointRmCmd() *cobra.Command {
	return &cobra.Command{
		Use:   "rm ID…",
		Short: "Remove checkpoints; others that lie on them stay whole",
		Args:  atLeastOne("ID"),
		RunE: a.remote(func(ctx context.Context, c *api.Client, args []string) error {
			return a.removeEach("id", args, func(id string) error {
				_, err := c.Checkpoints.Remove(ctx, connect.NewRequest(&vigiav1.CheckpointRequest{Id: id}))
				return err
			})
		}),
	}
}

func (a *app) checkpointKeepCmd() *cobra.Command {
	req := &vigiav1.KeepRequest{}
	var off bool
	c := &cobra.Command{
		Use:   "keep NAME",
		Short: "Save a machine by itself at regular times, and keep the last ones",
		Long: "Save a machine by itself at regular times, and keep the last ones. What is marked stable or has a label stays beside them, and so does\n" +
			"what another machine comes from.",
		Example: "  vigia checkpoint keep web --every 5m --keep 12\n  vigia checkpoint keep web --off",
		Args:    oneArg("NAME"),
		RunE: a.remote(func(ctx context.Context, cl *api.Client, args []string) error {
			if off == (req.Every != "") {
				return usagef("say how often, as in --every 5m, or --off")
			}
			req.Name = args[0]
			res, err := cl.Checkpoints.Keep(ctx, connect.NewRequest(req))
			if err != nil {
				return err
			}
			return a.printMachine(res.Msg)
		}),
		ValidArgsFunction: a.machineNames,
	}
	c.Flags().StringVar(&req.Every, "every", "", "save it every so `often`, as in 5m")
	c.Flags().Int32Var(&req.Keep, "keep", 0, "how many of those checkpoints are kept: `N` (default 12)")
	c.Flags().BoolVar(&off, "off", false, "save it by itself no more; those there are stay")
	return c
}

func (a *app) checkpointsCmd() *cobra.Command {
	return &cobra.Command{
		Use:   "checkpoints [NAME]",
		Short: "List a machine's checkpoints, or all",
		Args:  argsBetween(0, "NAME"),
		RunE: a.remote(func(ctx context.Context, c *api.Client, args []string) error {
			req := &vigiav1.ListCheckpointsRequest{}
			if len(args) > 0 {
				req.Name = args[0]
			}
			res, err := c.Checkpoints.List(ctx, connect.NewRequest(req))
			if err != nil {
				return err
			}
			list := res.Msg.GetCheckpoints()
			if a.json() {
				return printList(a, list)
			}
			t := newTable("ID", "MACHINE", "TIME", ">PAUSE", ">SIZE", "DISK", "PARENT", "LABEL")
			for _, c := range list {
				label := c.GetLabel()
				if c.GetStable() {
					label = strings.TrimSpace(label + " (stable)")
				}
				if c.GetScheduled() {
					label = strings.TrimSpace(label + " (by rule)")
				}
				if c.GetDamaged() != "" {
					label = "DAMAGED: " + c.GetDamaged()
				}
				t.add(c.GetId(), c.GetMachine(), a.when(c.GetTime()), fmt.Sprintf("%.1f ms", c.GetPauseMs()), formatSize(uint64(c.GetBytes())), c.GetDisk(), c.GetParent(), label)
			}
			return a.printTable(t)
		}),
		ValidArgsFunction: a.machineNames,
	}
}

func (a *app) cloneCmd() *cobra.Command {
	req := &vigiav1.CloneRequest{}
	count := 0
	c := &cobra.Command{
		Use:   "clone NAME[@CHECKPOINT] NEW",
		Short: "Make a machine that goes on from a checkpoint, or from now",
		Long: "Make a machine that goes on from a checkpoint, or from another machine as it is now, which is saved for that. Memory and disk are\n" +
			"shared until they are written. The clone is in quarantine, since it believes to be the other one, until it is released.",
		Args: twoArgs("NAME[@CHECKPOINT]", "NEW"),
		RunE: a.remote(func(ctx context.Context, c *api.Client, args []string) error {
			req.Name, req.Checkpoint, _ = strings.Cut(args[0], "@")
			if strings.HasSuffix(args[0], "@") {
				return usagef("%q: name a checkpoint after the @, or leave it out", args[0])
			}
			req.NewName = args[1]
			if count != 0 {
				return a.cloneMany(ctx, c, req, count)
			}
			res, err := c.Checkpoints.Clone(ctx, connect.NewRequest(req))
			if err != nil {
				return err
			}
			if !a.json() {
				a.noteArrival(res.Msg)
			}
			return a.printMachine(res.Msg)
		}),
		ValidArgsFunction: a.machineNames,
	}
	c.Flags().IntVar(&count, "count", 0, "make so many of one checkpoint: NEW-1, NEW-2, …")
	c.Flags().StringArrayVar(&req.Publish, "publish", nil, "`[ADDRESS:]HOST:GUEST[/udp]`: forward a port of the host; repeatable")
	c.Flags().BoolVar(&req.OwnName, "own-name", false, "call the guest NEW too, by its agent (--additions exec)")
	c.Flags().StringVar(&req.Mac, "mac", "", "give its network card this `ADDRESS`, or any with new, by its agent")
	c.Flags().StringVar(&req.Address, "address", "", "give it this `ADDRESS` of 10.77.0.0/24, by its agent (default: as the other's, each is alone on its network)")
	c.Flags().BoolVar(&req.Connect, "connect", false, "let it on the network at once")
	c.Flags().StringVar(&req.Owner, "owner", "", "whose it is, as `text` (default: as the other's)")
	c.Flags().StringVar(&req.Purpose, "purpose", "", "what it is for, as `text`")
	c.Flags().StringVar(&req.Ttl, "ttl", "", "stop it after this `time`, as in 30m")
	return c
}

// maxClones bounds the clones of one command.
const maxClones = 1000

// cloneMany makes clones one after another, all of the same checkpoint: where none is named, of one that is made for it.
func (a *app) cloneMany(ctx context.Context, c *api.Client, req *vigiav1.CloneRequest, count int) error {
	if count < 1 || count > maxClones {
		return usagef("%d clones: use 1 to %d", count, maxClones)
	}
	if req.Checkpoint == "" {
		taken, err := c.Checkpoints.Take(ctx, connect.NewRequest(&vigiav1.TakeCheckpointRequest{Name: req.Name, Label: "for the clones " + req.NewName}))
		if err != nil {
			return err
		}
		req.Checkpoint = taken.Msg.Id
	}
	name := req.NewName
	var made []*vigiav1.Machine
	for i := range count {
		req.NewName = fmt.Sprintf("%s-%d", name, i+1)
		res, err := c.Checkpoints.Clone(ctx, connect.NewRequest(req))
		if err != nil {
			return fmt.Errorf("%s: %w", req.NewName, err)
		}
		made = append(made, res.Msg)
		if !a.json() {
			if err := a.printMachine(res.Msg); err != nil {
				return err
			}
		}
	}
	if a.json() {
		return printList(a, made)
	}
	return nil
}
