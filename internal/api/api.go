// Package api is how a person's programs speak to the daemon: Connect RPC over a unix socket in the state directory,
// which only its owner may open.
//
// The messages are defined in proto/vigia/v1/vigia.proto; vigiav1 and vigiav1connect are made from it. This package
// adds what every client needs: where the state is, how to dial, what an error means, and the one JSON form that
// `-o json` prints (json.go).
package api

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"syscall"
	"time"

	"connectrpc.com/connect"

	"vigia/internal/api/vigiav1/vigiav1connect"
)

// SocketName is the API socket's file name in the state directory.
const SocketName = "api.sock"

// MaxMessage bounds one request or response, in bytes; MaxView the response of a view, whose rows a guest may make many.
const (
	MaxMessage = 4 << 20
	MaxView    = 128 << 20
)

// ErrNoDaemon is returned by every call when nothing listens on the state directory's socket.
var ErrNoDaemon = errors.New("no vigia daemon runs here")

// StateDir returns where the state is: the flag's value, else $VIGIA_STATE, else vigia in the XDG data home.
func StateDir(flag string) (string, error) {
	dir := flag
	if dir == "" {
		dir = os.Getenv("VIGIA_STATE")
	}
	if dir == "" {
		if data := os.Getenv("XDG_DATA_HOME"); filepath.IsAbs(data) {
			dir = filepath.Join(data, "vigia")
		} else if home, err := os.UserHomeDir(); err == nil {
			dir = filepath.Join(home, ".local", "share", "vigia")
		} else {
			return "", fmt.Errorf("no state directory: %w: give --state DIR or set VIGIA_STATE", err)
		}
	}
	return filepath.Abs(dir)
}

// Client holds a client of each service.
type Client struct {
	State       string
	Machines    vigiav1connect.MachinesClient
	Checkpoints vigiav1connect.CheckpointsClient
	Views       vigiav1connect.ViewsClient
	Images      vigiav1connect.ImagesClient
	Events      vigiav1connect.EventsClient
	Policy      vigiav1connect.PolicyClient
	Ledger      vigiav1connect.LedgerClient
	Daemon      vigiav1connect.DaemonClient
}

// Dial makes a client of the daemon on the state directory. It does not connect: the first call does, and returns
// ErrNoDaemon where there is none.
func Dial(state string) *Client {
	var protocols http.Protocols
	protocols.SetUnencryptedHTTP2(true)
	hc := &http.Client{Transport: &http.Transport{
		Protocols: &protocols,
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return dialSocket(ctx, state)
		},
	}}
	const base = "http://vigia"
	limit := connect.WithReadMaxBytes(MaxMessage)
	return &Client{
		State:       state,
		Machines:    vigiav1connect.NewMachinesClient(hc, base, limit),
		Checkpoints: vigiav1connect.NewCheckpointsClient(hc, base, limit),
		Views:       vigiav1connect.NewViewsClient(hc, base, connect.WithReadMaxBytes(MaxView)),
		Images:      vigiav1connect.NewImagesClient(hc, base, limit),
		Events:      vigiav1connect.NewEventsClient(hc, base, limit),
		Policy:      vigiav1connect.NewPolicyClient(hc, base, limit),
		Ledger:      vigiav1connect.NewLedgerClient(hc, base, limit),
		Daemon:      vigiav1connect.NewDaemonClient(hc, base, limit),
	}
}

// dialSocket connects by way of the directory's descriptor, so that the length of the state directory's path does not
// run into the 108 bytes of a unix socket's address.
func dialSocket(ctx context.Context, state string) (net.Conn, error) {
	dir, err := os.Open(state)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, noDaemon(state)
	}
	if err != nil {
		return nil, err
	}
	defer dir.Close()
	d := net.Dialer{Timeout: 5 * time.Second}
	conn, err := d.DialContext(ctx, "unix", fmt.Sprintf("/proc/self/fd/%d/%s", dir.Fd(), SocketName))
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, syscall.ECONNREFUSED) {
		return nil, noDaemon(state)
	}
	if errors.Is(err, fs.ErrPermission) {
		return nil, fmt.Errorf("state directory %s: its daemon belongs to another user: %w", state, fs.ErrPermission)
	}
	return conn, err
}

func noDaemon(state string) error {
	return fmt.Errorf("%w (state %s): start one with: vigia --state %s serve", ErrNoDaemon, state, state)
}

// Message returns what went wrong in the daemon's own words, without the RPC code before them.
func Message(err error) string {
	var ce *connect.Error
	if errors.As(err, &ce) {
		return ce.Message()
	}
	return err.Error()
}

// IsUsage reports whether the daemon refused what it was asked as malformed.
func IsUsage(err error) bool { return connect.CodeOf(err) == connect.CodeInvalidArgument }
