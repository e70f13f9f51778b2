// Command rogue is vigia whose guard or gate was taken over by its guest: the daemon in it is the real one, and so are its
// workers, but for those started while the file "rogue" beside it names them and what they do.
package main

import (
	"context"
	"fmt"
	"log/slog"
	"os"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"

	"vigia/internal/convert"
	"vigia/internal/daemon"
	"vigia/internal/gate"
	"vigia/internal/guard"
	"vigia/internal/jail"
)

func main() {
	if err := run(); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

func run() error {
	switch name := os.Args[1]; name {
	case "guard", "gate":
		if as := rogueAs(name); as != "" {
			return takenOver(name, as)
		}
		if name == "guard" {
			return guard.Main("rogue")
		}
		return gate.Main("rogue", jail.Gate)
	case convert.Command:
		return convert.Main(os.Args[2:])
	case jail.StageCommand:
		return jail.Stage()
	}
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM)
	defer stop()
	return daemon.Run(ctx, daemon.Options{State: os.Args[2], Version: "rogue", Accelerator: "tcg", DayBudget: 16 << 20,
		Log: slog.New(slog.NewTextHandler(os.Stderr, nil))})
}

// rogueAs reads "gate silent" and the like, before the process is confined.
func rogueAs(name string) string {
	self, err := os.Executable()
	if err != nil {
		return ""
	}
	text, _ := os.ReadFile(filepath.Join(filepath.Dir(self), "rogue"))
	who, as, _ := strings.Cut(strings.TrimSpace(string(text)), " ")
	if who != name {
		return ""
	}
	return as
}
