package ledger

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"iter"

	"github.com/transparency-dev/tessera/api"
	"github.com/transparency-dev/tessera/api/layout"
	"github.com/transparency-dev/tessera/client"
)

// Entry is one entry and its place.
type Entry struct {
	Index uint64
	Data  []byte
}

// Read gives entries [from, to) of the sealed ledger, in order; to is cut to the ledger's size.
func (l *Log) Read(ctx context.Context, from, to uint64) iter.Seq2[Entry, error] {
	return readEntries(ctx, bundleReader(l.dir, func() uint64 { return l.Head().Size }), from, min(to, l.Head().Size))
}

// Tail returns the last n entries, oldest first: enough for a caller to know which of its own are already here.
func (l *Log) Tail(ctx context.Context, n int) ([]Entry, error) {
	size := l.Head().Size
	from := size - min(size, uint64(max(n, 0)))
	entries := make([]Entry, 0, size-from)
	for e, err := range l.Read(ctx, from, size) {
		if err != nil {
			return nil, err
		}
		entries = append(entries, e)
	}
	return entries, nil
}

// bundleReader reads bundles of a ledger that may be growing: a partial bundle makes way for a larger one, whose
// beginning is the same.
func bundleReader(dir string, size func() uint64) func(context.Context, uint64) (api.EntryBundle, error) {
	fetch := client.FileFetcher{Root: dir}
	return func(ctx context.Context, index uint64) (bundle api.EntryBundle, err error) {
		for last := ^uint64(0); ; {
			n := size()
			var b []byte
			b, err = fetch.ReadEntryBundle(ctx, index, layout.PartialTileSize(0, index, n))
			if err == nil {
				if e := bundle.UnmarshalText(b); e != nil {
					err = fmt.Errorf("%w: bundle %d: %v", ErrCorrupt, index, e)
				}
				return bundle, err
			}
			if !errors.Is(err, fs.ErrNotExist) {
				return bundle, err
			}
			if n == last {
				return bundle, fmt.Errorf("%w: %s", ErrMissing, layout.EntriesPath(index, layout.PartialTileSize(0, index, n)))
			}
			last = n
		}
	}
}

func readEntries(ctx context.Context, bundle func(context.Context, uint64) (api.EntryBundle, error), from, to uint64) iter.Seq2[Entry, error] {
	return func(yield func(Entry, error) bool) {
		for at := from; at < to; {
			if err := ctx.Err(); err != nil {
				yield(Entry{}, err)
				return
			}
			b, err := bundle(ctx, at/layout.EntryBundleWidth)
			if err != nil {
				yield(Entry{}, err)
				return
			}
			end := min(to, (at/layout.EntryBundleWidth+1)*layout.EntryBundleWidth)
			for ; at < end; at++ {
				i := at % layout.EntryBundleWidth
				if i >= uint64(len(b.Entries)) {
					yield(Entry{}, fmt.Errorf("%w: entry %d", ErrMissing, at))
					return
				}
				if !yield(Entry{Index: at, Data: b.Entries[i]}, nil) {
					return
				}
			}
		}
	}
}
