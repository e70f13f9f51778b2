// Command vigia runs Linux virtual machines under guard.
//
// A person's command line and `vigia serve` go through package cli. The daemon starts confined processes, package worker, from
// vigia-worker where that lies beside it, else from this same program.
package main

import (
	"context"
	"os"
	"os/signal"
	"syscall"

	"vigia/internal/cli"
	"vigia/internal/worker"
)

// version is set by the build.
var version = "dev"

// workerSum is the SHA-256 of the vigia-worker that was built with this program; set by the build.
var workerSum string

func main() {
	if status, ran := worker.Main(version, os.Args[1:]); ran {
		os.Exit(status)
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM, syscall.SIGHUP)
	status := cli.Main(ctx, os.Args[1:], cli.Streams{In: os.Stdin, Out: os.Stdout, Err: os.Stderr}, local())
	stop()
	os.Exit(status)
}
