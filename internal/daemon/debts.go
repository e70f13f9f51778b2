package daemon

import (
	"fmt"
	"os"
	"path/filepath"

	"vigia/internal/event"
	"vigia/internal/link"
)

// What a process had not told when it ended is counted, by a number that outlives it:
//
//	a worker's   in a page that the daemon shares with it (link.Tally): read when the worker is dead
//	the daemon's in a page of its own in /dev/shm, which the next daemon reads
//
// A worker whose daemon died with it leaves nobody who holds its page: then it is told that a count can't be had.

// count brings the daemon's own tally up to date; the lock is held.
func (b *bus) count() {
	b.tally.Set(link.Count{Given: b.seq, Kept: b.kept, Untold: uint64(b.lost + b.held + b.orphans + b.owed + b.budgets.waiting())})
}

// hold notes how many events the daemon holds back to join them.
func (b *bus) hold(n int64) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.held = n
	b.count()
}

// tellLoss tells of n lost events; until that is in the ledger it is this daemon's own debt. The lock is held.
func (b *bus) tellLoss(machine string, n int64, source, reason string) {
	b.owed += n
	b.emitThen(machine, event.EventsLost, event.Fields{"count": n, "source": source, "reason": reason}, func(uint64) {
		b.mu.Lock()
		defer b.mu.Unlock()
		b.owed -= n
		b.count()
	})
}

// bury tells what a dead worker had not: the events that were not taken from it. Those that were and are still on their
// way to the ledger have nobody any more who would give them to another daemon.
func (b *bus) bury(w *worker) {
	_, c, err := link.ReadTally(w.tally)
	b.mu.Lock()
	defer b.mu.Unlock()
	source := w.hello.Source
	for i := range b.pending {
		if p := &b.pending[i]; p.source == source && !p.orphan {
			p.orphan = true
			b.orphans++
		}
	}
	b.count()
	if err != nil {
		b.unknownLoss(w.of(), source, fmt.Sprintf("the %s ended: how many events it had not told is not known: %v", w.name, err))
		return
	}
	if n := c.Missing(b.last[source]); n > 0 {
		b.tellLoss(w.of(), n, source, "the "+w.name+" ended before it had told them")
	}
}

// diedUnseen tells of a worker that ended while no daemon ran: the last to hold its page is gone.
func (b *bus) diedUnseen(machine, name, source string) {
	b.emit(machine, event.WorkerDied, event.Fields{"worker": name, "reason": "it ended while no daemon ran"})
	b.mu.Lock()
	defer b.mu.Unlock()
	b.unknownLoss(machine, source, "the "+name+" ended while no daemon ran: how many events it had not told is not known")
}

// unknownLoss tells that events may be missing, where nothing says how many. The lock is held.
func (b *bus) unknownLoss(machine, source, reason string) {
	fields := event.Fields{"reason": reason}
	if source != "" {
		fields["source"] = source
	}
	b.emitThen(machine, event.EventsLost, fields, nil)
}

// inherit begins this daemon's own count and says, by tell, what the last one took with it. unclean: that one did not say
// good-bye. The old count stays until the new one, which holds it, is in its place.
func (b *bus) inherit(path string, unclean bool) (tell func(), err error) {
	source, n, missing := leftCount(path, b.last)
	f, err := os.OpenFile(path+".new", os.O_CREATE|os.O_RDWR|os.O_TRUNC, 0o600)
	if err != nil {
		return nil, fmt.Errorf("tally: %w", err)
	}
	defer f.Close()
	if err := f.Truncate(link.TallySize); err != nil {
		return nil, fmt.Errorf("tally: %w", err)
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.tally, err = link.OpenTally(f, b.source); err != nil {
		return nil, err
	}
	b.owed = n
	b.count()
	if err := os.Rename(path+".new", path); err != nil {
		return nil, fmt.Errorf("tally: %w", err)
	}
	return func() {
		b.mu.Lock()
		defer b.mu.Unlock()
		switch {
		case n > 0:
			b.owed -= n
			b.tellLoss("", n, source, "the last daemon ended before the ledger had them")
		case missing != nil && unclean:
			b.unknownLoss("", "", "the last daemon ended and its count is gone, as when the host went down: how many events it took along is not known")
		}
	}, nil
}

// leftCount reads what an earlier daemon left.
func leftCount(path string, taken map[string]uint64) (source string, n int64, err error) {
	f, err := os.Open(path)
	if err != nil {
		return "", 0, fmt.Errorf("%w: %w", link.ErrTally, err)
	}
	defer f.Close()
	source, c, err := link.ReadTally(f)
	if err != nil {
		return "", 0, err
	}
	return source, c.Missing(taken[source]), nil
}

// tallyFile is where the daemon keeps its own count: in memory that a kill does not clear.
func (l layout) tallyFile() string { return filepath.Join(l.ram, "daemon.tally") }
