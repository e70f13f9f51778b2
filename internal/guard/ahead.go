package guard

import (
	"context"
	"os"

	"vigia/internal/link"
)

// A machine that was made ahead has a guard like any other, and a QEMU that waits for its first instruction. It has no name and no
// record: were its daemon killed, nobody would know of it. So its guard ends it.

// name says what the machine is called that nobody had asked for when this guard began.
func (g *Guard) name(_ context.Context, r link.Request) (link.Response, error) {
	closeFiles(r.Files)
	var n link.Name
	if err := r.Decode(&n); err != nil {
		return link.Response{}, err
	}
	g.out.SetMachine(n.Name)
	return link.Response{}, nil
}

// left is told that no daemon is there any more.
func (g *Guard) left() {
	g.mu.Lock()
	ahead := g.configured && g.cfg.Ahead
	g.mu.Unlock()
	if !ahead {
		return
	}
	ctx, cancel := context.WithTimeout(g.ctx, greetTime)
	defer cancel()
	if m, err := g.qemu(ctx); err == nil && m.Quit(ctx) == nil {
		select {
		case <-m.Done(): // it flushes a disk that this guard serves
		case <-ctx.Done():
		}
	}
	os.Exit(0)
}
