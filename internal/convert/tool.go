package convert

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"sync"
	"sync/atomic"

	"golang.org/x/sys/unix"

	"vigia/internal/image"
	"vigia/internal/jail"
)

// Tools is image's Runner: it runs qemu-img on a foreign disk in QEMU's own jail. Its root holds the program, its
// libraries and the files it was given, the one to be written writable; there is no /proc, no network, no other
// process, and no path that a backing file could name. Where the host allows no namespaces, image.Limited is what is left.
type Tools struct {
	Tag    string     // how a crashed daemon's programs are found
	User   *jail.User // as root
	Groups *jail.Tree // nil: no limits of memory and threads
}

// What one process may use that reads a foreign file, and what it may write beyond the size a file has when it begins.
var limits = jail.Limits{Memory: 1 << 30, CPUs: 2, PIDs: 128}

const slack = 1 << 20

var count atomic.Int64 // names their control groups

// newGroup makes one process's control group, which limits nothing where there is no tree.
func newGroup(t *jail.Tree) (*jail.Group, error) {
	if t == nil {
		return &jail.Group{}, nil
	}
	return t.New(fmt.Sprintf("convert-%d", count.Add(1)), limits)
}

// Run runs the command to its end.
func (r Tools) Run(ctx context.Context, c image.Command) error {
	err := r.confined(ctx, c)
	if errors.Is(err, jail.ErrNotStarted) && ctx.Err() == nil {
		return image.Limited(ctx, c)
	}
	return err
}

func (r Tools) confined(ctx context.Context, c image.Command) error {
	binds, most, err := shown(c.Files)
	if err != nil {
		return err
	}
	group, err := newGroup(r.Groups)
	if err != nil {
		return err
	}
	defer group.Remove()
	var said sync.WaitGroup
	stdout, err := into(c.Stdout, &said)
	if err != nil {
		return err
	}
	defer stdout.Close()
	stderr, err := into(c.Stderr, &said)
	if err != nil {
		return err
	}
	defer stderr.Close()
	proc, err := jail.QEMU{Binary: c.Path, Args: c.ArgsAt(shownAt), Binds: binds, Stdout: stdout, Stderr: stderr,
		User: r.User, Group: group, Tag: r.Tag, MaxFile: most}.Start(ctx)
	if err != nil {
		return err
	}
	defer proc.Close()
	defer context.AfterFunc(ctx, func() { proc.Kill() })()
	exit := proc.Exit()
	stdout.Close()
	stderr.Close()
	said.Wait()
	switch {
	case ctx.Err() != nil:
		return context.Cause(ctx)
	case exit.Code != 0 || exit.Signal != 0:
		return &image.ExitError{Status: exit.String()}
	}
	return nil
}

// shownAt is where a file shows in the root.
func shownAt(fd int) string { return "/disk/" + strconv.Itoa(fd) }

// shown are the binds of the files, and the size that none may exceed.
func shown(files []*os.File) (binds []jail.Bind, most uint64, err error) {
	for i, f := range files {
		source, err := filepath.Abs(f.Name())
		if err != nil {
			return nil, 0, err
		}
		info, err := f.Stat()
		if err != nil {
			return nil, 0, err
		}
		flags, err := unix.FcntlInt(f.Fd(), unix.F_GETFL, 0)
		if err != nil {
			return nil, 0, fmt.Errorf("%s: %w", f.Name(), err)
		}
		write := flags&unix.O_ACCMODE != unix.O_RDONLY
		if write {
			most = max(most, uint64(info.Size())+slack)
		}
		binds = append(binds, jail.Bind{Source: source, Target: shownAt(3 + i), Write: write, Reason: "a disk to convert"})
	}
	return binds, max(most, slack), nil
}

// into gives the writing end of a pipe whose other end is copied to w; nil is /dev/null.
func into(w io.Writer, said *sync.WaitGroup) (*os.File, error) {
	if w == nil {
		return os.OpenFile(os.DevNull, os.O_WRONLY, 0)
	}
	read, write, err := os.Pipe()
	if err != nil {
		return nil, err
	}
	said.Go(func() {
		defer read.Close()
		io.Copy(w, read)
	})
	return write, nil
}
