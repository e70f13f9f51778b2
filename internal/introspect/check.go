package introspect

import (
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"
)

// A check looks at one sort of thing for what should not be so. Adding one is adding a line to the table below.
type check struct {
	name string
	// cheap checks take well under a millisecond and run each second; the others run in the full check.
	cheap bool
	run   func(*Checker) (Result, error)
}

// checks are all there are, in the order of a report.
var checks = append([]check{
	{"landmarks", true, (*Checker).disguise},
	{"processes", true, (*Checker).processes},
	{"modules", true, (*Checker).modulesHidden},
	{"credentials", true, (*Checker).credentials},
	{"sockets", true, (*Checker).socketsHidden},
	{"task memory", false, (*Checker).taskMemory},
	{"module memory", false, (*Checker).moduleMemory},
	{"credential memory", false, (*Checker).credentialMemory},
	{"registers", false, (*Checker).registers},
	{"text", false, (*Checker).text},
}, controlChecks()...)

// Result is what one check saw in one sample.
type Result struct {
	Findings []Finding
	Views    []View
}

// View is one way of listing a thing, and how much it listed: what was compared, for who wants to know what a clean
// report means.
type View struct {
	Check   string  `json:"check"`
	Name    string  `json:"name"`
	Count   int     `json:"count"`
	TookMS  float64 `json:"took_ms,omitempty"` // of the whole check, in its first view
	Unknown string  `json:"unknown,omitempty"` // why nothing is known from it
}

// Report is the outcome of a round of checks.
type Report struct {
	Findings []Finding
	Views    []View
	Took     time.Duration
	// Dropped counts findings beyond maxFindings.
	Dropped int
	// failed are the checks that could not be made: what they had found before is neither confirmed nor gone.
	failed map[string]bool
	full   bool
}

// Inside is what a guest says of itself. Its answers are claims.
type Inside interface {
	// Listing returns the pids that the guest lists, and the names of its modules.
	Listing() (pids []int64, modules []string, err error)
}

// settle are the waits between the samples in which a finding must be seen before it is given. What a kernel does in
// passing (fork, exit, exec, loading a module) takes microseconds; only a virtual CPU that its host has put aside in the
// middle of it makes it last. A finding that was given stays given without a wait while it is seen, and what is only info is
// given at once.
var settle = []time.Duration{15 * time.Millisecond, 40 * time.Millisecond, 100 * time.Millisecond, 250 * time.Millisecond}

// patience are the waits for what may last a grace period of RCU: a module's code for its start, and all of one that is unloaded, belong
// to nobody from when the kernel is done with them until it has freed them, and a busy guest takes a second and more to do
// that.
var patience = []time.Duration{500 * time.Millisecond, time.Second, time.Second, 1500 * time.Millisecond, 2 * time.Second}

// patientKinds are the findings that are given only after that.
var patientKinds = []string{KindCodeUnowned}

// Bounds of a report; the worst findings are kept, and the first of each one's evidence.
const (
	maxFindings = 256
	maxEvidence = 8
	maxShown    = 64 // bytes of one piece
)

// Checker makes rounds of checks over one guest. It remembers what it saw in the last round: findings that were
// confirmed, and credentials. Its methods may be called from several goroutines; they take turns.
type Checker struct {
	guest  *Guest
	inside Inside
	checks []check
	// Processor, where it is set, is asked for what no memory holds.
	Processor Processor
	// Between, where it is set, is called between two checks of a round of all of them: to give back what they have looked at.
	Between func()

	mu      sync.Mutex
	boot    Boot
	started bool                       // a program runs in it
	known   map[string]map[string]bool // confirmed findings by check and identity
	history map[taskKey]credHistory
	torn    map[string]int // rounds in a row that a check could not read its lists
	settle  []time.Duration
	// patience follows settle, for those that need it.
	patience []time.Duration
	sleep    func(time.Duration)
}

// NewChecker makes a checker. inside may be nil: no guest channel.
func NewChecker(g *Guest, inside Inside) *Checker {
	return &Checker{guest: g, inside: inside, checks: checks, settle: settle, patience: patience, sleep: time.Sleep}
}

// Run makes one round: the cheap checks, or all. A check that a kernel does not support is no error: its view says so.
// The error is ErrNotReady, ErrStarting, or what made every check fail.
func (c *Checker) Run(full bool) (Report, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	began := time.Now()
	if boot := c.guest.Boot(); boot != c.boot || c.known == nil {
		c.forget(boot)
	}
	if !c.started {
		starting, err := c.guest.starting()
		if err != nil {
			return Report{}, err
		}
		if c.started = !starting; starting {
			return Report{}, ErrStarting
		}
	}
	r := Report{failed: map[string]bool{}, full: full}
	var first error
	done := 0
	for i := range c.checks {
		k := &c.checks[i]
		if !full && !k.cheap {
			continue
		}
		res, err := c.confirmed(k)
		if full && c.Between != nil {
			c.Between()
		}
		if errors.Is(err, ErrNotReady) {
			return Report{}, err
		}
		if err != nil {
			if first == nil {
				first = err
			}
			r.failed[k.name] = true
			res.Views = append(res.Views, View{Check: k.name, Name: k.name, Unknown: err.Error()})
		} else {
			done++
		}
		r.Findings, r.Views = append(r.Findings, res.Findings...), append(r.Views, res.Views...)
	}
	if done == 0 && first != nil {
		return Report{}, first
	}
	r.Findings = distinct(r.Findings)
	byWorst(r.Findings)
	if len(r.Findings) > maxFindings {
		r.Dropped = len(r.Findings) - maxFindings
		r.Findings = r.Findings[:maxFindings]
	}
	for i := range r.Findings {
		r.Findings[i].bound()
	}
	r.Took = time.Since(began)
	return r, nil
}

