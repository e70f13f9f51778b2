package cli

import (
	"context"

	"connectrpc.com/connect"
	"github.com/spf13/cobra"

	"vigia/internal/api"
	"vigia/internal/api/vigiav1"
)

func (a *app) rulesCmd() *cobra.Command {
	var none bool
	c := &cobra.Command{
		Use:   "rules NAME [RULE…]",
		Short: "Show a machine's network rules, or replace them",
		Long: "Show a machine's network rules, or replace all of them, also while it runs. A rule is\n" +
			"  allow|deny in|out [tcp|udp|icmp] [any|ADDRESS[/BITS]|NAME][:PORT[-PORT]]\n" +
			"and the first that matches decides.",
		Example: "  vigia rules web 'allow out *.debian.org' 'deny out any'",
		Args:    atLeastOne("NAME"),
		RunE: a.remote(func(ctx context.Context, c *api.Client, args []string) error {
			name, rules := args[0], args[1:]
			if none && len(rules) > 0 {
				return usagef("--none leaves no rule: give it, or rules")
			}
			res, err := setOrShow(ctx, c, name, rules, none)
			if err != nil {
				return err
			}
			if a.json() {
				return a.printValue(append([]string{}, res.Msg.GetRules()...))
			}
			for _, r := range res.Msg.GetRules() {
				if err := a.printf("%s\n", plain(r)); err != nil {
					return err
				}
			}
			return nil
		}),
		ValidArgsFunction: a.machineNames,
	}
	c.Flags().BoolVar(&none, "none", false, "remove all rules")
	return c
}

func setOrShow(ctx context.Context, c *api.Client, name string, rules []string, none bool) (*connect.Response[vigiav1.Machine], error) {
	if len(rules) == 0 && !none {
		return c.Machines.Show(ctx, machine(name))
	}
	return c.Machines.SetRules(ctx, connect.NewRequest(&vigiav1.SetRulesRequest{Name: name, Rules: rules}))
}
