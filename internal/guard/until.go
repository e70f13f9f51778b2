package guard

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"strconv"
	"strings"
	"sync"

	"vigia/internal/event"
	"vigia/internal/link"
	"vigia/internal/machine"
)

// until is where a replay stops by itself.
//
// At a number of instructions QEMU stops it. At an event that a probe tells, the plugin does, while the CPU is held there: the guest has then
// executed that instruction's block and no more. Any other event is known a little after the guest has done what it tells of; the machine
// is paused then, and the count of instructions says where that is.
type until struct {
	mu      sync.Mutex
	armed   *link.Until
	hit     *link.Reached // the event, once it was seen
	done    *link.Reached // it has stopped there
	changed chan struct{} // closed when armed or hit change; nil: nobody waits
}

var errNoUntil = errors.New("nothing was said of where to stop")

// change tells who waits; the lock is held.
func (u *until) change() {
	if u.changed != nil {
		close(u.changed)
		u.changed = nil
	}
}

// arm replaces what was asked for before.
func (u *until) arm(ctx context.Context, m *machine.Monitor, at link.Until) error {
	u.set(nil)
	m.Unbreak(ctx) // there may be none
	if at.Kind == "" {
		if now, err := m.Instructions(ctx); err != nil {
			return err
		} else if at.Instruction <= now {
			return fmt.Errorf("instruction %d is behind it: it has executed %d", at.Instruction, now)
		}
		if err := m.Break(ctx, at.Instruction); err != nil {
			return err
		}
	}
	u.set(&at)
	return nil
}

func (u *until) set(at *link.Until) {
	u.mu.Lock()
	defer u.mu.Unlock()
	u.armed, u.hit, u.done = at, nil, nil
	u.change()
}

// held is asked by the watcher while a CPU waits: is this where to stop?
func (u *until) held(kind event.Kind, fields event.Fields) bool { return u.is(kind, fields, true) }

// is notes an event that is the one waited for, once.
func (u *until) is(kind event.Kind, fields event.Fields, exact bool) bool {
	u.mu.Lock()
	defer u.mu.Unlock()
	if u.armed == nil || u.hit != nil || u.done != nil || u.armed.Kind != string(kind) || !fits(u.armed.Fields, fields) {
		return false
	}
	u.hit = &link.Reached{Kind: string(kind), Exact: exact}
	u.hit.Fields, _ = json.Marshal(fields)
	u.change()
	return true
}

// told is called with every event on its way to the daemon: one that no CPU was held at is stopped at now.
func (u *until) told(g *Guard, kind event.Kind, fields event.Fields) {
	if u.is(kind, fields, false) {
		g.pauseSoon()
	}
}

// late is told by the watcher of a CPU that had waited long enough, and went on.
func (u *until) late(g *Guard) {
	u.mu.Lock()
	if u.hit != nil {
		u.hit.Exact = false
	}
	u.mu.Unlock()
	g.pauseSoon()
}

// pauseSoon does not keep who tells an event waiting.
func (g *Guard) pauseSoon() {
	go func() {
		if m, err := g.qemu(g.ctx); err == nil {
			m.Pause(g.ctx)
		}
	}()
}

// fits reports whether fields has all that is wanted. A value that begins or ends with * goes on there as it likes.
func fits(want map[string]string, fields event.Fields) bool {
	for name, pattern := range want {
		v, ok := fields[name]
		if !ok || !like(pattern, text(v)) {
			return false
		}
	}
	return true
}

func text(v any) string {
	switch v := v.(type) {
	case string:
		return v
	case int64:
		return strconv.FormatInt(v, 10)
	case bool:
		return strconv.FormatBool(v)
	}
	return fmt.Sprint(v)
}

func like(pattern, s string) bool {
	begins, ends := strings.HasPrefix(pattern, "*"), strings.HasSuffix(pattern, "*")
	switch core := strings.Trim(pattern, "*"); {
	case begins && ends:
		return strings.Contains(s, core)
	case begins:
		return strings.HasSuffix(s, core)
	case ends:
		return strings.HasPrefix(s, core)
	default:
		return s == pattern
	}
}

// stopAt is the daemon's call.
func (g *Guard) stopAt(ctx context.Context, r link.Request) (link.Response, error) {
	closeFiles(r.Files)
	var at link.Until
	if err := r.Decode(&at); err != nil {
		return link.Response{}, err
	}
	m, err := g.qemu(ctx)
	if err != nil {
		return link.Response{}, err
	}
	return link.Response{}, g.until.arm(ctx, m, at)
}

// reached waits until the machine has stopped where it was to.
func (g *Guard) reached(ctx context.Context, r link.Request) (link.Response, error) {
	closeFiles(r.Files)
	m, err := g.qemu(ctx)
	if err != nil {
		return link.Response{}, err
	}
	at, err := g.until.wait(ctx, m)
	return link.Response{Body: at}, err
}

func (u *until) wait(ctx context.Context, m *machine.Monitor) (link.Reached, error) {
	for {
		changed, at, there, err := u.look(ctx, m)
		if there || err != nil {
			return at, err
		}
		select {
		case <-m.Stops():
		case <-changed:
		case <-m.Done():
			return link.Reached{}, errors.New("the replay has ended before it came there")
		case <-ctx.Done():
			return link.Reached{}, ctx.Err()
		}
	}
}

// look says whether it has stopped where it was to; else changed is closed when it is worth another look.
func (u *until) look(ctx context.Context, m *machine.Monitor) (changed <-chan struct{}, at link.Reached, there bool, err error) {
	status, err := m.Status(ctx)
	if err != nil {
		return nil, at, false, err
	}
	now, err := m.Instructions(ctx)
	if err != nil {
		return nil, at, false, err
	}
	u.mu.Lock()
	defer u.mu.Unlock()
	if u.changed == nil {
		u.changed = make(chan struct{})
	}
	switch {
	case u.armed == nil:
		return nil, at, false, errNoUntil
	case u.done == nil && status != "running" && u.hit != nil:
		u.hit.Instruction = now
		u.done = u.hit
	case u.done == nil && status != "running" && u.armed.Kind == "" && now >= u.armed.Instruction:
		u.done = &link.Reached{Instruction: now, Exact: now == u.armed.Instruction}
	}
	if u.done != nil {
		return nil, *u.done, true, nil
	}
	return u.changed, at, false, nil
}
