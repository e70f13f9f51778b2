package additions

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"time"
)

// A guest that goes on from a checkpoint, or as a clone, has an old clock, and random numbers that somebody else has too.

// reseed makes the kernel draw its randomness anew at once (RNDRESEEDCRNG, linux/random.h). No program has a word for that; perl is in
// every Debian.
const reseed = `perl -e 'open(R, ">", "/dev/urandom") or exit 1; exit(defined(ioctl(R, 0x5207, 0)) ? 0 : 1)' 2>/dev/null ||
python3 -c 'import fcntl; fcntl.ioctl(open("/dev/urandom", "wb"), 0x5207)' 2>/dev/null`

// ErrMixed is returned where randomness was given and is not drawn from at once.
var ErrMixed = errors.New("the guest has taken fresh randomness, and draws from it within a minute: it has neither perl nor python3 to do it at once")

// Reseed mixes 64 bytes of the host's randomness into the guest's kernel's and has it drawn from.
func (a *Agent) Reseed(ctx context.Context) error {
	seed := make([]byte, 64)
	rand.Read(seed)
	if _, err := a.WriteFile(ctx, "/dev/urandom", 0, bytes.NewReader(seed)); err != nil {
		return err
	}
	r, err := a.Exec(ctx, []string{"/bin/sh", "-c", reseed}, nil)
	if err == nil && r.ExitCode != 0 {
		err = ErrMixed
	}
	return err
}

// Clock returns what the guest says is the time.
func (a *Agent) Clock(ctx context.Context) (time.Time, error) {
	var ns int64
	err := a.call(ctx, "guest-get-time", nil, &ns)
	return time.Unix(0, ns), err
}

// Limits of setting a clock: how close is close enough, how often it is tried, and what the way may take.
const (
	clockClose = 20 * time.Millisecond
	clockTries = 3
	clockLead  = 5 * time.Second
)

// SetClock sets the guest's clock to this one, and by its own word measures how far it is off then. What the way takes is learnt from
// that and put before the next try.
func (a *Agent) SetClock(ctx context.Context) (behind time.Duration, err error) {
	var lead time.Duration
	for range clockTries {
		if err := a.setClock(ctx, lead); err != nil {
			return 0, err
		}
		began := time.Now()
		guest, err := a.Clock(ctx)
		if err != nil {
			return 0, err
		}
		behind = began.Add(time.Since(began) / 2).Sub(guest)
		if behind.Abs() <= clockClose {
			break
		}
		lead = min(max(lead+behind, 0), clockLead)
	}
	return behind, nil
}

// setClock uses the agent's own word, which also sets the hardware's clock; and where there is no hwclock for that, which it wants
// before all else, the guest's date.
func (a *Agent) setClock(ctx context.Context, lead time.Duration) error {
	err := a.call(ctx, "guest-set-time", map[string]any{"time": time.Now().Add(lead).UnixNano()}, nil)
	var refused *Error
	if !errors.As(err, &refused) {
		return err
	}
	at := time.Now().Add(lead)
	r, err := a.Exec(ctx, []string{"date", "-u", "-s", fmt.Sprintf("@%d.%09d", at.Unix(), at.Nanosecond())}, nil)
	if err == nil && r.ExitCode != 0 {
		err = refused
	}
	return err
}
