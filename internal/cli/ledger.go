package cli

import (
	"context"
	"io"
	"time"

	"connectrpc.com/connect"
	"github.com/spf13/cobra"

	"vigia/internal/api"
	"vigia/internal/api/vigiav1"
)

func (a *app) ledgerCmd() *cobra.Command {
	c := &cobra.Command{Use: "ledger", Short: "The tamper-evident record of all events", RunE: needsCommand, Args: cobra.ArbitraryArgs}
	c.AddCommand(a.ledgerHeadCmd(), a.ledgerVerifyCmd(), a.ledgerProveCmd(), a.ledgerExportCmd())
	return c
}

func (a *app) ledgerHeadCmd() *cobra.Command {
	var note bool
	c := &cobra.Command{
		Use:   "head",
		Short: "The signed size and root of the ledger",
		Args:  cobra.NoArgs,
		RunE: a.remote(func(ctx context.Context, c *api.Client, _ []string) error {
			res, err := c.Ledger.Head(ctx, connect.NewRequest(&vigiav1.HeadRequest{}))
			if err != nil {
				return err
			}
			switch {
			case a.json():
				return a.printJSON(res.Msg)
			case note:
				return a.printf("%s", res.Msg.GetNote())
			}
			var s sheet
			s.add("size", number(res.Msg.GetSize()))
			s.add("root", res.Msg.GetRoot())
			s.add("time", res.Msg.GetTime().AsTime().UTC().Format(time.RFC3339))
			return s.write(a.std.Out)
		}),
	}
	c.Flags().BoolVar(&note, "note", false, "print the signed checkpoint itself, to keep elsewhere")
	return c
}

func (a *app) ledgerVerifyCmd() *cobra.Command {
	var o LedgerOptions
	c := &cobra.Command{
		Use:   "verify",
		Short: "Check the whole ledger, without a daemon; ends with 3 if it was tampered with",
		Args:  cobra.NoArgs,
		RunE: a.run(func(ctx context.Context, _ []string) (err error) {
			if o.State, err = api.StateDir(a.stateFlag); err != nil {
				return err
			}
			if a.local.LedgerVerify == nil {
				return missing("ledger verify")
			}
			return a.local.LedgerVerify(ctx, o, a.json(), a.localOutput())
		}),
	}
	c.Flags().StringVar(&o.Dir, "dir", "", "the ledger's `directory`, or an exported copy (default: the state directory's)")
	c.Flags().StringVar(&o.Key, "key", "", "`file` of the verifier key (default: the one beside the ledger, which proves less)")
	c.Flags().StringVar(&o.Head, "head", "", "`file` of a head kept elsewhere (ledger head --note): the ledger must contain it")
	c.Flags().StringVar(&o.Proof, "proof", "", "`file` of a proof or an export: verify that, and no ledger; give the key by --key")
	return c
}

func (a *app) ledgerProveCmd() *cobra.Command {
	var o LedgerOptions
	c := &cobra.Command{
		Use:   "prove EVENT",
		Short: "Write a proof that an event, by its id or index, is in the ledger, for who has the key and nothing else of it",
		Long: "Write a proof that an event is in the ledger: the signed head, the event and the way from it to the head's root, two\n" +
			"lines of JSON. `vigia ledger verify --proof FILE --key KEY` checks it anywhere.",
		Args: cobra.ExactArgs(1),
		RunE: a.run(func(ctx context.Context, args []string) (err error) {
			if o.State, err = api.StateDir(a.stateFlag); err != nil {
				return err
			}
			if a.local.LedgerProve == nil {
				return missing("ledger prove")
			}
			return a.local.LedgerProve(ctx, o, args[0], a.localOutput())
		}),
	}
	c.Flags().StringVar(&o.Dir, "dir", "", "the ledger's `directory` (default: the state directory's)")
	return c
}

func (a *app) ledgerExportCmd() *cobra.Command {
	var o LedgerOptions
	c := &cobra.Command{
		Use:   "export [FILE]",
		Short: "Write the ledger as one file that proves itself",
		Long: "Write the ledger as one file that proves itself: the signed head and every entry, a line of JSON each. Without a\n" +
			"FILE it goes to the standard output.",
		Args: atMostOne,
		RunE: a.run(func(ctx context.Context, args []string) (err error) {
			if o.State, err = api.StateDir(a.stateFlag); err != nil {
				return err
			}
			if a.local.LedgerExport == nil {
				return missing("ledger export")
			}
			if len(args) == 0 || args[0] == "-" {
				return a.local.LedgerExport(ctx, o, a.localOutput())
			}
			return writeWhole(args[0], func(w io.Writer) error { return a.local.LedgerExport(ctx, o, w) })
		}),
	}
	c.Flags().StringVar(&o.Dir, "dir", "", "the ledger's `directory` (default: the state directory's)")
	return c
}
