// React measures how long it takes from the last event a rule needed to the first frame dropped.
//
//	go run ./bench/react [-rounds 100]
//
// A guest sends frames all the time. A rule waits for a line on its serial console and quarantines; the bench writes the
// line, reads when the guard saw it (the event's time), when the block stood (the response's) and when the gate dropped
// the first frame, releases, and does it again. All clocks are the host's. It needs bin/vigia.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"strings"
	"time"

	"connectrpc.com/connect"
	"google.golang.org/protobuf/types/known/timestamppb"

	"vigia/bench/parts"
	"vigia/bench/table"
	"vigia/internal/api/vigiav1"
	"vigia/internal/lab"
)

const (
	name = "react"
	rule = `id: bench-react
title: A word on the console
severity: low
every: 10ms
on: console.line
when: event.line.endsWith("MARK42")
respond: [quarantine]
`
)

func main() {
	rounds := flag.Int("rounds", 100, "quarantines")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	defer stop()
	if err := run(ctx, *rounds); err != nil {
		fmt.Fprintln(os.Stderr, "bench/react:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, rounds int) error {
	state := ".cache/bench"
	if err := os.MkdirAll(filepath.Join(state, "rules"), 0o700); err != nil {
		return err
	}
	file := filepath.Join(state, "rules", "react.yaml")
	if err := os.WriteFile(file, []byte(rule), 0o600); err != nil {
		return err
	}
	defer os.Remove(file)
	l, err := lab.Start(ctx, state)
	if err != nil {
		return err
	}
	defer l.End()
	if _, err := parts.Image(ctx, l); err != nil {
		return err
	}
	l.Command(ctx, "rm", "--force", name)
	if err := l.Must(ctx, "run", "bench", name, "--memory", "256M"); err != nil {
		return err
	}
	defer l.Command(context.WithoutCancel(ctx), "rm", "--force", name)
	// Frames for ever, a few hundred a second: nobody answers on that port, which does not matter.
	if _, err := l.Console(ctx, name, "(while :; do echo x > /dev/udp/10.77.0.1/9; done) > /dev/null 2>&1 & sleep 1"); err != nil {
		return err
	}
	return measure(ctx, l, rounds)
}

func measure(ctx context.Context, l *lab.Lab, rounds int) error {
	events, err := l.Client.Events.List(ctx, connect.NewRequest(&vigiav1.ListEventsRequest{Machine: name, Follow: true,
		Kinds: []string{"console.line", "response.quarantined"}, Since: timestamppb.Now()}))
	if err != nil {
		return err
	}
	defer events.Close()
	console := l.Client.Machines.Console(ctx)
	defer console.CloseRequest()
	if err := console.Send(&vigiav1.ConsoleInput{Name: name}); err != nil {
		return err
	}
	go func() {
		for {
			if _, err := console.Receive(); err != nil {
				return
			}
		}
	}()
	var stood, dropped []float64
	for i := range rounds {
		if err := console.Send(&vigiav1.ConsoleInput{Data: []byte("echo MARK$((40+2))\n")}); err != nil {
			return err
		}
		block, drop, err := one(ctx, l, events)
		if err != nil {
			return fmt.Errorf("round %d: %w", i, err)
		}
		stood, dropped = append(stood, block), append(dropped, drop)
		if err := l.Must(ctx, "release", name); err != nil {
			return err
		}
		time.Sleep(150 * time.Millisecond) // the guard reports 20 lines a second, no more
	}
	table.Print(os.Stdout, []table.Verdict{
		{Claim: "last needed event → first frame dropped, p99", Measured: table.Quantile(dropped, 0.99), Target: 50, AtMost: true, Unit: "ms"},
	})
	fmt.Printf("\nrounds %d; ms: p50, p90, p99, worst\nnetwork cut      %s\nfirst frame lost %s\n", rounds, row(stood), row(dropped))
	return nil
}

func row(ms []float64) string {
	return fmt.Sprintf("%6.2f %6.2f %6.2f %6.2f", table.Quantile(ms, 0.5), table.Quantile(ms, 0.9), table.Quantile(ms, 0.99), table.Quantile(ms, 1))
}

// one waits for a round's two events and returns, in milliseconds after the first, when the network was cut and when the
// first frame was dropped.
func one(ctx context.Context, l *lab.Lab, events *connect.ServerStreamForClient[vigiav1.Event]) (block, drop float64, err error) {
	var seen time.Time
	for events.Receive() {
		e := events.Msg()
		if e.Kind == "console.line" {
			if line := e.Fields.Fields["line"].GetStringValue(); strings.HasSuffix(line, "MARK42") {
				seen = e.Time.AsTime()
			}
			continue
		}
		block = 1000 * e.Fields.Fields["seconds"].GetNumberValue()
		for range 500 {
			m, err := l.Show(ctx, name)
			if err != nil {
				return 0, 0, err
			}
			if m.Network != nil && m.Network.FirstDrop != nil {
				return block, float64(m.Network.FirstDrop.AsTime().Sub(seen).Microseconds()) / 1000, nil
			}
			time.Sleep(2 * time.Millisecond)
		}
		return 0, 0, errors.New("the guest sends nothing")
	}
	return 0, 0, errors.Join(errors.New("the events ended"), events.Err())
}
