package guard

import (
	"context"
	"fmt"
	"sync"
	"time"

	"vigia/internal/event"
	"vigia/internal/introspect"
	"vigia/internal/link"
)

// checker looks for what should not be in the guest's memory: by itself on a schedule, telling each finding once, and
// when a person asks.
type checker struct {
	attach func(now time.Time) (*introspect.Guest, error)
	heard  func(error)
	emit   func(event.Kind, event.Fields)
	inside introspect.Inside
	// processor may be nil.
	processor introspect.Processor
	// worked says whether the guest has done anything to speak of since it was last asked; nil: it always has.
	worked func() bool
	// shrink gives back what a round has made resident; whole after all checks. It may be nil.
	shrink func(whole bool)

	mu      sync.Mutex
	guest   *introspect.Guest
	rounds  *introspect.Checker
	changes introspect.Changes
	found   bool // something new, in the last round
	sight   sight

	schedule chan link.CheckSchedule
}

// newChecker makes one. inside may be nil.
func newChecker(v *views, emit func(event.Kind, event.Fields), inside introspect.Inside) *checker {
	return &checker{attach: v.attach, heard: v.heard, emit: emit, inside: inside, schedule: make(chan link.CheckSchedule)}
}

// restShare is how many times as long a guest that rests is left alone: five seconds, and five minutes for all checks, at the
// daemon's own pace.
const restShare = 5

// turns counts the rounds that a guest was spared because it had rested.
type turns struct{ spared int }

func (t *turns) due(worked bool) bool {
	if !worked && t.spared < restShare-1 {
		t.spared++
		return false
	}
	t.spared = 0
	return true
}

// run keeps the schedule until ctx ends. A round that takes longer than its period is followed by the next at once, and
// no more than one waits.
func (c *checker) run(ctx context.Context, s link.CheckSchedule) {
	cheap, full := newTicker(s.Every), newTicker(s.FullEvery)
	var some, all turns
	busy := false // since all checks were last made
	for {
		select {
		case <-cheap.tick:
			now := c.busy()
			busy = busy || now
			if some.due(now) {
				c.scheduled(false)
			}
		case <-full.tick:
			if all.due(c.busy() || busy) {
				busy = false
				c.scheduled(true)
			}
		case s = <-c.schedule:
			cheap.stop()
			full.stop()
			cheap, full = newTicker(s.Every), newTicker(s.FullEvery)
		case <-ctx.Done():
			cheap.stop()
			full.stop()
			return
		}
	}
}

// busy says whether there may be something to find: the guest has worked, or the last round found something and it may go on.
func (c *checker) busy() bool {
	c.mu.Lock()
	found := c.found
	c.mu.Unlock()
	return c.worked == nil || c.worked() || found
}

// ticker is a time.Ticker that a period of 0 keeps silent.
type ticker struct {
	tick <-chan time.Time
	stop func()
}

func newTicker(period time.Duration) ticker {
	if period <= 0 {
		return ticker{stop: func() {}}
	}
	t := time.NewTicker(period)
	return ticker{t.C, t.Stop}
}

