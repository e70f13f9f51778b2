package cli

import (
	"context"
	"slices"
	"time"

	"github.com/spf13/cobra"

	"vigia/internal/api"
)

func (a *app) serveCmd() *cobra.Command {
	var o ServeOptions
	var day string
	c := &cobra.Command{
		Use:   "serve",
		Short: "Run the daemon, in the foreground",
		Long: "Run the daemon, in the foreground. Machines go on running when it ends; the next one takes them over.\n" +
			"contrib/vigia.service and contrib/vigia-user.service run it under systemd.",
		Args: cobra.NoArgs,
		RunE: a.run(func(ctx context.Context, _ []string) error {
			if !slices.Contains([]string{"auto", "kvm", "tcg"}, o.Accelerator) {
				return usagef("accelerator %q: use auto, kvm or tcg", o.Accelerator)
			}
			if o.Spares < 0 || o.Spares > 64 {
				return usagef("%d spares: use 0 to 64", o.Spares)
			}
			for _, every := range []time.Duration{o.CheckEvery, o.CheckFullEvery} {
				if every != 0 && every < 100*time.Millisecond {
					return usagef("a check every %v: use 100ms or more, or 0 for never", every)
				}
			}
			if day != "0" {
				bytes, err := parseSize(day)
				if err != nil {
					return usagef("day budget: %w", err)
				}
				o.DayBudget = int64(bytes)
			}
			state, err := api.StateDir(a.stateFlag)
			if err != nil {
				return err
			}
			if a.local.Serve == nil {
				return missing("serve")
			}
			o.State, o.Err = state, a.std.Err
			return a.local.Serve(ctx, o)
		}),
	}
	c.Flags().StringVar(&o.Accelerator, "accelerator", "auto", "auto, kvm or tcg")
	c.Flags().StringVar(&o.Rules, "rules", "", "`directory` of rules (default: rules in the state directory)")
	c.Flags().StringVar(&day, "day-budget", "256M", "`size` that the events of one machine may take of the ledger in a day; beyond it they are summed; 0: no bound")
	c.Flags().DurationVar(&o.CheckEvery, "check-every", time.Second, "how often to make the cheap checks of `vigia check` in each machine that works; one that rests: up to five times as rarely; 0: never")
	c.Flags().DurationVar(&o.CheckFullEvery, "check-full-every", time.Minute, "how often to make all of them; 0: never")
	c.Flags().IntVar(&o.Spares, "spares", 0, "how many clones to make ahead of the checkpoint that was cloned last, 60 MiB of memory each; they run within some tens of milliseconds")
	c.Flags().BoolVar(&o.Verbose, "verbose", false, "tell also where the time of a start or a rollback goes")
	return c
}

func (a *app) doctorCmd() *cobra.Command {
	return &cobra.Command{
		Use:   "doctor",
		Short: "Say what works on this host, what does not, and why",
		Args:  cobra.NoArgs,
		RunE: a.run(func(ctx context.Context, _ []string) error {
			state, err := api.StateDir(a.stateFlag)
			if err != nil {
				return err
			}
			if a.local.Doctor == nil {
				return missing("doctor")
			}
			return a.local.Doctor(ctx, state, a.json(), a.std.Out)
		}),
	}
}
