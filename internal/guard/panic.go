package guard

import (
	"context"
	"time"

	"vigia/internal/event"
	"vigia/internal/link"
	"vigia/internal/machine"
)

// A guest whose kernel has panicked stands still, with all that it was in its memory, so that what rules ask for can be done: save it,
// for one. A daemon that wants that says so (hold); where none does, or none is there, QEMU is ended.
const (
	panicGrace = 5 * time.Second  // for the daemon's word
	panicHold  = 15 * time.Minute // at most, with it
)

// standing is told of a panic.
func (g *Guard) standing(how string) {
	g.monitored(event.MachinePanicked, event.Fields{"reason": how})
	go g.endStanding()
}

func (g *Guard) endStanding() {
	select {
	case <-time.After(panicGrace):
	case <-g.held:
		select {
		case <-time.After(panicHold):
		case <-g.ctx.Done():
		}
	case <-g.ctx.Done():
	}
	g.quit()
}

// findStanding is for a guard that takes another's place: the other may have died while its guest stood still, before or after it told so.
func (g *Guard) findStanding(m *machine.Monitor) {
	ctx, cancel := context.WithTimeout(g.ctx, 10*time.Second)
	defer cancel()
	if status, err := m.Status(ctx); err != nil || status != "guest-panicked" {
		return
	}
	m.Panicked("the guest's kernel panicked")
	if g.cfg.Stands {
		go g.endStanding()
	} else {
		g.standing("found by another guard")
	}
}

func (g *Guard) quit() {
	ctx, cancel := context.WithTimeout(g.ctx, 10*time.Second)
	defer cancel()
	if m, err := g.qemu(ctx); err == nil {
		m.Quit(ctx)
	}
}

// hold keeps a guest that stands still after a panic for longer.
func (g *Guard) hold(_ context.Context, r link.Request) (link.Response, error) {
	closeFiles(r.Files)
	select {
	case g.held <- struct{}{}:
	default: // it is held already
	}
	return link.Response{}, nil
}

// panicked is told by the sampler of a panic that is seen in memory: a guest without the panic device's driver goes on in it.
func (g *Guard) panicked() bool {
	if !g.views.panicked() {
		return false
	}
	select {
	case <-g.monitorUp:
	default:
		return false
	}
	if g.monitor == nil {
		return false
	}
	if g.monitor.Ending().Ended != "" {
		return true // the device told
	}
	ctx, cancel := context.WithTimeout(g.ctx, 10*time.Second)
	defer cancel()
	if status, err := g.monitor.Status(ctx); err != nil || status != running {
		return false // it came from the checkpoint of a guest in panic, and is only looked at
	}
	g.monitor.Panicked("the guest's kernel panicked (seen in its memory)")
	g.monitor.Pause(ctx)
	g.standing("seen in its memory")
	return true
}
