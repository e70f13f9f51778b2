package guard

import (
	"context"
	"errors"
	"time"

	"vigia/internal/introspect"
	"vigia/internal/link"
	"vigia/internal/machine/additions"
)

// How long a guest that goes on from a checkpoint is waited for: its agent, with each thing it is asked; its kernel, to be found in
// memory; the device that makes it reseed, to have done so; and its clock, to be brought up to date by it.
const (
	arriveAsk    = 10 * time.Second
	arriveAttach = 15 * time.Second
	arriveReseed = 2 * time.Second
	arriveClock  = 2 * time.Second
	arrivePoll   = 50 * time.Millisecond
)

// arrive helps a guest that goes on from a checkpoint into its new now, by what its agent does for it, and says how it stands by what
// its memory shows. What the agent says alone is told as its word.
func (g *Guard) arrive(ctx context.Context, r link.Request) (link.Response, error) {
	closeFiles(r.Files)
	var a link.Arrive
	if err := r.Decode(&a); err != nil {
		return link.Response{}, err
	}
	n := newcomer{views: g.views, ask: a}
	if g.agent != nil {
		n.agent = g.agent
	}
	return link.Response{Body: n.settle(ctx)}, nil
}

// helper is the agent, as far as a newcomer needs it.
type helper interface {
	freezer
	Reseed(ctx context.Context) error
	SetClock(ctx context.Context) (behind time.Duration, err error)
	Identify(ctx context.Context, i additions.Identity) error
}

// outlook is what is seen of the guest from outside.
type outlook interface {
	attach(now time.Time) (*introspect.Guest, error)
	hearsOfClones() bool
}

// newcomer is a guest that goes on from a checkpoint.
type newcomer struct {
	views outlook
	agent helper // nil: it has none
	ask   link.Arrive
	told  link.Arrived
}

// Why nothing was done.
var (
	errNoAdditions = errors.New("this machine has no additions")
	errNoDriver    = errors.New("no driver for vmgenid is known in its kernel, and this machine has no additions")
	errNotSeen     = errors.New("its kernel was told by vmgenid, and it was not seen that it heard it; this machine has no additions")
)

// settle goes from what is most urgent to what can wait: file systems that can't be written, randomness that another has too, the
// clock. The kernel is looked for in memory only after that: it takes a while.
func (n *newcomer) settle(ctx context.Context) link.Arrived {
	clones := n.views.hearsOfClones()
	reseeded, clock := errNoDriver, errNoAdditions
	if n.agent != nil {
		if n.ask.Frozen { // nobody there knows that time has passed
			n.told.Thawed = thaw(ctx, n.agent, thawTimes, thawWait) == nil
		}
		if !clones {
			reseeded = n.asked(ctx, n.agent.Reseed)
		}
		n.identify(ctx)
		clock = n.asked(ctx, func(ctx context.Context) error { _, err := n.agent.SetClock(ctx); return err })
	}
	guest := n.find(ctx)
	if clones && !n.reseeds(ctx, guest, link.ByVMGenID) {
		if reseeded = errNotSeen; n.agent != nil {
			reseeded = n.asked(ctx, n.agent.Reseed)
		}
	}
	n.random(ctx, guest, reseeded)
	n.clock(ctx, guest, clock)
	return n.told
}

func (n *newcomer) identify(ctx context.Context) {
	i := n.ask.Identify
	if i == nil {
		return
	}
	err := n.asked(ctx, func(ctx context.Context) error { return n.agent.Identify(ctx, additions.Identity(*i)) })
	if n.told.Identified = err == nil; err != nil {
		n.told.IdentifyWhy = err.Error()
	}
}

func (n *newcomer) asked(ctx context.Context, do func(context.Context) error) error {
	ctx, cancel := context.WithTimeout(ctx, arriveAsk)
	defer cancel()
	return do(ctx)
}

// find looks for the guest's kernel in its memory; nil where it is not found in time, or can't be.
func (n *newcomer) find(ctx context.Context) *introspect.Guest {
	end := time.Now().Add(arriveAttach)
	for {
		guest, err := n.views.attach(time.Now())
		if err == nil || !errors.Is(err, introspect.ErrNotReady) || time.Now().After(end) || !pauseFor(ctx, 5*arrivePoll) {
			return guest
		}
	}
}

// reseeds waits until the kernel's memory shows that it has drawn its randomness anew since the checkpoint, and notes by whom.
func (n *newcomer) reseeds(ctx context.Context, guest *introspect.Guest, by string) bool {
	if guest == nil || n.ask.Reseeds == nil || n.told.ReseededBy != "" {
		return n.told.ReseededBy != ""
	}
	for end := time.Now().Add(arriveReseed); ; {
		if now, err := guest.Reseeds(); err != nil {
			return false
		} else if int64(now) > *n.ask.Reseeds {
			n.told.ReseededBy, n.told.ReseedSeen = by, true
			return true
		}
		if time.Now().After(end) || !pauseFor(ctx, arrivePoll) {
			return false
		}
	}
}

// random notes what became of asking the agent. Its word is enough only where memory can't be read.
func (n *newcomer) random(ctx context.Context, guest *introspect.Guest, err error) {
	switch {
	case n.told.ReseededBy != "":
	case err != nil:
		n.told.ReseedWhy = err.Error()
	case n.reseeds(ctx, guest, link.ByAdditions):
	case guest == nil || n.ask.Reseeds == nil:
		n.told.ReseededBy = link.ByAdditions
	default:
		n.told.ReseedWhy = "the guest's agent says that it is done, and the kernel's memory does not show it"
	}
}

// clock notes what became of setting it, and how far it is off. A guest that rests brings its clock up to date late, never early: the
// freshest of some looks is taken.
func (n *newcomer) clock(ctx context.Context, guest *introspect.Guest, err error) {
	if n.told.ClockSet = err == nil; err != nil {
		n.told.ClockWhy = err.Error()
	}
	if guest == nil {
		return
	}
	for end := time.Now().Add(arriveClock); ; {
		now, err := guest.Clock()
		if behind := time.Since(now).Seconds(); err == nil && (n.told.Behind == nil || behind < *n.told.Behind) {
			n.told.Behind = &behind
		}
		if time.Now().After(end) || !pauseFor(ctx, arrivePoll) {
			return
		}
	}
}

func pauseFor(ctx context.Context, d time.Duration) bool {
	select {
	case <-time.After(d):
		return true
	case <-ctx.Done():
		return false
	}
}

// hearsOfClones says whether the guest's kernel reseeds by itself when it is told that it goes on from a checkpoint.
func (v *views) hearsOfClones() bool {
	return v.profile != nil && introspect.HearsOfClones(v.profile)
}

// reseedsWait is how long the number of reseedings may be waited for: a check of the whole kernel may be under way.
const reseedsWait = 50 * time.Millisecond

// reseedsSoon returns how often the guest's kernel has drawn its randomness anew; nil where that can't be read at once.
func (g *Guard) reseedsSoon(ctx context.Context) *int64 {
	got := make(chan *int64, 1)
	go func() {
		var n *int64
		if guest, err := g.views.attach(time.Now()); err == nil {
			if count, err := guest.Reseeds(); err == nil {
				signed := int64(count)
				n = &signed
			}
		}
		got <- n
	}()
	ctx, cancel := context.WithTimeout(ctx, reseedsWait)
	defer cancel()
	select {
	case n := <-got:
		return n
	case <-ctx.Done():
		return nil
	}
}

var _ helper = (*additions.Agent)(nil)