// set changes the schedule while it runs.
func (c *checker) set(ctx context.Context, s link.CheckSchedule) error {
	select {
	case c.schedule <- s:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

func (c *checker) scheduled(full bool) {
	_, _ = c.round(full) // why nothing can be seen is told by the guard's status
}

// round makes the checks and tells what is new.
func (c *checker) round(full bool) (introspect.Report, error) {
	now := time.Now()
	guest, err := c.attach(now)
	if err != nil {
		return c.unseen(err, now)
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if guest != c.guest {
		c.guest, c.rounds = guest, introspect.NewChecker(guest, c.inside)
		c.rounds.Processor = c.processor
		if c.shrink != nil {
			c.rounds.Between = func() { c.shrink(false) }
		}
	}
	r, err := c.rounds.Run(full)
	c.heard(err)
	if c.shrink != nil {
		c.shrink(full)
	}
	if err != nil {
		return c.unseen(err, now)
	}
	c.sight.looked(nil, now)
	list := c.changes.New(r)
	c.found = len(list) > 0
	for _, f := range list {
		kind, fields := findingEvent(f)
		c.emit(kind, fields)
	}
	return r, nil
}

// unseen is a round in which nothing could be seen: an error, or a finding of its own where that can't be right.
func (c *checker) unseen(err error, now time.Time) (introspect.Report, error) {
	lost, fresh := c.sight.looked(err, now)
	if !lost {
		return introspect.Report{}, err
	}
	if fresh {
		kind, fields := findingEvent(gone)
		c.emit(kind, fields)
	}
	return introspect.Report{Findings: []introspect.Finding{gone}, Views: []introspect.View{{Check: "landmarks", Name: "memory", Unknown: err.Error()}}}, nil
}

// findingEvent turns a finding into the event of its sort.
func findingEvent(f introspect.Finding) (event.Kind, event.Fields) {
	fields := event.Fields{"finding": f.Kind, "subject": f.Subject, "detail": f.Detail, "severity": string(f.Severity)}
	if p := f.Process; p != nil {
		fields["pid"], fields["ppid"], fields["uid"] = p.PID, p.PPID, int64(p.UID)
		fields["comm"], fields["exe"], fields["cmdline"] = p.Comm, p.Exe, p.Cmdline
	}
	switch {
	case f.Kind == introspect.KindProcessHidden:
		fields["views"], fields["missing"] = f.Listed, f.Missing
		return event.ProcessHidden, fields
	case f.Kind == introspect.KindModuleHidden:
		fields["name"], fields["views"], fields["missing"] = f.Subject, f.Listed, f.Missing
		return event.ModuleHidden, fields
	}
	return event.KernelTampered, fields
}

// check makes all checks at once, for a person.
func (g *Guard) check(_ context.Context, r link.Request) (link.Response, error) {
	closeFiles(r.Files)
	report, err := g.checker.round(true)
	if err != nil {
		return link.Response{}, fmt.Errorf("nothing can be checked in this machine's memory: %w", err)
	}
	return link.Response{Body: checkReport(report)}, nil
}

func (g *Guard) setSchedule(ctx context.Context, r link.Request) (link.Response, error) {
	closeFiles(r.Files)
	var s link.CheckSchedule
	if err := r.Decode(&s); err != nil {
		return link.Response{}, err
	}
	return link.Response{}, g.checker.set(ctx, s)
}

func checkReport(r introspect.Report) link.CheckReport {
	out := link.CheckReport{TookMS: float64(r.Took.Microseconds()) / 1000, Dropped: r.Dropped}
	for _, f := range r.Findings {
		row := link.Finding{Kind: f.Kind, Subject: f.Subject, Detail: f.Detail, Severity: string(f.Severity), Listed: f.Listed, Missing: f.Missing}
		if f.Process != nil {
			row.PID, row.Comm, row.Exe = f.Process.PID, f.Process.Comm, f.Process.Exe
		}
		for _, e := range f.Evidence {
			row.Evidence = append(row.Evidence, link.Evidence{Address: e.Address, Bytes: e.Bytes, Expected: e.Expected, Note: e.Note})
		}
		out.Findings = append(out.Findings, row)
	}
	for _, v := range r.Views {
		out.Views = append(out.Views, link.CheckedView{Check: v.Check, Name: v.Name, Count: v.Count, TookMS: v.TookMS, Unknown: v.Unknown})
	}
	return out
}

// processor asks QEMU for the CPUs' registers. It is given little time: a round does not wait for a QEMU that is busy.
type processor struct{ g *Guard }

const registersTime = 2 * time.Second

func (p processor) Registers() (string, error) {
	ctx, cancel := context.WithTimeout(p.g.ctx, registersTime)
	defer cancel()
	m, err := p.g.qemu(ctx)
	if err != nil {
		return "", err
	}
	return m.Registers(ctx)
}
