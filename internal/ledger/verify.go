package ledger

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"github.com/transparency-dev/merkle/compact"
	"github.com/transparency-dev/merkle/rfc6962"
	"github.com/transparency-dev/tessera/api"
	"github.com/transparency-dev/tessera/api/layout"
	"golang.org/x/mod/sumdb/note"
	"golang.org/x/sys/unix"
)

// VerifyOptions of Verify. The zero value checks the directory against itself and the key.
type VerifyOptions struct {
	// Since is a head kept elsewhere: the ledger must still contain it. Without one, a directory put back whole to an
	// older state can't be told from one that never grew.
	Since *Head
}

// Report is what Verify found in order.
type Report struct {
	Head
	Heads   int    `json:"heads"`   // heads of the past that the tree contains
	Files   int    `json:"files"`   // files read
	Bytes   int64  `json:"bytes"`   // their size together
	Entries uint64 `json:"entries"` // entries hashed: the head's size
}

// Verify reads the whole ledger in dir and checks every byte of it against the key: each entry against its hash, the
// hashes against the root, the root, the head and all past heads against the signature, and that there is no file
// more. It needs no daemon, and a daemon may go on writing meanwhile: it is held up only while the files that still
// change are read.
func Verify(ctx context.Context, dir, vkey string, opts VerifyOptions) (Report, error) {
	v := &verification{dir: dir}
	var err error
	if v.verifier, err = checkKey(vkey); err != nil {
		return Report{}, err
	}
	if err := v.snapshot(vkey); err != nil {
		return Report{}, err
	}
	if err := v.checkState(); err != nil {
		return Report{}, err
	}
	if err := v.checkSince(opts.Since); err != nil {
		return Report{}, err
	}
	if err := v.checkTree(ctx); err != nil {
		return Report{}, err
	}
	return Report{Head: v.head, Heads: len(v.heads), Files: v.files, Bytes: v.bytes, Entries: v.head.Size}, nil
}

type verification struct {
	dir      string
	verifier note.Verifier
	head     Head
	heads    []Head
	marks    []Head            // heads to be met on the way, smallest first
	state    []byte            // Tessera's state
	partial  map[string][]byte // the files at the right edge, as they were under the lock
	files    int
	bytes    int64
}

// snapshot reads, under the lock that the writer takes for each batch, all that a later batch may change.
func (v *verification) snapshot(vkey string) error {
	if lock, err := os.Open(filepath.Join(v.dir, batchLock)); err == nil {
		defer lock.Close()
		if err := flock(lock, unix.LOCK_SH); err != nil {
			return fmt.Errorf("lock %s: %w", batchLock, err)
		}
	}
	if err := checkKeys(v.dir, vkey); err != nil {
		return err
	}
	if err := v.readHeads(); err != nil {
		return err
	}
	state, err := readFull(v.dir, treeStateFile, 4<<10)
	if err != nil {
		return err
	}
	v.state = state
	v.partial = map[string][]byte{}
	var failure error
	treeFiles(v.head.Size, func(path string, level int, _ uint64, p uint8) bool {
		if p == 0 {
			return true
		}
		var b []byte
		if b, failure = readFull(v.dir, path, maxFile(level)); failure != nil {
			return false
		}
		v.partial[path] = b
		return true
	})
	if failure != nil {
		return v.explain(failure)
	}
	return v.checkNames()
}

// explain turns "missing" into what it most likely is, where Tessera's state says it.
func (v *verification) explain(err error) error {
	if s, e := readState(v.dir); e == nil && errors.Is(err, ErrMissing) && s.Size < v.head.Size {
		return fmt.Errorf("%w: the tree has %d entries, its newest head %d: %w", ErrRolledBack, s.Size, v.head.Size, err)
	}
	return err
}

func maxFile(level int) int64 {
	if level < 0 {
		return layout.EntryBundleWidth * (2 + MaxEntry)
	}
	return layout.TileWidth * int64(len(Hash{}))
}

