package cli

import (
	"context"

	"github.com/spf13/cobra"

	"vigia/internal/api"
)

func (a *app) volumeCmd() *cobra.Command {
	c := &cobra.Command{Use: "volume", Short: "Check disks", RunE: needsCommand, Args: cobra.ArbitraryArgs}
	c.AddCommand(&cobra.Command{
		Use:   "check NAME|FILE",
		Short: "Check a machine's disk, or a volume's file, offline",
		Long:  "Check a machine's disk, or a volume's file: its structure and its sums. Ends with 3 where something is wrong.",
		Args:  oneArg("NAME or FILE"),
		RunE: a.run(func(ctx context.Context, args []string) error {
			state, err := api.StateDir(a.stateFlag)
			if err != nil {
				return err
			}
			if a.local.VolumeCheck == nil {
				return missing("volume check")
			}
			return a.local.VolumeCheck(ctx, state, args[0], a.json(), a.localOutput())
		}),
	})
	return c
}
