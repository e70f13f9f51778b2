// Package convert is the one-shot worker that reads what a stranger wrote and is at rest: the format of a disk that is to
// be imported, the file systems on it, a kernel. It is confined like a guard, has the files it is given and no others,
// and lives as long as one question.
//
//	vigia convert sniff|inspect|profile          3: the hostile file, 4: the result (profile)
//	vigia convert extract PLACE PATH             3: the disk, 4: the result
//	vigia convert same QUESTION                  from 3 on: the layers of two disks
//	vigia convert differ QUESTION                from 3 on: the layers of two disks
//	vigia convert processes SIZE                 3, 4: two guests' memory, 5: their kernel's profile
//	vigia convert flatten N                      from 3 on: N layers, and the result
//	vigia convert reopens QUESTION               from 3 on: the layers of two disks, and a file of vulnerabilities
//
// The answer to sniff, inspect, same, differ, processes and reopens is JSON on standard output, at most MaxAnswer bytes.
package convert

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"strconv"

	"vigia/internal/event"
	"vigia/internal/image"
	"vigia/internal/jail"
)

// firstFile is the descriptor of a question's first file.
const firstFile = 3

// Command is the sub-command; MaxAnswer bounds what a worker may say, in bytes.
const (
	Command   = "convert"
	MaxAnswer = 1 << 20
)

// Main is the worker: it confines itself before it touches the file.
func Main(args []string) error {
	if _, err := jail.Confine(jail.Convert); err != nil {
		return err
	}
	result, err := answer(args, given)
	if err != nil {
		return json.NewEncoder(os.Stdout).Encode(reply{Error: err.Error(), Kind: kindOf(err)})
	}
	text, err := json.Marshal(result)
	if err != nil {
		return err
	}
	return json.NewEncoder(os.Stdout).Encode(reply{Answer: text})
}

// reply crosses to the daemon: an answer, or an error by its text and which of the sentinels it is.
type reply struct {
	Answer json.RawMessage `json:"answer,omitempty"`
	Error  string          `json:"error,omitempty"`
	Kind   int             `json:"kind,omitempty"`
}

// sentinels keep their place: their index crosses between processes of one version.
var sentinels = []error{errors.New("unknown"), image.ErrFormat, image.ErrNoRoot, image.ErrNoKernel, image.ErrCorrupt}

func kindOf(err error) int {
	for i, s := range sentinels {
		if errors.Is(err, s) {
			return i
		}
	}
	return 0
}

// given makes a file of the n-th descriptor that came along; once for each, since an os.File closes its own when nobody has it.
func given(n int) *os.File { return os.NewFile(uintptr(firstFile+n), "file "+strconv.Itoa(n)) }

func answer(args []string, file func(n int) *os.File) (any, error) {
	if len(args) == 0 {
		return nil, errors.New("no question")
	}
	switch args[0] {
	case "sniff":
		return image.Sniff(file(0))
	case "inspect":
		return image.Inspect(file(0))
	case "profile":
		return struct{}{}, image.Profile(file(0), file(1), file(2))
	case "same":
		if len(args) != 2 {
			return nil, errors.New("same: want one question")
		}
		return sameDisks(args[1], file)
	case "differ", "processes":
		if len(args) != 2 {
			return nil, errors.New(args[0] + ": want one question")
		}
		if args[0] == "differ" {
			return diffDisks(args[1], file)
		}
		return diffProcesses(args[1], file)
	case "flatten":
		if len(args) != 2 {
			return nil, errors.New("flatten: want a number of layers")
		}
		return struct{}{}, flatten(args[1], file)
	case "reopens":
		if len(args) != 2 {
			return nil, errors.New("reopens: want one question")
		}
		return reopens(args[1], file)
	case "extract":
		if len(args) != 3 {
			return nil, errors.New("extract: want a place and a path")
		}
		var at image.Place
		if err := json.Unmarshal([]byte(args[1]), &at); err != nil {
			return nil, err
		}
		return struct{}{}, image.Extract(file(0), at, args[2], file(1))
	case "modules":
		if len(args) != 3 {
			return nil, errors.New("modules: want a place and a version")
		}
		var at image.Place
		if err := json.Unmarshal([]byte(args[1]), &at); err != nil {
			return nil, err
		}
		return struct{}{}, image.Modules(file(0), at, args[2], file(1))
	}
	return nil, fmt.Errorf("no such question: %q", args[0])
}

