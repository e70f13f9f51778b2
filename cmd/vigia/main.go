// Command vigia runs Linux virtual machines under guard.
//
// It is one binary with several lives. A person's command line and `vigia serve` go through package cli; the daemon
// starts the others, each confined before it does anything:
//
//	guard      stands between one guest and everything else
//	gate       is one guest's network
//	convert    reads one hostile file
//	keeper     takes a machine's memory at a checkpoint, and puts it back
//	plant      lets QEMU make the descriptor by which its memory is protected
//	jail-exec  builds QEMU's jail and becomes QEMU
package main

import (
	"context"
	"fmt"
	"os"
	"os/signal"
	"syscall"

	"vigia/internal/cli"
	"vigia/internal/convert"
	"vigia/internal/gate"
	"vigia/internal/guard"
	"vigia/internal/jail"
	"vigia/internal/keeper"
)

// version is set by the build.
var version = "dev"

// workers are the commands that the daemon starts.
var workers = map[string]func(args []string) error{
	"guard":             func([]string) error { return guard.Main(version) },
	jail.Gate.Name:      func([]string) error { return gate.Main(version, jail.Gate) },
	jail.GateAlone.Name: func([]string) error { return gate.Main(version, jail.GateAlone) },
	convert.Command:     convert.Main,
	keeper.Command:      keeper.Main,
	keeper.PlantCommand: keeper.Plant,
	jail.StageCommand:   func([]string) error { return jail.Stage() },
}

func main() {
	if len(os.Args) > 1 {
		if worker := workers[os.Args[1]]; worker != nil {
			if err := worker(os.Args[2:]); err != nil {
				fmt.Fprintf(os.Stderr, "vigia %s: %v\n", os.Args[1], err)
				os.Exit(1)
			}
			return
		}
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM, syscall.SIGHUP)
	status := cli.Main(ctx, os.Args[1:], cli.Streams{In: os.Stdin, Out: os.Stdout, Err: os.Stderr}, local())
	stop()
	os.Exit(status)
}
