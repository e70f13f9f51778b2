package network

import (
	"sync"
	"sync/atomic"
	"time"
)

// quarantine is the switch that the frame loop looks at before a frame, and the link before one to the guest.
type quarantine struct {
	on    atomic.Bool
	first atomic.Int64 // UnixNano of the first drop
	since atomic.Int64
	mu    sync.Mutex // one switch at a time
}

func (q *quarantine) dropped(tell func(time.Time)) {
	if q.first.Load() != 0 {
		return
	}
	now := time.Now()
	if q.first.CompareAndSwap(0, now.UnixNano()) && tell != nil {
		tell(now)
	}
}

func (q *quarantine) times() (since, first time.Time) {
	at := func(v *atomic.Int64) time.Time {
		if ns := v.Load(); ns != 0 {
			return time.Unix(0, ns)
		}
		return time.Time{}
	}
	return at(&q.since), at(&q.first)
}

// Cut says what a switch to quarantine did.
type Cut struct {
	Flows int       // open ones that were ended
	At    time.Time // from then on no frame passed, either way
}

// Quarantine cuts the machine off, or lets it back. When Quarantine(true) returns, no frame has passed since Cut.At, every
// open flow is ended (the far ends saw a reset), and none can begin. A frame that was half written to
// QEMU is completed with zeros when the machine is released, so that the stream stays in step.
func (n *Network) Quarantine(on bool) Cut {
	q := &n.quarantine
	q.mu.Lock()
	defer q.mu.Unlock()
	if !on {
		q.on.Store(false)
		q.since.Store(0)
		q.first.Store(0)
		n.flows.open()
		n.out.unmute()
		return Cut{At: time.Now()}
	}
	q.on.Store(true)
	if n.out.mute() > 0 {
		q.dropped(n.cfg.OnFirstDrop)
	}
	cut := Cut{At: time.Now()}
	q.since.CompareAndSwap(0, cut.At.UnixNano())
	n.flows.shut()
	n.dns.cut()
	cut.Flows = n.cutAll(endQuarantine)
	return cut
}
