package cli

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"strconv"
	"strings"
	"time"
	"unicode"

	"connectrpc.com/connect"
	"github.com/spf13/cobra"
	"google.golang.org/protobuf/types/known/timestamppb"

	"vigia/internal/api"
	"vigia/internal/api/vigiav1"
)

func (a *app) eventsCmd() *cobra.Command {
	req := &vigiav1.ListEventsRequest{}
	var since string
	c := &cobra.Command{
		Use:   "events [NAME]",
		Short: "What happened, from the ledger, and as it happens",
		Example: `  vigia events web --kind disk. --kind net.denied --since 10m
  vigia events -f -o json`,
		Args:              atMostOne,
		ValidArgsFunction: a.machineNames,
		RunE: a.remote(func(ctx context.Context, c *api.Client, args []string) (err error) {
			if len(args) > 0 {
				req.Machine = args[0]
			}
			if req.Since, err = parseSince(since, time.Now()); err != nil {
				return err
			}
			if err = a.events(ctx, c, req); req.Follow && ended(ctx, err) {
				return nil // Ctrl-C is how following ends
			}
			return err
		}),
	}
	f := c.Flags()
	f.BoolVarP(&req.Follow, "follow", "f", false, "go on with events as they happen")
	f.StringSliceVar(&req.Kinds, "kind", nil, "`kind`, or the beginning of kinds with a dot at its end, as in net.; repeatable")
	f.StringVar(&since, "since", "", "how long ago (10m, 2d), or a `time` (RFC 3339)")
	return c
}

func (a *app) events(ctx context.Context, c *api.Client, req *vigiav1.ListEventsRequest) error {
	stream, err := c.Events.List(ctx, connect.NewRequest(req))
	if err != nil {
		return err
	}
	defer stream.Close()
	return a.printEvents(stream, req.Follow)
}

// parseSince reads how long ago, or a point in time.
func parseSince(s string, now time.Time) (*timestamppb.Timestamp, error) {
	if s == "" {
		return nil, nil
	}
	if days, ok := strings.CutSuffix(s, "d"); ok {
		if n, err := strconv.ParseUint(days, 10, 16); err == nil {
			return timestamppb.New(now.Add(-time.Duration(n) * 24 * time.Hour)), nil
		}
	}
	if d, err := time.ParseDuration(s); err == nil && d >= 0 {
		return timestamppb.New(now.Add(-d)), nil
	}
	for _, layout := range []string{time.RFC3339Nano, time.DateOnly} {
		if t, err := time.Parse(layout, s); err == nil {
			return timestamppb.New(t), nil
		}
	}
	return nil, usagef("since %q: use how long ago, as in 10m or 2d, or a time, as in 2006-01-02T15:04:05Z", s)
}

type eventStream = connect.ServerStreamForClient[vigiav1.Event]

// printEvents prints events as they come: as text or, with JSON, as one array, or a line each when following.
func (a *app) printEvents(stream *eventStream, follow bool) error {
	out := bufio.NewWriter(a.std.Out)
	array := a.json() && !follow
	if array {
		out.WriteByte('[')
	}
	for n := 0; stream.Receive(); n++ {
		if array && n > 0 {
			out.WriteByte(',')
		}
		if err := a.writeEvent(out, stream.Msg()); err != nil {
			return err
		}
		if array {
			continue
		}
		out.WriteByte('\n')
		if follow {
			if err := out.Flush(); err != nil {
				return err
			}
		}
	}
	if array && stream.Err() == nil {
		out.WriteString("]\n")
	}
	return errors.Join(stream.Err(), out.Flush())
}

func (a *app) writeEvent(out *bufio.Writer, e *vigiav1.Event) error {
	if !a.json() {
		_, err := out.WriteString(eventLine(e))
		return err
	}
	text, err := encode(api.JSONValue(e))
	if err != nil {
		return err
	}
	_, err = out.Write(text)
	return err
}

// eventLine is an event as a line: columns wide enough for most, since a stream cannot be measured first.
func eventLine(e *vigiav1.Event) string {
	machine := e.GetMachine()
	if machine == "" {
		machine = "-"
	}
	var b strings.Builder
	fmt.Fprintf(&b, "%s  %-12s  %-20s", e.GetTime().AsTime().UTC().Format("2006-01-02T15:04:05.000Z"), plain(machine), plain(e.GetKind()))
	fields := e.GetFields().AsMap()
	for _, name := range sortedKeys(fields) {
		b.WriteString("  " + plain(name) + "=" + fieldText(fields[name]))
	}
	return strings.TrimRight(b.String(), " ")
}

// fieldText writes one field so that its end can be seen.
func fieldText(v any) string {
	switch v := v.(type) {
	case string:
		if v == "" || strings.ContainsFunc(v, needsQuote) {
			return `"` + strings.ReplaceAll(plain(v), `"`, `\"`) + `"`
		}
		return v
	case float64:
		return strconv.FormatFloat(v, 'f', -1, 64)
	}
	text, err := json.Marshal(v)
	if err != nil {
		return "?"
	}
	return plain(string(text))
}

func needsQuote(r rune) bool {
	return r == ' ' || r == '"' || r == '=' || !unicode.IsPrint(r) || r == unicode.ReplacementChar
}

func atMostOne(_ *cobra.Command, args []string) error {
	if len(args) > 1 {
		return usagef("%q is one argument too many", args[1])
	}
	return nil
}
