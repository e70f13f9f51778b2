package guard

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"vigia/internal/link"
	"vigia/internal/machine/additions"
)

// extent is a disk with one ext4 whose journal is open or closed.
type extent struct{ *bytes.Reader }

func ext4Disk(open bool) extent {
	b := make([]byte, 64<<10)
	sb := b[1024:]
	binary.LittleEndian.PutUint32(sb, 16)        // inodes
	binary.LittleEndian.PutUint32(sb[4:], 64)    // blocks
	binary.LittleEndian.PutUint32(sb[0x14:], 1)  // the first data block
	binary.LittleEndian.PutUint32(sb[0x20:], 64) // blocks in a group
	binary.LittleEndian.PutUint32(sb[0x28:], 16) // inodes in a group
	binary.LittleEndian.PutUint16(sb[0x38:], 0xEF53)
	binary.LittleEndian.PutUint32(sb[0x4C:], 1)   // its revision
	binary.LittleEndian.PutUint16(sb[0x58:], 128) // size of an inode
	binary.LittleEndian.PutUint32(sb[0x5C:], 4)   // it has a journal
	incompat := uint32(0x42)                      // names with types, extents
	if open {
		incompat |= 4
	}
	binary.LittleEndian.PutUint32(sb[0x60:], incompat)
	return extent{bytes.NewReader(b)}
}

func (e extent) Size() int64 { return e.Reader.Size() }

// agent is a guest that does as a test says, and counts how often it was thawed.
type agent struct {
	freeze, thaw func(context.Context) error

	mu    sync.Mutex
	thaws int
}

func (a *agent) Freeze(ctx context.Context) (int, bool, error) {
	if a.freeze == nil {
		return 1, true, nil
	}
	return 1, true, a.freeze(ctx)
}

func (a *agent) Thaw(ctx context.Context) error {
	a.mu.Lock()
	a.thaws++
	a.mu.Unlock()
	if a.thaw == nil {
		return nil
	}
	return a.thaw(ctx)
}

func (a *agent) thawed() int {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.thaws
}

func silent(ctx context.Context) error {
	<-ctx.Done()
	return additions.ErrNoAgent
}

// TestFreeze: what a guest may say and do around a checkpoint, honest or not. It is bounded, what it says is held against the disk,
// and whoever may be frozen is thawed.
func TestFreeze(t *testing.T) {
	for name, c := range map[string]struct {
		agent *agent
		open  bool   // the journal on the disk
		why   string // not frozen; empty: it is
	}{
		"an honest agent":                {&agent{}, false, ""},
		"one that lies":                  {&agent{}, true, "the journal of one on the disk is open"},
		"one that does not answer":       {&agent{freeze: silent, thaw: silent}, false, "did not freeze its file systems in 1s"},
		"one that answers nonsense":      {&agent{freeze: func(context.Context) error { return additions.ErrProtocol }}, false, "makes no sense"},
		"one that freezes and is silent": {&agent{thaw: silent}, false, ""},
		"one that can't":                 {&agent{freeze: func(context.Context) error { return &additions.Error{Desc: "no"} }}, false, "no"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			ctx, cancel := context.WithCancel(t.Context())
			defer cancel()
			began := time.Now()
			f := freeze(ctx, c.agent, ext4Disk(c.open), new(atomic.Bool))
			f.look()
			f.thaw(ctx)
			f.thaw(ctx) // twice is once
			var told link.Checkpointed
			f.tell(&told)
			if took := time.Since(began); took > 3*freezeTime {
				t.Errorf("the guest has taken %s", took)
			}
			if told.Frozen != (c.why == "") || !strings.Contains(told.NotFrozen, c.why) {
				t.Errorf("frozen %v, %q", told.Frozen, told.NotFrozen)
			}
			for c.agent.thawed() == 0 { // it is asked beside everything else
				time.Sleep(time.Millisecond)
			}
		})
	}
}

// TestThawIsAskedAgain: a guest that writes much out before it hears is thawed once it does.
func TestThawIsAskedAgain(t *testing.T) {
	a := &agent{}
	a.thaw = func(context.Context) error {
		if a.thawed() < 3 {
			return additions.ErrNoAgent
		}
		return nil
	}
	if err := thaw(t.Context(), a, 5, time.Millisecond); err != nil || a.thawed() != 3 {
		t.Errorf("%v after %d times", err, a.thawed())
	}
	a.thaw = func(context.Context) error { return additions.ErrNoAgent }
	if err := thaw(t.Context(), a, 5, time.Millisecond); !errors.Is(err, additions.ErrNoAgent) || a.thawed() != 8 {
		t.Errorf("%v after %d times", err, a.thawed())
	}
}

// TestNotAsked: no agent, no word.
func TestNotAsked(t *testing.T) {
	var f *frozen
	f.look()
	f.thaw(t.Context())
	var told link.Checkpointed
	if f.tell(&told); told != (link.Checkpointed{}) {
		t.Errorf("%+v", told)
	}
}
