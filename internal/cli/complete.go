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

// Completion asks the daemon, briefly: a shell that waits for Tab must not hang on it.
const completionTime = time.Second

// machineNames completes the first argument with the machines of the daemon.
func (a *app) machineNames(_ *cobra.Command, args []string, _ string) ([]string, cobra.ShellCompDirective) {
	if len(args) > 0 {
		return nil, cobra.ShellCompDirectiveNoFileComp
	}
	return a.listMachines(), cobra.ShellCompDirectiveNoFileComp
}

// imageNames completes the first argument with the images of the daemon.
func (a *app) imageNames(_ *cobra.Command, args []string, _ string) ([]string, cobra.ShellCompDirective) {
	if len(args) > 0 {
		return nil, cobra.ShellCompDirectiveNoFileComp
	}
	var names []string
	a.ask(func(ctx context.Context, c *api.Client) error {
		res, err := c.Images.List(ctx, connect.NewRequest(&vigiav1.ListImagesRequest{}))
		if err != nil {
			return err
		}
		for _, i := range res.Msg.GetImages() {
			names = append(names, i.GetName())
		}
		return nil
	})
	return names, cobra.ShellCompDirectiveNoFileComp
}

// copyEnds completes an argument of cp: a file, or NAME: of a machine.
func (a *app) copyEnds(_ *cobra.Command, args []string, _ string) ([]string, cobra.ShellCompDirective) {
	if len(args) > 1 {
		return nil, cobra.ShellCompDirectiveNoFileComp
	}
	names := a.listMachines()
	for i, n := range names {
		name, _, _ := strings.Cut(n, "\t")
		names[i] = name + ":"
	}
	return names, cobra.ShellCompDirectiveNoSpace
}

func (a *app) listMachines() []string {
	var names []string
	a.ask(func(ctx context.Context, c *api.Client) error {
		res, err := c.Machines.List(ctx, connect.NewRequest(&vigiav1.ListMachinesRequest{}))
		if err != nil {
			return err
		}
		for _, m := range res.Msg.GetMachines() {
			names = append(names, m.GetName()+"\t"+plain(m.GetState()))
		}
		return nil
	})
	return names
}

// ask runs one short call; a daemon that does not answer completes nothing.
func (a *app) ask(f func(context.Context, *api.Client) error) {
	state, err := api.StateDir(a.stateFlag)
	if err != nil {
		return
	}
	ctx, cancel := context.WithTimeout(context.Background(), completionTime)
	defer cancel()
	_ = f(ctx, api.Dial(state))
}
