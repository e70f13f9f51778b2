package ledger

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"sync"
	"time"

	"github.com/transparency-dev/merkle/rfc6962"
	"github.com/transparency-dev/tessera"
	"github.com/transparency-dev/tessera/api/layout"
	"github.com/transparency-dev/tessera/client"
	"github.com/transparency-dev/tessera/storage/posix"
	"golang.org/x/mod/sumdb/note"
	"k8s.io/klog/v2"
)

// Tessera collects entries for this long before it writes them. The ledger hands over whole batches, so waiting
// gains nothing.
const collect = time.Millisecond

// never is the interval of Tessera's own publishing: the ledger seals every batch by itself, at once, and an idle
// ledger wakes for nothing. For the same reason Tessera's garbage collection and statistics timers are not started.
const never = 100 * 365 * 24 * time.Hour

// tree is the Merkle tree on disk, as Tessera writes it.
type tree struct {
	dir    string
	add    tessera.AddFn
	cancel context.CancelFunc
	reader client.FileFetcher
}

var quietOnce sync.Once

// quietTessera silences klog, which Tessera writes to: what matters comes back as errors.
func quietTessera() {
	quietOnce.Do(func() {
		klog.LogToStderr(false)
		klog.SetOutput(io.Discard)
	})
}

// openTree starts Tessera's appender on dir. It is reached through the driver, since tessera.NewAppender adds a
// timer that reads the tree's state ten times a second.
func openTree(dir string, signer note.Signer) (*tree, error) {
	ctx, cancel := context.WithCancel(context.Background())
	t := &tree{dir: dir, cancel: cancel, reader: client.FileFetcher{Root: dir}}
	driver, err := posix.New(ctx, posix.Config{Path: dir})
	if err != nil {
		cancel()
		return nil, err
	}
	d, ok := driver.(interface {
		Appender(context.Context, *tessera.AppendOptions) (*tessera.Appender, tessera.LogReader, error)
	})
	if !ok {
		cancel()
		return nil, errors.New("this Tessera has no appender")
	}
	opts := tessera.NewAppendOptions().
		WithCheckpointSigner(signer).
		WithBatching(maxBatch, collect).
		WithCheckpointInterval(never).
		WithCheckpointRepublishInterval(0).
		WithGarbageCollectionInterval(0)
	a, _, err := d.Appender(ctx, opts)
	if err != nil {
		cancel()
		return nil, err
	}
	t.add = a.Add
	return t, nil
}

func (t *tree) stop() { t.cancel() }

// append writes entries, in order, and returns the index of the first once all are durable.
func (t *tree) append(entries [][]byte) (first uint64, err error) {
	prepared := make([]*tessera.Entry, len(entries))
	for i, e := range entries {
		prepared[i] = tessera.NewEntry(e)
	}
	futures := make([]tessera.IndexFuture, len(entries))
	for i, e := range prepared {
		futures[i] = t.add(context.Background(), e)
	}
	for i, future := range futures {
		index, e := future()
		switch {
		case e != nil:
			err = errors.Join(err, e)
		case i == 0:
			first = index.Index
		case err == nil && index.Index != first+uint64(i):
			err = fmt.Errorf("entry %d was written as %d", first+uint64(i), index.Index)
		}
	}
	return first, err
}

// treeState is Tessera's note of how far it has written.
type treeState struct {
	Size uint64 `json:"size"`
	Root []byte `json:"root"`
}

func readState(dir string) (treeState, error) {
	var s treeState
	b, err := readFull(dir, treeStateFile, 4<<10)
	if err != nil {
		return s, err
	}
	if err := json.Unmarshal(b, &s); err != nil || len(s.Root) != len(Hash{}) {
		return s, fmt.Errorf("%w: %s", ErrCorrupt, treeStateFile)
	}
	return s, nil
}

func stateBytes(size uint64, root Hash) []byte {
	b, _ := json.Marshal(treeState{Size: size, Root: root[:]}) // can't fail
	return b
}

// rootAt computes the root of the first size entries from the tiles of a tree at least that large.
func (t *tree) rootAt(ctx context.Context, size uint64) (Hash, error) {
	return rootAt(ctx, t.reader.ReadTile, size)
}

func rootAt(ctx context.Context, tiles client.TileFetcherFunc, size uint64) (Hash, error) {
	var root Hash
	nodes, err := client.FetchRangeNodes(ctx, size, tiles)
	if errors.Is(err, fs.ErrNotExist) {
		return root, fmt.Errorf("%w: a tile of the first %d entries", ErrMissing, size)
	}
	if err != nil {
		return root, fmt.Errorf("%w: %v", ErrCorrupt, err)
	}
	copy(root[:], foldRoot(nodes))
	return root, nil
}

// foldRoot joins the perfect subtrees of a tree, left to right, into its root.
func foldRoot(nodes [][]byte) []byte {
	if len(nodes) == 0 {
		return rfc6962.DefaultHasher.EmptyRoot()
	}
	root := nodes[len(nodes)-1]
	for i := len(nodes) - 2; i >= 0; i-- {
		root = rfc6962.DefaultHasher.HashChildren(nodes[i], root)
	}
	return root
}

// treeFiles lists the files under tile/ that a tree of size entries has: nothing else belongs there.
func treeFiles(size uint64, yield func(path string, level int, index uint64, partial uint8) bool) {
	for level, n := -1, size; level < 0 || n > 0; level++ {
		full, partial := n/layout.TileWidth, uint8(n%layout.TileWidth)
		for i := uint64(0); i <= full; i++ {
			p := uint8(0)
			if i == full {
				if p = partial; p == 0 {
					break
				}
			}
			if !yield(tilePath(level, i, p), level, i, p) {
				return
			}
		}
		if level >= 0 {
			n /= layout.TileWidth
		}
	}
}

// tilePath is the path of a tile, or of an entry bundle, which counts as level -1.
func tilePath(level int, index uint64, partial uint8) string {
	if level < 0 {
		return layout.EntriesPath(index, partial)
	}
	return layout.TilePath(uint64(level), index, partial)
}

// sweep removes the partial files that a tree of size entries, grown from one of old entries, no longer has.
func (t *tree) sweep(old, size uint64) {
	for level, o, n := -1, old, size; level < 0 || n > 0; level++ {
		for i := o / layout.TileWidth; i < n/layout.TileWidth; i++ {
			os.RemoveAll(filepath.Join(t.dir, tilePath(level, i, 0)+".p"))
		}
		if p := n % layout.TileWidth; p > 0 {
			t.sweepPartials(tilePath(level, n/layout.TileWidth, uint8(p)))
		}
		if level >= 0 {
			o, n = o/layout.TileWidth, n/layout.TileWidth
		}
	}
}

func (t *tree) sweepPartials(keep string) {
	dir, name := filepath.Split(filepath.Join(t.dir, keep))
	entries, err := os.ReadDir(dir)
	if err != nil {
		return // what can't be swept now is swept by the next Open
	}
	for _, e := range entries {
		if e.Name() != name {
			os.Remove(filepath.Join(dir, e.Name()))
		}
	}
}
