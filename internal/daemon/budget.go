package daemon

import (
	"cmp"
	"slices"
	"time"

	"vigia/internal/event"
	"vigia/internal/link"
)

// Beyond a machine's budget its events are counted by kind and told as sums every sumEvery. What rules wait for has a
// budget of its own beside it, a factShare of the other, and beyond that one event of a kind every factEvery: a guest
// can repeat anything, and a guard that was taken over can invent it.
const (
	factShare = 4
	factEvery = 10 * time.Second
	sumEvery  = 5 * time.Minute
)

// budgets bound what the ledger takes of each machine's events. Rules have seen an event before it is asked for: nothing
// that is summed here hides from them. The zero value bounds nothing.
type budgets struct {
	day     int64 // bytes; 0: no bound
	machine map[string]*budget
}

// budget is one machine's. What was spent is forgiven evenly over a day.
type budget struct {
	bulk, facts float64 // spent, in bytes
	at          time.Time
	passed      map[event.Kind]time.Time // facts beyond their budget
	summed      map[event.Kind]int64
	since       time.Time // of the first that is summed
}

// admit says whether an event of the machine becomes an entry of size bytes; if not, it is summed.
func (b *budgets) admit(machine string, kind event.Kind, fields event.Fields, size int, now time.Time) bool {
	if b.day == 0 || machine == "" {
		return true
	}
	m := b.of(machine, now)
	spent, most := &m.facts, float64(b.day)/factShare
	bulk := link.Bulk(kind, fields)
	if bulk {
		spent, most = &m.bulk, float64(b.day)
	}
	switch {
	case *spent+float64(size) <= most:
		*spent += float64(size)
		return true
	case !bulk && now.Sub(m.passed[kind]) >= factEvery:
		m.passed[kind] = now
		return true
	}
	if len(m.summed) == 0 {
		m.since = now
	}
	m.summed[kind]++
	return false
}

func (b *budgets) of(machine string, now time.Time) *budget {
	m := b.machine[machine]
	if m == nil {
		m = &budget{at: now, passed: map[event.Kind]time.Time{}, summed: map[event.Kind]int64{}}
		if b.machine == nil {
			b.machine = map[string]*budget{}
		}
		b.machine[machine] = m
	}
	forgiven := float64(b.day) * float64(now.Sub(m.at)) / float64(24*time.Hour)
	m.bulk, m.facts, m.at = max(m.bulk-forgiven, 0), max(m.facts-forgiven/factShare, 0), now
	return m
}

// sum is a number of events of one kind that are in the ledger as a number only.
type sum struct {
	machine string
	kind    event.Kind
	count   int64
	over    time.Duration
}

// due takes out the sums of machines for which it is time; all of them, if all is set. What has become of a machine that
// spends nothing is forgotten.
func (b *budgets) due(now time.Time, all bool) (sums []sum) {
	for name, m := range b.machine {
		if len(m.summed) == 0 && now.Sub(m.at) > 24*time.Hour {
			delete(b.machine, name)
		}
		if len(m.summed) == 0 || now.Sub(m.since) < sumEvery && !all {
			continue
		}
		for kind, n := range m.summed {
			sums = append(sums, sum{name, kind, n, now.Sub(m.since)})
		}
		clear(m.summed)
	}
	slices.SortFunc(sums, func(a, b sum) int {
		return cmp.Or(cmp.Compare(a.machine, b.machine), cmp.Compare(a.kind, b.kind))
	})
	return sums
}

// waiting is how many events are summed and not told.
func (b *budgets) waiting() (n int64) {
	for _, m := range b.machine {
		for _, count := range m.summed {
			n += count
		}
	}
	return n
}

// tellSums puts the sums that are due into the ledger; the lock is held.
func (b *bus) tellSums(now time.Time, all bool) {
	for _, s := range b.budgets.due(now, all) {
		b.emitThen(s.machine, event.EventsSummed, event.Fields{"kind": string(s.kind), "count": s.count, "seconds": s.over.Seconds()}, nil)
	}
}

// sumUp tells all sums: the daemon ends.
func (b *bus) sumUp() {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.tellSums(b.now(), true)
}
