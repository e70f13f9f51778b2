// Command vigia-worker holds the confined processes of vigia and nothing else; `vigia serve` starts it. See package worker.
package main

import (
	"fmt"
	"os"

	"vigia/internal/worker"
)

// version is set by the build.
var version = "dev"

func main() {
	status, ran := worker.Main(version, os.Args[1:])
	if !ran {
		fmt.Fprintln(os.Stderr, "vigia-worker: it is started by vigia serve, see: vigia --help")
		status = 2
	}
	os.Exit(status)
}
