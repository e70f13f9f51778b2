package daemon

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"vigia/internal/ledger"
)

// HeadFile is where the newest head of the ledger is kept beside it: a ledger directory that is put back whole to an
// older state is found out by that. It helps against who can write the ledger's directory only; who can write the whole
// state can write both, until others witness the heads.
const HeadFile = "ledger.head"

// keepHead writes the head down when it has changed; last is the size that is written already.
func (d *Daemon) keepHead(last *uint64) {
	h := d.ledger.Head()
	if h.Size == *last {
		return
	}
	path := d.files.path(HeadFile)
	if err := os.WriteFile(path+".new", []byte(h.Note), 0o600); err != nil {
		return // no room: the next second tries again
	}
	if os.Rename(path+".new", path) == nil {
		*last = h.Size
	}
}

// KnownHead reads the head that a daemon kept for a state; nil where none has run.
func KnownHead(state, vkey string) (*ledger.Head, error) {
	text, err := os.ReadFile(filepath.Join(state, HeadFile))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	h, err := ledger.ParseHead(text, vkey)
	if err != nil {
		return nil, fmt.Errorf("head kept in %s: %w", HeadFile, err)
	}
	return &h, nil
}
