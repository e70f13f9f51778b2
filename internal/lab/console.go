package lab

import (
	"context"
	"fmt"
	"strings"
	"time"

	"vigia/internal/api/vigiav1"
)

// Console runs a command in the root shell on a machine's serial line and returns what it printed. The line is nobody's
// network: it works in quarantine too.
func (l *Lab) Console(ctx context.Context, machine, command string) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, 5*time.Minute)
	defer cancel()
	stream := l.Client.Machines.Console(ctx)
	defer stream.CloseRequest()
	if err := stream.Send(&vigiav1.ConsoleInput{Name: machine}); err != nil {
		return "", err
	}
	said, failed := make(chan string), make(chan error, 1)
	go func() {
		for {
			out, err := stream.Receive()
			if err != nil {
				failed <- err
				return
			}
			select {
			case said <- string(out.Data):
			case <-ctx.Done():
				return
			}
		}
	}()
	// The marks are sums, so that the line's echo of the command does not have them. A login that is not through yet
	// drops what is typed: the question is asked until it is heard.
	const patience = 10 * time.Second
	text := ""
	for {
		line := fmt.Sprintf("echo beg$((40+2)); %s; echo end$((40+2))\n", command)
		if err := stream.Send(&vigiav1.ConsoleInput{Data: []byte(line)}); err != nil {
			return "", err
		}
		for again := time.After(patience); again != nil; {
			select {
			case part := <-said:
				text += part
			case err := <-failed:
				return "", fmt.Errorf("serial line of %s: %w: %q", machine, err, text)
			case <-again:
				again = nil
			}
			_, after, heard := strings.Cut(text, "beg42")
			if answer, _, ended := strings.Cut(after, "end42"); heard && ended {
				return strings.TrimSpace(answer), nil
			}
			if heard {
				again = time.After(patience)
			}
		}
	}
}
