package cli

import (
	"context"

	"connectrpc.com/connect"
	"github.com/spf13/cobra"

	"vigia/internal/api"
	"vigia/internal/api/vigiav1"
)

func (a *app) policyCmd() *cobra.Command {
	c := &cobra.Command{Use: "policy", Short: "The rules in force, and rules before they are", RunE: needsCommand, Args: cobra.ArbitraryArgs}
	c.AddCommand(a.policyLsCmd(), a.policyReloadCmd(), a.policyCheckCmd(), a.policyTestCmd())
	return c
}

func (a *app) policyLsCmd() *cobra.Command {
	return &cobra.Command{
		Use:   "ls",
		Short: "List the rules in force",
		Args:  cobra.NoArgs,
		RunE: a.remote(func(ctx context.Context, c *api.Client, _ []string) error {
			res, err := c.Policy.List(ctx, connect.NewRequest(&vigiav1.ListRulesRequest{}))
			if err != nil {
				return err
			}
			return a.printRules(res.Msg)
		}),
	}
}

func (a *app) policyReloadCmd() *cobra.Command {
	return &cobra.Command{
		Use:   "reload",
		Short: "Read the rules again; a wrong one leaves the old set in force",
		Args:  cobra.NoArgs,
		RunE: a.remote(func(ctx context.Context, c *api.Client, _ []string) error {
			res, err := c.Policy.Reload(ctx, connect.NewRequest(&vigiav1.ReloadRequest{}))
			if err != nil {
				return err
			}
			return a.printRules(res.Msg)
		}),
	}
}

func (a *app) printRules(res *vigiav1.ListRulesResponse) error {
	if a.json() {
		return printList(a, res.GetRules())
	}
	t := newTable("ID", "SEVERITY", "RESPOND", "SOURCE", "TITLE")
	for _, r := range res.GetRules() {
		t.add(r.GetId(), r.GetSeverity(), joined(r.GetRespond()), r.GetSource(), r.GetTitle())
	}
	return a.printTable(t)
}

func (a *app) policyCheckCmd() *cobra.Command {
	return &cobra.Command{
		Use:   "check FILE…",
		Short: "Check rules: file, line and reason of what is wrong",
		Args:  atLeastOne("FILE"),
		RunE: a.run(func(_ context.Context, args []string) error {
			if a.local.PolicyCheck == nil {
				return missing("policy check")
			}
			return a.local.PolicyCheck(args, a.localOutput())
		}),
	}
}

func (a *app) policyTestCmd() *cobra.Command {
	var events string
	c := &cobra.Command{
		Use:     "test FILE --events EVENTS",
		Short:   "Run rules on recorded events and print the alerts",
		Example: "  vigia events -o json -f > events.jsonl\n  vigia policy test rules/password-cracking.yaml --events events.jsonl",
		Args:    oneArg("FILE"),
		RunE: a.run(func(_ context.Context, args []string) error {
			if events == "" {
				return usagef("--events is missing: give a file of recorded events")
			}
			if a.local.PolicyTest == nil {
				return missing("policy test")
			}
			return a.local.PolicyTest(args[0], events, a.json(), a.localOutput())
		}),
	}
	c.Flags().StringVar(&events, "events", "", "`file` of recorded events")
	return c
}
