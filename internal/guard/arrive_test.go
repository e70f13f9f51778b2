package guard

import (
	"context"
	"errors"
	"testing"
	"time"

	"vigia/internal/introspect"
	"vigia/internal/link"
	"vigia/internal/machine/additions"
)

// blind sees nothing of a guest's memory.
type blind struct{ hears bool }

func (blind) attach(time.Time) (*introspect.Guest, error) { return nil, errors.New("no profile") }
func (b blind) hearsOfClones() bool                       { return b.hears }

// butler is an agent that notes what it is asked.
type butler struct {
	agent
	fails error
	asked []string
	name  additions.Identity
}

func (b *butler) Reseed(context.Context) error {
	b.asked = append(b.asked, "reseed")
	return b.fails
}

func (b *butler) SetClock(context.Context) (time.Duration, error) {
	b.asked = append(b.asked, "clock")
	return 0, b.fails
}

func (b *butler) Identify(_ context.Context, i additions.Identity) error {
	b.asked, b.name = append(b.asked, "identity"), i
	return b.fails
}

// TestArrive: a guest that goes on from a checkpoint is helped by its agent where it has one; what nobody saw is told as its word, what
// nobody did is told as not done.
func TestArrive(t *testing.T) {
	no := &additions.Error{Desc: "no"}
	who := &link.Identify{OldMAC: "52:54:00:00:00:01", Hostname: "two"}
	for name, c := range map[string]struct {
		agent *butler
		ask   link.Arrive
		hears bool
		want  link.Arrived
		thaws int
	}{
		"nobody there":         {nil, link.Arrive{Frozen: true, Identify: who}, false, link.Arrived{ClockWhy: errNoAdditions.Error(), ReseedWhy: errNoDriver.Error()}, 0},
		"nobody, and a driver": {nil, link.Arrive{}, true, link.Arrived{ClockWhy: errNoAdditions.Error(), ReseedWhy: errNotSeen.Error()}, 0},
		"an agent": {&butler{}, link.Arrive{Frozen: true, Identify: who}, false,
			link.Arrived{Thawed: true, Identified: true, ClockSet: true, ReseededBy: link.ByAdditions}, 1},
		"an agent of a guest that was not frozen":   {&butler{}, link.Arrive{}, false, link.Arrived{ClockSet: true, ReseededBy: link.ByAdditions}, 0},
		"a driver that was not seen at work":        {&butler{}, link.Arrive{}, true, link.Arrived{ClockSet: true, ReseededBy: link.ByAdditions}, 0},
		"an agent that can't":                       {&butler{fails: no}, link.Arrive{Identify: who}, false, link.Arrived{ClockWhy: no.Error(), ReseedWhy: no.Error(), IdentifyWhy: no.Error()}, 0},
		"an agent of whose word there is no proof ": {&butler{}, link.Arrive{Reseeds: new(int64)}, false, link.Arrived{ClockSet: true, ReseededBy: link.ByAdditions}, 0},
	} {
		t.Run(name, func(t *testing.T) {
			n := newcomer{views: blind{c.hears}, ask: c.ask}
			if c.agent != nil {
				n.agent = c.agent
			}
			if got := n.settle(t.Context()); got != c.want {
				t.Errorf("told %+v, want %+v", got, c.want)
			}
			if c.agent != nil && c.agent.thawed() != c.thaws {
				t.Errorf("thawed %d times", c.agent.thawed())
			}
			if c.agent != nil && c.ask.Identify != nil && c.agent.name != additions.Identity(*who) {
				t.Errorf("it was called %+v", c.agent.name)
			}
		})
	}
}
