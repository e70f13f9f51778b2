package ledger

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"

	"golang.org/x/sys/unix"
)

// request is one call of AppendAll on its way to the writing goroutine.
type request struct {
	entries [][]byte
	first   uint64
	err     error
	done    chan struct{}
}

// Future is the outcome of a Submit: it waits, and gives the index of the first entry.
type Future func(ctx context.Context) (first uint64, err error)

// Append adds one entry. When it returns without error the entry is on disk and sealed by a signed head.
func (l *Log) Append(ctx context.Context, entry []byte) (index uint64, err error) {
	return l.AppendAll(ctx, [][]byte{entry})
}

// AppendAll adds entries in order, with nothing between them, and returns the index of the first. If ctx ends first
// the entries may or may not be added. After an error nothing of it was added, but for whole groups of 1024 entries
// of a call with more. No entries: the index the next one will have.
func (l *Log) AppendAll(ctx context.Context, entries [][]byte) (first uint64, err error) {
	return l.Submit(ctx, entries)(ctx)
}

// Submit hands entries over and returns at once, unless the queue is full. Entries of one goroutine keep their order.
// The caller must not change them until the future is done.
func (l *Log) Submit(ctx context.Context, entries [][]byte) Future {
	if err := checkEntries(entries); err != nil {
		return failed(err)
	}
	l.closing.RLock()
	defer l.closing.RUnlock()
	if l.closed {
		return failed(ErrClosed)
	}
	if len(entries) == 0 {
		size := l.Head().Size
		return func(context.Context) (uint64, error) { return size, nil }
	}
	r := &request{entries: entries, done: make(chan struct{})}
	select {
	case l.requests <- r:
		return r.wait
	case <-ctx.Done():
		return failed(ctx.Err())
	}
}

func failed(err error) Future { return func(context.Context) (uint64, error) { return 0, err } }

func (r *request) wait(ctx context.Context) (uint64, error) {
	select {
	case <-r.done:
		return r.first, r.err
	case <-ctx.Done():
		return 0, ctx.Err()
	}
}

func checkEntries(entries [][]byte) error {
	for _, e := range entries {
		if len(e) > MaxEntry {
			return fmt.Errorf("%w: %d bytes, at most %d", ErrTooLarge, len(e), MaxEntry)
		}
	}
	return nil
}

// write is the one goroutine that changes files. Requests that queued up while the disk was busy share a batch.
func (l *Log) write() {
	defer close(l.done)
	for r := range l.requests {
		batch, n := []*request{r}, len(r.entries)
	gather:
		for n < maxBatch {
			select {
			case more, ok := <-l.requests:
				if !ok {
					break gather
				}
				batch, n = append(batch, more), n+len(more.entries)
			default:
				break gather
			}
		}
		l.writeBatch(batch)
	}
}

func (l *Log) writeBatch(batch []*request) {
	var entries [][]byte
	for _, r := range batch {
		entries = append(entries, r.entries...)
	}
	first, err := l.appendSealed(entries)
	for _, r := range batch {
		r.first, r.err = first, err
		first += uint64(len(r.entries))
		close(r.done)
	}
}

// appendSealed makes entries part of the tree and signs the new head. What fails half way is taken back, so that a
// full disk leaves a ledger that verifies and can go on once there is room.
func (l *Log) appendSealed(entries [][]byte) (first uint64, err error) {
	if err := flock(l.batch, unix.LOCK_EX); err != nil {
		return 0, fmt.Errorf("append to the ledger: %w", err)
	}
	defer flock(l.batch, unix.LOCK_UN)
	first = l.Head().Size
	for len(entries) > 0 {
		n := min(len(entries), maxBatch)
		if err := l.appendBatch(entries[:n]); err != nil {
			err = fmt.Errorf("append to the ledger: %w", err)
			return 0, errors.Join(err, l.takeBack(l.Head()))
		}
		entries = entries[n:]
	}
	return first, nil
}

func (l *Log) appendBatch(entries [][]byte) error {
	old := l.Head()
	first, err := l.tree.append(entries)
	if err != nil {
		return err
	}
	state, err := readState(l.dir)
	if err != nil {
		return err
	}
	if want := old.Size + uint64(len(entries)); first != old.Size || state.Size != want {
		return fmt.Errorf("%w: the tree has %d entries, want %d", ErrCorrupt, state.Size, want)
	}
	head, err := signHead(l.signer, state.Size, Hash(state.Root), l.now())
	if err != nil {
		return err
	}
	if err := l.publish(head); err != nil {
		return err
	}
	l.tree.sweep(old.Size, head.Size)
	return nil
}

// publish makes head the newest: first in the list of heads, so that the checkpoint is never one the list lacks.
func (l *Log) publish(head Head) error {
	if err := l.heads.append(head); err != nil {
		return err
	}
	if err := writeFile(filepath.Join(l.dir, checkpointFile), []byte(head.Note), 0o644); err != nil {
		return err
	}
	l.mu.Lock()
	l.head = head
	l.mu.Unlock()
	return nil
}
