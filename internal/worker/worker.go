// Package worker is the table of the confined lives of vigia: what the daemon starts, each confined before it does anything.
//
//	guard      stands between one guest and everything else
//	gate       is one guest's network
//	convert    reads one hostile file
//	keeper     takes a machine's memory at a checkpoint, and puts it back
//	plant      lets QEMU make the descriptor by which its memory is protected
//	jail-exec  builds QEMU's jail and becomes QEMU
//
// They are built twice: into vigia itself, which needs no other file, and into vigia-worker, which lies beside it and holds nothing
// else: neither etcd nor the command line, whose initialisation alone is three quarters of a worker's start, and whose code is of no use to
// whoever takes a worker over. The daemon starts them from the smaller one where it is the one that was built with it.
package worker

import (
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"

	"vigia/internal/convert"
	"vigia/internal/gate"
	"vigia/internal/guard"
	"vigia/internal/jail"
	"vigia/internal/keeper"
)

// Program is the name of the program that holds workers alone.
const Program = "vigia-worker"

// Main runs the worker that args name, and returns the exit status. ran is false where they name none.
func Main(version string, args []string) (status int, ran bool) {
	if len(args) == 0 {
		return 0, false
	}
	work := map[string]func([]string) error{
		"guard":             func([]string) error { return guard.Main(version) },
		jail.Gate.Name:      func([]string) error { return gate.Main(version, jail.Gate) },
		jail.GateAlone.Name: func([]string) error { return gate.Main(version, jail.GateAlone) },
		convert.Command:     convert.Main,
		keeper.Command:      keeper.Main,
		keeper.PlantCommand: keeper.Plant,
		jail.StageCommand:   func([]string) error { return jail.Stage() },
	}[args[0]]
	if work == nil {
		return 0, false
	}
	os.WriteFile("/proc/self/comm", []byte("vigia-"+args[0]), 0) // else it is a descriptor's number, by which it was started
	if err := work(args[1:]); err != nil {
		fmt.Fprintf(os.Stderr, "vigia %s: %v\n", args[0], err)
		return 1, true
	}
	return 0, true
}

// errNone: this program was built without the smaller one.
var errNone = errors.New("built without it")

// Open opens the program that lies beside this one, if it has the SHA-256 sum, in hexadecimal, that this one was built with. What becomes of the
// file afterwards does not matter to who starts workers from what was opened.
func Open(sum string) (*os.File, error) {
	if sum == "" {
		return nil, errNone
	}
	self, err := os.Executable()
	if err != nil {
		return nil, err
	}
	f, err := os.Open(filepath.Join(filepath.Dir(self), Program))
	if err != nil {
		return nil, err
	}
	h := sha256.New()
	if _, err = io.Copy(h, f); err == nil && hex.EncodeToString(h.Sum(nil)) != sum {
		err = fmt.Errorf("%s is not the one that was built with this program", f.Name())
	}
	if err != nil {
		f.Close()
		return nil, err
	}
	return f, nil
}