// starting reports whether no process runs a program yet. Until then a kernel patches its own code and fills its tables, and
// there is nobody who could tamper with it. It is asked until it is so, and not again.
func (g *Guest) starting() (starting bool, err error) {
	err = g.view(func() error {
		starting = true
		for _, task := range union([]*listing{g.tasksListed(), g.pidTable()}) {
			mm, err := g.space.U64(task + g.layout.task.mm)
			flags, err2 := g.space.U32(task + g.layout.task.flags)
			if err == nil && err2 == nil && mm != 0 && flags&flagKernelThread == 0 {
				starting = false
			}
		}
		return nil
	})
	return starting, err
}

// forget begins anew, for another life of the guest's kernel.
func (c *Checker) forget(boot Boot) {
	c.boot, c.started, c.known, c.history, c.torn = boot, false, map[string]map[string]bool{}, nil, map[string]int{}
}

// confirmed runs one check until what it finds was found in every sample, or was known before.
func (c *Checker) confirmed(k *check) (Result, error) {
	began := time.Now()
	res, err := c.sample(k)
	if err != nil {
		return Result{}, err
	}
	took := time.Since(began)
	known := c.known[k.name]
	suspects := func(kinds []string) bool {
		return slices.ContainsFunc(res.Findings, func(f Finding) bool {
			return f.Serious() && !known[f.identity()] && (kinds == nil || slices.Contains(kinds, f.Kind))
		})
	}
	waits := slices.Concat(c.settle, c.patience)
	for i, wait := range waits {
		kinds := patientKinds
		if i < len(c.settle) {
			kinds = nil
		}
		if !suspects(kinds) {
			break
		}
		c.sleep(wait)
		again, err := c.sample(k)
		if err != nil {
			return Result{}, err
		}
		res.Findings = slices.DeleteFunc(again.Findings, func(f Finding) bool {
			id := f.identity()
			return f.Serious() && !known[id] && !slices.ContainsFunc(res.Findings, func(was Finding) bool { return was.identity() == id })
		})
	}
	now := make(map[string]bool, len(res.Findings))
	for i := range res.Findings {
		now[res.Findings[i].identity()] = true
	}
	c.known[k.name] = now
	for i := range res.Views {
		res.Views[i].Check = k.name
	}
	if len(res.Views) == 0 {
		res.Views = []View{{Check: k.name, Name: k.name}}
	}
	res.Views[0].TookMS = float64(took.Microseconds()) / 1000
	for i := range res.Findings {
		res.Findings[i].checks = []string{k.name}
	}
	return res, nil
}

// distinct joins what several checks found: the last one's words, which has looked at the most.
func distinct(list []Finding) []Finding {
	at := map[string]int{}
	out := list[:0]
	for _, f := range list {
		id := f.identity()
		if i, twice := at[id]; twice {
			f.checks = append(out[i].checks, f.checks...)
			out[i] = f
			continue
		}
		at[id] = len(out)
		out = append(out, f)
	}
	return out
}

// tornRounds is how many rounds in a row a check may fail because a list that it follows is torn.
const tornRounds = 3

// sample runs a check once. A list that stays torn is a finding: who breaks one hides what comes after.
func (c *Checker) sample(k *check) (Result, error) {
	res, err := k.run(c)
	if !errors.Is(err, ErrTorn) {
		delete(c.torn, k.name)
		return res, err
	}
	if c.torn[k.name]++; c.torn[k.name] <= tornRounds {
		return res, err
	}
	return Result{Findings: []Finding{{Kind: KindListBroken, Subject: k.name, Severity: Medium, Detail: "a list that this check follows stays torn: " + err.Error()}},
		Views: []View{{Name: k.name, Unknown: err.Error()}}}, nil
}

// Changes tells what is new in a round of checks, and what is gone: each finding once until it is gone.
type Changes struct {
	told map[string]map[string]bool // identity → the checks that found it
}

// New returns the serious findings of a report that the last ones did not have.
func (t *Changes) New(r Report) []Finding {
	if t.told == nil {
		t.told = map[string]map[string]bool{}
	}
	var fresh []Finding
	seen := map[string][]string{}
	for _, f := range r.Findings {
		id := f.identity()
		if seen[id] = f.checks; !f.Serious() {
			continue
		}
		if t.told[id] == nil {
			t.told[id] = map[string]bool{}
			fresh = append(fresh, f)
		}
		for _, name := range f.checks {
			t.told[id][name] = true
		}
	}
	if r.Dropped > 0 {
		return fresh // what is missing may only have had no room
	}
	for id, by := range t.told {
		for name := range by {
			if r.made(name) && !slices.Contains(seen[id], name) {
				delete(by, name)
			}
		}
		if len(by) == 0 {
			delete(t.told, id)
		}
	}
	return fresh
}

// made reports whether a check was made in this round, and worked.
func (r *Report) made(name string) bool {
	i := slices.IndexFunc(checks, func(k check) bool { return k.name == name })
	return i >= 0 && (r.full || checks[i].cheap) && !r.failed[name]
}

// Names returns the names of the checks.
func Names() []string {
	names := make([]string, len(checks))
	for i, k := range checks {
		names[i] = k.name
	}
	return names
}

// nameTask is how a finding calls a task.
func nameTask(comm string, pid int64) string { return fmt.Sprintf("%s (%d)", comm, pid) }