// readHeads reads the checkpoint and the list of heads, whose last it must be.
func (v *verification) readHeads() error {
	cp, err := readFull(v.dir, checkpointFile, maxHead)
	if err != nil {
		return err
	}
	if v.head, err = parseHead(cp, v.verifier); err != nil {
		return fmt.Errorf("%s: %w", checkpointFile, err)
	}
	b, err := readFull(v.dir, headsName, 2*headsLimit)
	if err != nil {
		return err
	}
	heads, rest, err := parseHeads(b, v.verifier)
	if err != nil {
		return fmt.Errorf("%s: %w", headsName, err)
	}
	switch last := len(heads) - 1; {
	case len(rest) > 0:
		return fmt.Errorf("%w: %s ends in the middle of a head", ErrCorrupt, headsName)
	case last < 0:
		return fmt.Errorf("%w: %s is empty", ErrMissing, headsName)
	case heads[last].Size > v.head.Size:
		return fmt.Errorf("%w: %s has %d entries, a later head %d", ErrRolledBack, checkpointFile, v.head.Size, heads[last].Size)
	case heads[last].Note != v.head.Note:
		return fmt.Errorf("%w: %s is not the last of %s", ErrForked, checkpointFile, headsName)
	}
	v.heads, v.files, v.bytes = heads, 4, int64(len(cp)+len(b))
	return nil
}

// checkNames makes sure that there is nothing in the directory but the ledger.
func (v *verification) checkNames() error {
	belongs := map[string]bool{}
	treeFiles(v.head.Size, func(path string, _ int, _ uint64, _ uint8) bool { belongs[path] = true; return true })
	return filepath.WalkDir(v.dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		rel, err := filepath.Rel(v.dir, path)
		if err != nil || d.IsDir() {
			return err
		}
		if !d.Type().IsRegular() {
			return fmt.Errorf("%w: %s is no regular file", ErrUnexpected, rel)
		}
		if belongs[rel] {
			delete(belongs, rel)
			return nil
		}
		return v.checkName(rel, d)
	})
}

func (v *verification) checkName(rel string, d fs.DirEntry) error {
	switch rel {
	case checkpointFile, headsName, keyFile, pubKeyFile, treeStateFile:
		return nil
	case versionFile:
		if b, err := readFull(v.dir, versionFile, 16); err != nil || string(b) != "1" {
			return fmt.Errorf("%w: %s", ErrCorrupt, versionFile)
		}
		return nil
	case writerLock, batchLock, ".state/treeState.lock", ".state/publish.lock", ".state/gcState.lock":
		if st, err := d.Info(); err != nil || st.Size() != 0 {
			return fmt.Errorf("%w: %s is not empty", ErrUnexpected, rel)
		}
		return nil
	}
	if strings.HasPrefix(rel, "tile/") {
		if s, err := readState(v.dir); err == nil && s.Size > v.head.Size {
			return fmt.Errorf("%w: the tree has %d, the head %d (%s)", ErrUnsealed, s.Size, v.head.Size, rel)
		}
	}
	return fmt.Errorf("%w: %s", ErrUnexpected, rel)
}

// checkState compares Tessera's own note of the tree with the head.
func (v *verification) checkState() error {
	if bytes.Equal(v.state, stateBytes(v.head.Size, v.head.Root)) {
		return nil
	}
	s, err := readState(v.dir)
	switch {
	case err == nil && s.Size > v.head.Size:
		return fmt.Errorf("%w: the tree has %d, the head %d", ErrUnsealed, s.Size, v.head.Size)
	case err == nil && s.Size < v.head.Size:
		return fmt.Errorf("%w: the tree has %d entries, its newest head %d", ErrRolledBack, s.Size, v.head.Size)
	}
	return fmt.Errorf("%w: %s", ErrCorrupt, treeStateFile)
}

// checkSince puts the given head among those that the tree must contain.
func (v *verification) checkSince(since *Head) error {
	v.marks = v.heads
	if since == nil {
		return nil
	}
	if since.Size > v.head.Size {
		return fmt.Errorf("%w: it has %d entries, once it had %d", ErrRolledBack, v.head.Size, since.Size)
	}
	at := len(v.heads)
	for at > 0 && v.heads[at-1].Size > since.Size {
		at--
	}
	v.marks = append(append(append([]Head(nil), v.heads[:at]...), *since), v.heads[at:]...)
	return nil
}

var ranges = compact.RangeFactory{Hash: rfc6962.DefaultHasher.HashChildren}

