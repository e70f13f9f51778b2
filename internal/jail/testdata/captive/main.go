// Captive is what the tests put in the place of QEMU, the guard, the gate and the convert worker: once confined, it
// tries to get out by every way it knows and says what each try met. As "drive" it plays the daemon.
package main

import (
	"encoding/json"
	"fmt"
	"os"
	"time"

	"vigia/internal/jail"
)

func main() {
	if err := run(os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "captive:", err)
		os.Exit(1)
	}
}

func run(args []string) error {
	if len(args) == 0 {
		return fmt.Errorf("no command")
	}
	switch args[0] {
	case jail.StageCommand:
		return jail.Stage()
	case "drive":
		return drive(args[1:])
	case "leave":
		return leave(args[1:])
	case "emulate":
		return emulate(args[1:])
	case "rogue": // a worker that does not confine itself
		time.Sleep(time.Minute)
		return nil
	case "worker": // worker PROFILE ATTEMPT
		if _, err := jail.Confine(jail.Profiles[args[1]]); err != nil {
			return err
		}
		return attempt(args[2])
	case "try": // in QEMU's place: already confined
		return attempt(args[1])
	}
	return fmt.Errorf("unknown command %q", args[0])
}

// say prints one JSON value on standard output.
func say(v any) error { return json.NewEncoder(os.Stdout).Encode(v) }
