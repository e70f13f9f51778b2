package ledger

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/transparency-dev/merkle/rfc6962"
	"github.com/transparency-dev/tessera/api"
	"github.com/transparency-dev/tessera/api/layout"
	"golang.org/x/mod/sumdb/note"
)

// recover brings the directory to what its newest head says, and starts the tree. A crash leaves one of:
//
//	nothing yet, or the empty tree without a head of ours  → the first head is signed
//	files or a tree state beyond the newest head           → taken out, kept for Unsealed
//	a torn last head in the list                           → cut off
//	a head in the list that is not yet the checkpoint      → becomes the checkpoint
func (l *Log) recover(ctx context.Context) error {
	verifier, err := note.NewVerifier(l.vkey)
	if err != nil {
		return fmt.Errorf("%w: %v", ErrKey, err)
	}
	fresh, err := isFresh(l.dir)
	if err != nil {
		return err
	}
	var head Head
	if !fresh {
		if head, err = l.newestHead(verifier); err != nil {
			return err
		}
		if err := l.matchState(ctx, head); err != nil {
			return err
		}
	}
	if l.heads == nil {
		if l.heads, err = openHeads(l.dir); err != nil {
			return err
		}
	}
	if l.tree, err = openTree(l.dir, l.signer); err != nil {
		return fmt.Errorf("open the ledger's tree: %w", err)
	}
	if fresh {
		if head, err = signHead(l.signer, 0, Hash(rfc6962.DefaultHasher.EmptyRoot()), l.now()); err != nil {
			return err
		}
		return l.publish(head)
	}
	l.head = head
	return nil
}

// isFresh reports whether no head was ever published here.
func isFresh(dir string) (bool, error) {
	st, err := os.Stat(filepath.Join(dir, headsName))
	if err == nil && st.Size() > 0 {
		return false, nil
	}
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return false, err
	}
	state, err := readState(dir)
	switch {
	case errors.Is(err, ErrMissing):
		if _, e := os.Stat(filepath.Join(dir, "tile")); e == nil {
			return false, fmt.Errorf("%w: %s and %s", ErrMissing, headsName, treeStateFile)
		}
		return true, nil
	case err != nil:
		return false, err
	case state.Size > 0:
		return false, fmt.Errorf("%w: %s", ErrMissing, headsName)
	}
	return true, nil
}

// newestHead reads the list of heads, cuts off a torn one, and sees to it that the checkpoint is the last.
func (l *Log) newestHead(verifier note.Verifier) (Head, error) {
	b, err := readFull(l.dir, headsName, 2*headsLimit)
	if err != nil {
		return Head{}, err
	}
	heads, rest, err := parseHeads(b, verifier)
	if err != nil {
		return Head{}, err
	}
	if l.heads, err = openHeads(l.dir); err != nil {
		return Head{}, err
	}
	if len(heads) == 0 {
		return Head{}, fmt.Errorf("%w: %s has no head", ErrCorrupt, headsName)
	}
	if len(rest) > 0 {
		if err := l.heads.truncate(int64(len(b) - len(rest))); err != nil {
			return Head{}, err
		}
	}
	last := heads[len(heads)-1]
	cp, err := readFull(l.dir, checkpointFile, maxHead)
	switch {
	case err == nil && string(cp) == last.Note:
		return last, nil
	case err == nil && isPrevious(cp, heads):
	case errors.Is(err, ErrMissing) && len(heads) == 1:
	case err == nil && len(heads) == 1 && last.Size == 0: // the one Tessera begins with
	case err != nil:
		return Head{}, err
	default:
		return Head{}, fmt.Errorf("%w: %s is not the last of %s", ErrForked, checkpointFile, headsName)
	}
	return last, writeFile(filepath.Join(l.dir, checkpointFile), []byte(last.Note), 0o644)
}

func isPrevious(cp []byte, heads []Head) bool {
	return len(heads) > 1 && string(cp) == heads[len(heads)-2].Note
}

// matchState checks the tree's right edge against head and takes out what lies beyond it.
func (l *Log) matchState(ctx context.Context, head Head) error {
	t := &tree{dir: l.dir}
	t.reader.Root = l.dir
	root, err := t.rootAt(ctx, head.Size)
	if err != nil {
		return err
	}
	if root != head.Root {
		return fmt.Errorf("%w: the tiles do not give the root of the newest head", ErrCorrupt)
	}
	state, err := readState(l.dir)
	if err != nil {
		return err
	}
	switch {
	case state.Size < head.Size:
		return fmt.Errorf("%w: the tree has %d entries, its newest head %d", ErrRolledBack, state.Size, head.Size)
	case state.Size > head.Size+maxBatch:
		return fmt.Errorf("%w: %d of them, more than a crash leaves", ErrUnsealed, state.Size-head.Size)
	case state.Size > head.Size:
		l.unsealed = t.tail(ctx, head.Size, state.Size)
	}
	return l.takeBackFiles(head)
}

// tail reads entries [from, to) as far as they are there.
func (t *tree) tail(ctx context.Context, from, to uint64) (entries [][]byte) {
	for ri := range layout.Range(from, to-from, to) {
		b, err := t.reader.ReadEntryBundle(ctx, ri.Index, ri.Partial)
		var bundle api.EntryBundle
		if err != nil || bundle.UnmarshalText(b) != nil || len(bundle.Entries) < int(ri.First+ri.N) {
			return entries
		}
		entries = append(entries, bundle.Entries[ri.First:ri.First+ri.N]...)
	}
	return entries
}

// takeBack returns to head after an append that failed half way.
func (l *Log) takeBack(head Head) error {
	b, err := os.ReadFile(l.heads.path)
	if err != nil {
		return err
	}
	texts, rest := splitHeads(b)
	keep := int64(len(b) - len(rest))
	if n := len(texts); n > 0 && string(texts[n-1]) != head.Note {
		keep -= int64(len(texts[n-1]))
	}
	if keep != int64(len(b)) {
		if err := l.heads.truncate(keep); err != nil {
			return err
		}
	}
	return l.takeBackFiles(head)
}

// takeBackFiles sets the tree's state to head and removes every file under tile/ that a tree of its size has not.
func (l *Log) takeBackFiles(head Head) error {
	want := stateBytes(head.Size, head.Root)
	if have, err := os.ReadFile(filepath.Join(l.dir, treeStateFile)); err != nil || string(have) != string(want) {
		if err := writeFile(filepath.Join(l.dir, treeStateFile), want, 0o644); err != nil {
			return err
		}
	}
	belongs := map[string]bool{}
	treeFiles(head.Size, func(path string, _ int, _ uint64, _ uint8) bool { belongs[path] = true; return true })
	for _, sub := range []string{"tile", stateDir, "."} {
		if err := l.removeStrays(sub, belongs); err != nil {
			return err
		}
	}
	return nil
}

// removeStrays removes what a crash leaves: temporary files, and tiles beyond the head.
func (l *Log) removeStrays(sub string, belongs map[string]bool) error {
	root := filepath.Join(l.dir, sub)
	return filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			if errors.Is(err, fs.ErrNotExist) {
				return nil
			}
			return err
		}
		if d.IsDir() {
			if sub == "." && path != root {
				return fs.SkipDir
			}
			return nil
		}
		rel, err := filepath.Rel(l.dir, path)
		if err != nil {
			return err
		}
		if sub == "tile" && !belongs[rel] || sub != "tile" && isTemporary(d.Name()) {
			return os.Remove(path)
		}
		return nil
	})
}
