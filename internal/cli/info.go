package cli

import (
	"context"

	"connectrpc.com/connect"
	"github.com/spf13/cobra"

	"vigia/internal/api"
	"vigia/internal/api/vigiav1"
)

func (a *app) infoCmd() *cobra.Command {
	return &cobra.Command{
		Use:   "info",
		Short: "About the daemon that runs here",
		Args:  cobra.NoArgs,
		RunE: a.remote(func(ctx context.Context, c *api.Client, _ []string) error {
			res, err := c.Daemon.Info(ctx, connect.NewRequest(&vigiav1.InfoRequest{}))
			if err != nil {
				return err
			}
			if a.json() {
				return a.printJSON(res.Msg)
			}
			var s sheet
			s.add("version", res.Msg.GetVersion())
			s.add("pid", number(res.Msg.GetPid()))
			s.add("state", res.Msg.GetStateDir())
			s.add("accelerator", accelerator(res.Msg.GetAccelerator()))
			s.add("started", a.when(res.Msg.GetStarted()))
			return s.write(a.std.Out)
		}),
	}
}

func (a *app) versionCmd() *cobra.Command {
	return &cobra.Command{
		Use:   "version",
		Short: "The version of this program",
		Args:  cobra.NoArgs,
		RunE: a.run(func(context.Context, []string) error {
			if a.json() {
				return a.printValue(map[string]string{"version": a.local.Version})
			}
			return a.printf("vigia %s\n", a.local.Version)
		}),
	}
}