// Worker is image's Worker, in a confined process for each question.
type Worker struct {
	Tag    string     // how a crashed daemon's workers are found
	User   *jail.User // as root
	Groups *jail.Tree // nil: no limits of memory and threads
}

// Sniff tells the format of a disk file.
func (w Worker) Sniff(ctx context.Context, disk *os.File) (f image.Format, err error) {
	err = w.ask(ctx, &f, []string{"sniff"}, disk)
	return f, err
}

// Inspect finds the root file system of a raw disk, and the kernel in its /boot.
func (w Worker) Inspect(ctx context.Context, disk *os.File) (f image.Found, err error) {
	err = w.ask(ctx, &f, []string{"inspect"}, disk)
	return f, err
}

// Extract copies one file of a file system on the disk.
func (w Worker) Extract(ctx context.Context, disk *os.File, at image.Place, path string, dst *os.File) error {
	place, err := json.Marshal(at)
	if err != nil {
		return err
	}
	return w.ask(ctx, nil, []string{"extract", string(place), path}, disk, dst)
}

// Modules packs the modules of a kernel's version.
func (w Worker) Modules(ctx context.Context, disk *os.File, at image.Place, version string, dst *os.File) error {
	place, err := json.Marshal(at)
	if err != nil {
		return err
	}
	return w.ask(ctx, nil, []string{"modules", string(place), version}, disk, dst)
}

// Profile reads a kernel and writes its profile and its reference.
func (w Worker) Profile(ctx context.Context, kernel, profile, reference *os.File) error {
	return w.ask(ctx, nil, []string{"profile"}, kernel, profile, reference)
}

// ask runs one worker to its end. A worker that was taken over can answer wrongly, but only about its own disk.
func (w Worker) ask(ctx context.Context, out any, args []string, files ...*os.File) error {
	group, err := newGroup(w.Groups)
	if err != nil {
		return err
	}
	defer group.Remove()
	read, write, err := os.Pipe()
	if err != nil {
		return err
	}
	defer read.Close()
	proc, err := jail.Worker{Profile: jail.Convert, Tag: w.Tag, Args: append([]string{Command}, args...), Files: files, Stdout: write, User: w.User, Group: group}.Start(ctx)
	write.Close()
	if err != nil {
		return fmt.Errorf("reading %s: %w", args[0], err)
	}
	defer proc.Close()
	stop := context.AfterFunc(ctx, func() { proc.Kill() })
	defer stop()
	text, err := io.ReadAll(io.LimitReader(read, MaxAnswer+1))
	if err != nil || len(text) > MaxAnswer {
		proc.Kill()
	}
	exit := proc.Exit()
	switch {
	case ctx.Err() != nil:
		return context.Cause(ctx)
	case err != nil:
		return err
	case len(text) == 0:
		return fmt.Errorf("the process that reads it ended without an answer (%s): the file may be made to harm its reader", exit)
	}
	return parse(text, out)
}

func parse(text []byte, out any) error {
	if len(text) > MaxAnswer {
		return fmt.Errorf("the process that reads it says more than %d bytes", MaxAnswer)
	}
	var r reply
	if err := json.Unmarshal(text, &r); err != nil {
		return fmt.Errorf("the process that reads it makes no sense: %w", err)
	}
	if r.Error != "" {
		said := event.Text([]byte(r.Error))
		if r.Kind <= 0 || r.Kind >= len(sentinels) {
			return errors.New(said)
		}
		return remoteError{said, sentinels[r.Kind]}
	}
	if out == nil {
		return nil
	}
	if err := json.Unmarshal(r.Answer, out); err != nil {
		return fmt.Errorf("the process that reads it makes no sense: %w", err)
	}
	return nil
}

// remoteError is an error that crossed: its own text, and still one of image's sentinels.
type remoteError struct {
	text string
	kind error
}

func (e remoteError) Error() string { return e.text }
func (e remoteError) Unwrap() error { return e.kind }