// checkTree hashes every entry and meets every tile and head on the way.
func (v *verification) checkTree(ctx context.Context) error {
	whole := ranges.NewEmptyRange(0)
	levels := &levels{v: v}
	if err := v.meet(whole); err != nil {
		return err
	}
	for at := uint64(0); at < v.head.Size; at += layout.EntryBundleWidth {
		if err := ctx.Err(); err != nil {
			return err
		}
		leaves, err := v.leaves(at / layout.EntryBundleWidth)
		if err != nil {
			return err
		}
		for _, leaf := range leaves {
			if err := whole.Append(leaf, nil); err != nil {
				return err
			}
			if err := v.meet(whole); err != nil {
				return err
			}
		}
		if err := levels.add(0, leaves); err != nil {
			return err
		}
	}
	return levels.finish()
}

// meet compares the tree so far with the heads of its size.
func (v *verification) meet(whole *compact.Range) error {
	for len(v.marks) > 0 && v.marks[0].Size == whole.End() {
		h := v.marks[0]
		v.marks = v.marks[1:]
		if err := checkRoot(whole, h); err != nil {
			return err
		}
	}
	return nil
}

// file reads a tile or bundle, from the snapshot where it still changes.
func (v *verification) file(level int, index uint64) (string, []byte, error) {
	n := v.head.Size >> (8 * max(level, 0))
	p := uint8(0)
	if index == n/layout.TileWidth {
		p = uint8(n % layout.TileWidth)
	}
	path := tilePath(level, index, p)
	b, ok := v.partial[path]
	if !ok {
		var err error
		if b, err = readFull(v.dir, path, maxFile(level)); err != nil {
			return path, nil, err
		}
	}
	v.files++
	v.bytes += int64(len(b))
	return path, b, nil
}

// leaves hashes the entries of one bundle.
func (v *verification) leaves(index uint64) ([][]byte, error) {
	path, b, err := v.file(-1, index)
	if err != nil {
		return nil, err
	}
	var bundle api.EntryBundle
	if err := bundle.UnmarshalText(b); err != nil {
		return nil, fmt.Errorf("%w: %s: %v", ErrCorrupt, path, err)
	}
	want := min(layout.EntryBundleWidth, v.head.Size-index*layout.EntryBundleWidth)
	if uint64(len(bundle.Entries)) != want {
		return nil, fmt.Errorf("%w: %s holds %d entries, want %d", ErrCorrupt, path, len(bundle.Entries), want)
	}
	leaves := make([][]byte, len(bundle.Entries))
	for i, e := range bundle.Entries {
		leaves[i] = rfc6962.DefaultHasher.HashLeaf(e)
	}
	return leaves, nil
}

// levels compares the tiles of each level with the hashes they should hold.
type levels struct {
	v     *verification
	nodes [][][]byte // of each level, those of the tile being filled
	tiles []uint64   // of each level, the index of that tile
}

func (l *levels) add(level int, nodes [][]byte) error {
	for len(l.nodes) <= level {
		l.nodes, l.tiles = append(l.nodes, nil), append(l.tiles, 0)
	}
	l.nodes[level] = append(l.nodes[level], nodes...)
	if len(l.nodes[level]) < layout.TileWidth {
		return nil
	}
	full := l.nodes[level]
	if err := l.compare(level); err != nil {
		return err
	}
	l.nodes[level], l.tiles[level] = nil, l.tiles[level]+1
	above := ranges.NewEmptyRange(0)
	for _, n := range full {
		if err := above.Append(n, nil); err != nil {
			return err
		}
	}
	root, err := above.GetRootHash(nil)
	if err != nil {
		return err
	}
	return l.add(level+1, [][]byte{root})
}

// compare reads the tile being filled and says which of its hashes is another.
func (l *levels) compare(level int) error {
	path, b, err := l.v.file(level, l.tiles[level])
	if err != nil {
		return err
	}
	want := l.nodes[level]
	if len(b) != len(want)*len(Hash{}) {
		return fmt.Errorf("%w: %s holds %d bytes, want %d", ErrCorrupt, path, len(b), len(want)*len(Hash{}))
	}
	for i, n := range want {
		if have := b[i*len(n) : (i+1)*len(n)]; !bytes.Equal(have, n) {
			at := l.tiles[level]*layout.TileWidth + uint64(i)
			if level == 0 {
				return fmt.Errorf("%w: entry %d and its hash in %s differ", ErrCorrupt, at, path)
			}
			return fmt.Errorf("%w: hash %d of %s differs from the entries below it", ErrCorrupt, i, path)
		}
	}
	return nil
}

func (l *levels) finish() error {
	for level := range l.nodes {
		if len(l.nodes[level]) > 0 {
			if err := l.compare(level); err != nil {
				return err
			}
		}
	}
	return nil
}
