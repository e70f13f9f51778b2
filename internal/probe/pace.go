package probe

import (
	"sync"
	"time"

	"vigia/internal/event"
)

// A guest decides how many processes it makes. As many as paceBurst events are told one by one, and pacePerSecond more;
// what comes beyond is joined by kind and executable, with its number.
const (
	paceBurst     = 4096
	pacePerSecond = 100
)

// Pace stands between what sees processes and the ledger.
type Pace struct {
	emit  Emit
	flood *event.Flood
	now   func() time.Time

	mu   sync.Mutex
	left float64
	last time.Time
}

// NewPace passes events on to emit; those beyond the pace go through flood, which joins them and passes them on itself.
func NewPace(emit Emit, flood *event.Flood) *Pace {
	return &Pace{emit: emit, flood: flood, now: time.Now, left: paceBurst}
}

// Emit passes an event on, now or joined with others.
func (p *Pace) Emit(kind event.Kind, fields event.Fields) {
	if p.take() {
		p.emit(kind, fields)
		return
	}
	exe, _ := fields["exe"].(string)
	p.flood.Emit(event.Alike{Sort: string(kind) + " " + exe, Sum: []string{"count"}, Always: kind == event.ProcessMissed}, event.Event{Kind: kind, Fields: fields})
}

func (p *Pace) take() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	now := p.now()
	if !p.last.IsZero() {
		p.left = min(paceBurst, p.left+pacePerSecond*max(0, now.Sub(p.last).Seconds()))
	}
	p.last = now
	if p.left < 1 {
		return false
	}
	p.left--
	return true
}
