package cli

import (
	"context"
	"slices"
	"strings"

	"connectrpc.com/connect"
	"github.com/spf13/cobra"

	"vigia/internal/api"
	"vigia/internal/api/vigiav1"
)

func (a *app) runCmd() *cobra.Command {
	var memory string
	var labels []string
	req := &vigiav1.RunRequest{}
	c := &cobra.Command{
		Use:   "run IMAGE NAME",
		Short: "Create a machine and start it",
		Example: `  vigia run debian web --memory 512M --publish 8080:80
  vigia run debian lab --net off --ttl 8h --owner ana --purpose "reading a sample"
  vigia run tiny t1 --rule "deny out tcp any:25" --additions exec`,
		Args:              twoArgs("IMAGE", "NAME"),
		ValidArgsFunction: a.imageNames,
		RunE: a.remote(func(ctx context.Context, c *api.Client, args []string) (err error) {
			req.Image, req.Name = args[0], args[1]
			if memory != "" {
				if req.MemoryBytes, err = parseSize(memory); err != nil {
					return usagef("memory: %w", err)
				}
			}
			if req.Cpus < 0 {
				return usagef("cpus %d: use 1 or more", req.Cpus)
			}
			if !slices.Contains([]string{"", "nat", "off"}, req.Net) {
				return usagef("net %q: use nat or off", req.Net)
			}
			if !slices.Contains([]string{"", "auto", "off", "on"}, req.Probe) {
				return usagef("probe %q: use auto, off or on", req.Probe)
			}
			if req.Labels, err = parseLabels(labels); err != nil {
				return err
			}
			if req.Keep != 0 && req.CheckpointEvery == "" {
				return usagef("--keep says how many checkpoints are kept: give --checkpoint-every too")
			}
			res, err := c.Machines.Run(ctx, connect.NewRequest(req))
			if err != nil {
				return err
			}
			if res.Msg.GetAccelerator() == "tcg" && !a.json() {
				a.note("%s runs by software emulation (tcg), which is slow and no isolation boundary; see: vigia doctor", req.Name)
			}
			return a.printMachine(res.Msg)
		}),
	}
	f := c.Flags()
	f.StringVar(&memory, "memory", "", "memory `size`, as in 512M or 2G")
	f.Int32Var(&req.Cpus, "cpus", 0, "virtual CPUs (default 1)")
	f.StringArrayVar(&req.Publish, "publish", nil, "`[ADDRESS:]HOST:GUEST[/udp]`: forward a port of the host; repeatable")
	f.StringVar(&req.Net, "net", "", "nat or off (default nat)")
	f.StringArrayVar(&req.Rules, "rule", nil, "network `rule`, as in 'deny out tcp any:25'; repeatable, the first that matches decides")
	f.StringVar(&req.Owner, "owner", "", "who answers for the machine")
	f.StringVar(&req.Purpose, "purpose", "", "what it is for")
	f.StringVar(&req.Ttl, "ttl", "", "how long it may live, as in 8h or 7d")
	f.StringArrayVar(&labels, "label", nil, "`KEY=VALUE`; repeatable")
	f.StringSliceVar(&req.Additions, "additions", nil, "what is connected to the guest: exec (commands and copies)")
	f.StringVar(&req.Probe, "probe", "", "what processes do: auto (a plugin in QEMU where possible), off (sampled) or on (default auto)")
	f.StringVar(&req.CheckpointEvery, "checkpoint-every", "", "save it by itself every so `often`, as in 5m")
	f.Int32Var(&req.Keep, "keep", 0, "how many of those checkpoints are kept: `N` (default 12)")
	f.BoolVar(&req.Record, "record", false, "record each run, so that it can be replayed (software emulation only, one CPU; some four times slower)")
	f.StringVar(&req.KeepInputs, "keep-inputs", "", "from the first checkpoint on keep what enters, to replay it: `SIZE[,AGE]` as in 256M,2d, or off (default 64M,7d)")
	_ = c.RegisterFlagCompletionFunc("probe", cobra.FixedCompletions([]string{"auto", "off", "on"}, cobra.ShellCompDirectiveNoFileComp))
	_ = c.RegisterFlagCompletionFunc("net", cobra.FixedCompletions([]string{"nat", "off"}, cobra.ShellCompDirectiveNoFileComp))
	_ = c.RegisterFlagCompletionFunc("additions", cobra.FixedCompletions([]string{"exec"}, cobra.ShellCompDirectiveNoFileComp))
	return c
}

func parseLabels(list []string) (map[string]string, error) {
	labels := map[string]string{}
	for _, l := range list {
		key, value, ok := strings.Cut(l, "=")
		if !ok || key == "" {
			return nil, usagef("label %q: use KEY=VALUE", l)
		}
		if _, twice := labels[key]; twice {
			return nil, usagef("label %q: %s is given twice", l, key)
		}
		labels[key] = value
	}
	return labels, nil
}
