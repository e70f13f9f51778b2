package cli

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path"
	"path/filepath"
	"regexp"
	"strings"

	"connectrpc.com/connect"
	"github.com/spf13/cobra"

	"vigia/internal/api"
	"vigia/internal/api/vigiav1"
)

// copyChunk is how many bytes of a file go in one message.
const copyChunk = 256 << 10

func (a *app) cpCmd() *cobra.Command {
	return &cobra.Command{
		Use:   "cp FILE NAME:PATH | cp NAME:PATH FILE",
		Short: "Copy a file into a machine, or out of it, through its agent",
		Long: "Copy a file into a machine, or out of it, through its agent (run … --additions exec). - is the standard input or\n" +
			"output. What comes out is the guest's claim: it may not be what is on its disk.",
		Example: `  vigia cp site.conf web:/etc/nginx/
  vigia cp web:/var/log/syslog - | grep ssh`,
		Args: twoArgs("the source", "the destination"),
		RunE: a.remote(func(ctx context.Context, c *api.Client, args []string) error {
			from, to := parseEnd(args[0]), parseEnd(args[1])
			switch {
			case from.remote() == to.remote():
				return usagef("one of %q and %q must be NAME:PATH, the other a file", args[0], args[1])
			case from.remote() && !path.IsAbs(from.path), to.remote() && !path.IsAbs(to.path):
				return usagef("the path in the machine must begin with /")
			case to.remote():
				return a.copyIn(ctx, c, from.path, to)
			}
			return a.copyOut(ctx, c, from, to.path)
		}),
		ValidArgsFunction: a.copyEnds,
	}
}

// end is one side of a copy.
type end struct{ name, path string }

func (e end) remote() bool { return e.name != "" }

var machineName = regexp.MustCompile(`^[a-z0-9-]{1,63}$`)

// parseEnd takes NAME:PATH for a machine's where NAME could be one; ./a:b is a file.
func parseEnd(s string) end {
	if name, p, ok := strings.Cut(s, ":"); ok && machineName.MatchString(name) {
		return end{name, p}
	}
	return end{path: s}
}

func (a *app) copyIn(ctx context.Context, c *api.Client, file string, to end) error {
	in, mode := a.input(ctx), os.FileMode(0o644)
	if strings.HasSuffix(to.path, "/") {
		if file == "-" {
			return usagef("%s: name the file that the standard input becomes", to.path)
		}
		to.path += filepath.Base(file)
	}
	if file != "-" {
		f, info, err := openFile(file)
		if err != nil {
			return err
		}
		defer f.Close()
		in, mode = f, info.Mode().Perm()
	}
	n, err := sendFile(ctx, c, in, &vigiav1.CopyInRequest{Name: to.name, Path: to.path, Mode: uint32(mode)})
	if err != nil {
		return err
	}
	return a.copied(n, file, to.name+":"+to.path)
}

func openFile(file string) (*os.File, os.FileInfo, error) {
	f, err := os.Open(file)
	if err != nil {
		return nil, nil, err
	}
	info, err := f.Stat()
	if err == nil && info.IsDir() {
		err = fmt.Errorf("%s is a directory, and cp copies files: use tar c %s | vigia exec NAME -- tar x", file, file)
	}
	if err != nil {
		f.Close()
		return nil, nil, err
	}
	return f, info, nil
}

// sendFile streams in, the first message naming the file.
func sendFile(ctx context.Context, c *api.Client, in io.Reader, msg *vigiav1.CopyInRequest) (uint64, error) {
	// An input that fails must not look like one that ends: cancelling keeps the daemon from taking half for the whole.
	ctx, giveUp := context.WithCancel(ctx)
	defer giveUp()
	stream := c.Machines.CopyIn(ctx)
	buf := make([]byte, copyChunk)
	var sent uint64
	for first := true; ; first = false {
		n, err := io.ReadFull(in, buf)
		over := errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF)
		if err != nil && !over {
			return sent, err
		}
		if n > 0 || first {
			msg.Data = buf[:n]
			if err := stream.Send(msg); err != nil {
				break // CloseAndReceive tells why
			}
			sent += uint64(n)
			msg = &vigiav1.CopyInRequest{}
		}
		if over {
			break
		}
	}
	res, err := stream.CloseAndReceive()
	if err != nil {
		return sent, err
	}
	if got := res.Msg.GetBytes(); got != sent {
		return sent, fmt.Errorf("the machine took %d of %d bytes", got, sent)
	}
	return sent, nil
}

func (a *app) copyOut(ctx context.Context, c *api.Client, from end, file string) error {
	stream, err := c.Machines.CopyOut(ctx, connect.NewRequest(&vigiav1.CopyOutRequest{Name: from.name, Path: from.path}))
	if err != nil {
		return err
	}
	defer stream.Close()
	if file == "-" {
		_, err := receiveFile(stream, a.guestOutput(a.std.Out, true, false))
		return err
	}
	if info, err := os.Stat(file); err == nil && info.IsDir() || strings.HasSuffix(file, "/") {
		file = filepath.Join(file, path.Base(from.path))
	}
	n, err := receiveInto(stream, file)
	if err != nil {
		return err
	}
	return a.copied(n, from.name+":"+from.path, file)
}

// receiveInto writes a file whole or not at all. What is no regular file (/dev/null, a pipe) is written to as it is.
func receiveInto(stream *chunkStream, file string) (n uint64, err error) {
	if info, err := os.Stat(file); err == nil && !info.Mode().IsRegular() {
		f, err := os.OpenFile(file, os.O_WRONLY, 0)
		if err != nil {
			return 0, err
		}
		n, err := receiveFile(stream, f)
		return n, errors.Join(err, f.Close())
	}
	err = writeWhole(file, func(w io.Writer) error {
		n, err = receiveFile(stream, w)
		return err
	})
	return n, err
}

type chunkStream = connect.ServerStreamForClient[vigiav1.Chunk]

func receiveFile(stream *chunkStream, w io.Writer) (n uint64, err error) {
	for stream.Receive() {
		data := stream.Msg().GetData()
		n += uint64(len(data))
		if _, err := w.Write(data); err != nil {
			return n, err
		}
	}
	return n, stream.Err()
}

func (a *app) copied(n uint64, from, to string) error {
	if a.json() {
		return a.printValue(struct {
			From  string `json:"from"`
			To    string `json:"to"`
			Bytes uint64 `json:"bytes"`
		}{from, to, n})
	}
	return nil
}
