package cli

import (
	"cmp"
	"fmt"
	"net"
	"slices"
	"strings"
	"time"
)

// A timeline says what a clone did with what it was given again: which process came of which input. It is made of the clone's
// events, and of what was there before anything was given: the processes, and who listened on which port.
//
// A process belongs to the input that was given last before the first process of its branch began, among those that went to the
// port on which that branch's parent, or one above it, listens. Branches are followed as processes are made, so one that lets go of its parent stays where it
// began. Where several flows to the port were open at that moment the branch belongs to one of them, and all are named.

// happening is an event of the clone, or of the machine that is re-enacted.
type happening struct {
	at     time.Time
	kind   string
	fields map[string]any
}

func (h *happening) text(name string) string { s, _ := h.fields[name].(string); return s }
func (h *happening) number(name string) int64 {
	f, _ := h.fields[name].(float64)
	return int64(f)
}

// scene is what was there at the beginning.
type scene struct {
	parents map[int64]int64    // of processes
	listens map[int64][]string // the ports on which a process listens
	channel map[int64]bool     // the guest agent
}

// given is one input, and what came of it.
type given struct {
	Number    int       `json:"number"`
	Source    string    `json:"source"`
	Recorded  string    `json:"recorded"`
	Direction string    `json:"direction,omitempty"`
	Protocol  string    `json:"protocol,omitempty"`
	Local     string    `json:"local,omitempty"`
	Remote    string    `json:"remote,omitempty"`
	Bytes     int64     `json:"bytes"`
	Text      string    `json:"text"`
	Processes []*branch `json:"processes,omitempty"`

	at, ended time.Time
}

// branch is a process, what it did and what it began.
type branch struct {
	PID       int64     `json:"pid"`
	Seconds   float64   `json:"seconds"` // after the input was given
	Exe       string    `json:"exe,omitempty"`
	Cmdline   string    `json:"cmdline,omitempty"`
	Comm      string    `json:"comm,omitempty"`
	Inputs    []int     `json:"inputs,omitempty"` // where it may be of more than one: their numbers
	Did       []string  `json:"did,omitempty"`
	Processes []*branch `json:"processes,omitempty"`

	born   time.Time
	gone   time.Time
	parent *branch
}

// timeline is all of it.
type timeline struct {
	Machine    string         `json:"machine"`
	Of         string         `json:"of"`
	Checkpoint string         `json:"checkpoint"`
	Given      map[string]any `json:"given"`
	Inputs     []*given       `json:"inputs"`
	Others     []*branch      `json:"others"` // of no input that is known
	Loose      []string       `json:"loose"`  // what happened that no process is known of
	Programs   compared       `json:"programs"`
}

// compared are the programs that were begun, then and now.
type compared struct {
	Then    int      `json:"then"`
	Again   int      `json:"again"`
	Missing []string `json:"missing"`
	New     []string `json:"new"`
}

// makeTimeline puts a clone's events in order. then are those of the machine itself.
func makeTimeline(s scene, now, then []happening) *timeline {
	slices.SortStableFunc(now, func(a, b happening) int { return a.at.Compare(b.at) })
	b := &timelineBuilder{t: &timeline{Inputs: []*given{}, Others: []*branch{}, Loose: []string{}}, scene: s, live: map[int64]*branch{}}
	for i := range now {
		if h := &now[i]; h.kind == "input.given" {
			b.input(h)
		}
	}
	for i := range now {
		if h := &now[i]; h.kind == "net.flow" {
			b.flowEnded(h)
		}
	}
	for i := range now {
		b.take(&now[i])
	}
	for _, root := range b.roots {
		b.place(root)
	}
	b.t.Programs = comparePrograms(then, now)
	return b.t
}

type timelineBuilder struct {
	t     *timeline
	scene scene
	live  map[int64]*branch // by pid, the one that has it now
	roots []*branch
	above map[*branch]int64  // of a root: the process that was there before
	dead  map[int64]*branch  // by pid, the one that had it last
	last  map[string]*branch // by name, the one that ended last
}

func (b *timelineBuilder) input(h *happening) {
	b.t.Inputs = append(b.t.Inputs, &given{Number: len(b.t.Inputs) + 1, Source: h.text("source"), Recorded: h.text("recorded"), Direction: h.text("direction"),
		Protocol: h.text("protocol"), Local: h.text("local"), Remote: h.text("remote"), Bytes: h.number("bytes"), Text: h.text("text"), at: h.at})
}

func (b *timelineBuilder) flowEnded(h *happening) {
	for _, g := range b.t.Inputs {
		if g.Remote != "" && g.Remote == h.text("remote") && g.Local == h.text("local") && g.ended.IsZero() && !h.at.Before(g.at) {
			g.ended = h.at
			return
		}
	}
}

func (b *timelineBuilder) take(h *happening) {
	pid := h.number("pid")
	switch h.kind {
	case "process.forked":
		b.born(h, pid)
	case "process.started":
		p := b.live[pid]
		if p == nil {
			p = b.born(h, pid)
		}
		if p.Exe != "" {
			p.Did = append(p.Did, "was "+p.Exe+", "+p.Cmdline)
		}
		p.Exe, p.Cmdline, p.Comm = h.text("exe"), h.text("cmdline"), h.text("comm")
	case "process.exited":
		b.exited(h, pid)
	case "socket.listening":
		b.did(h, pid, "listens on "+h.text("local"))
	case "socket.connecting":
		b.did(h, pid, "connects to "+h.text("remote"))
	case "process.credentials":
		b.did(h, pid, fmt.Sprintf("user %d becomes %d", h.number("old_euid"), h.number("euid")))
	case "file.opened":
		b.did(h, pid, "opens "+h.text("path"))
	case "module.loaded":
		b.did(h, pid, "loads the kernel module "+h.text("name"))
	case "file.changed":
		b.loose(h, h.text("path")+": "+h.text("change"))
	case "net.denied":
		b.loose(h, fmt.Sprintf("%s %s %s refused: %s", h.text("direction"), h.text("protocol"), h.text("remote"), h.text("reason")))
	case "net.dns":
		b.loose(h, "asks for the name "+h.text("name"))
	case "policy.alert":
		b.loose(h, "rule "+h.text("rule")+" is fulfilled")
	case "process.hidden", "module.hidden", "kernel.tampered":
		b.loose(h, h.text("severity")+": "+h.text("detail"))
	}
}

// born begins a branch.
func (b *timelineBuilder) born(h *happening, pid int64) *branch {
	p := &branch{PID: pid, born: h.at, Comm: h.text("comm")}
	ppid := h.number("ppid")
	if parent := b.parent(p, pid, ppid); parent != nil {
		p.parent = parent
		parent.Processes = append(parent.Processes, p)
	} else {
		if b.above == nil {
			b.above = map[*branch]int64{}
		}
		b.above[p] = ppid
		b.roots = append(b.roots, p)
	}
	b.live[pid] = p
	return p
}

// parent finds the process of which one is a copy. It is told of when it first runs: its parent may have ended by then, and the kernel have given it
// to process 1. It has its parent's name still, so the last process of that name that ended is held for it, and that is said.
func (b *timelineBuilder) parent(p *branch, pid, ppid int64) *branch {
	switch {
	case ppid == pid:
		return nil
	case b.live[ppid] != nil:
		return b.live[ppid]
	case b.dead[ppid] != nil:
		return b.dead[ppid]
	}
	gone := b.last[p.Comm]
	if ppid != 1 || gone == nil || p.born.Sub(gone.gone) > goneFor {
		return nil
	}
	p.Did = append(p.Did, fmt.Sprintf("its parent was gone when it first ran: held for a child of %d, which had its name and ended just before", gone.PID))
	return gone
}

// goneFor is how long after a process its child may first run.
const goneFor = 5 * time.Second

func (b *timelineBuilder) exited(h *happening, pid int64) {
	p := b.live[pid]
	if p == nil {
		return
	}
	if b.dead == nil {
		b.dead, b.last = map[int64]*branch{}, map[string]*branch{}
	}
	p.gone = h.at
	delete(b.live, pid)
	b.dead[pid], b.last[p.Comm] = p, p
}

// maxDid bounds what is told of one process, and what is told of none.
const maxDid = 50

func (b *timelineBuilder) did(h *happening, pid int64, what string) {
	switch p := b.live[pid]; {
	case p == nil:
		b.loose(h, fmt.Sprintf("process %d (%s) %s", pid, h.text("comm"), what))
	case len(p.Did) < maxDid && !slices.Contains(p.Did, what):
		p.Did = append(p.Did, what)
	}
}

func (b *timelineBuilder) loose(h *happening, what string) {
	if len(b.t.Loose) < maxDid {
		b.t.Loose = append(b.t.Loose, h.at.UTC().Format("15:04:05.000")+" "+what)
	}
}

// place puts a branch under the input that it follows from.
func (b *timelineBuilder) place(root *branch) {
	root.prune()
	if root.Exe == "" && len(root.Processes) == 0 && len(root.Did) == 0 {
		return // a process that was made and did nothing that is told
	}
	found := b.causes(root)
	if len(found) == 0 {
		root.since(root.born)
		b.t.Others = append(b.t.Others, root)
		return
	}
	last := found[len(found)-1]
	if len(found) > 1 {
		for _, g := range found {
			root.Inputs = append(root.Inputs, g.Number)
		}
	}
	root.since(last.at)
	last.Processes = append(last.Processes, root)
}

// causes are the inputs of which a branch may have come, the last one given last.
func (b *timelineBuilder) causes(root *branch) (found []*given) {
	ports, channel := b.service(b.above[root])
	for _, g := range b.t.Inputs {
		if g.at.After(root.born) {
			break
		}
		switch _, to, _ := net.SplitHostPort(g.Local); {
		case g.Source == "network" && g.Direction == "in" && slices.Contains(ports, to):
			found = slices.DeleteFunc(found, func(o *given) bool { return !o.ended.IsZero() && o.ended.Before(root.born) })
			found = append(found, g)
		case g.Source == "command" && channel, g.Source == "console" && len(ports) == 0 && !channel && b.scene.parents[b.above[root]] != 0 && b.above[root] != 1:
			found = []*given{g}
		}
	}
	return found
}

// service climbs from a process that was there at the beginning to one that listens, or is the guest agent.
func (b *timelineBuilder) service(pid int64) (ports []string, channel bool) {
	for range 64 {
		if ports := b.scene.listens[pid]; len(ports) > 0 || b.scene.channel[pid] {
			return ports, b.scene.channel[pid]
		}
		if pid = b.scene.parents[pid]; pid <= 1 {
			break
		}
	}
	return nil, false
}

// prune leaves out processes that were made and did nothing that is told: helpers of a shell.
func (p *branch) prune() {
	for _, c := range p.Processes {
		c.prune()
	}
	p.Processes = slices.DeleteFunc(p.Processes, func(c *branch) bool { return c.Exe == "" && len(c.Processes) == 0 && len(c.Did) == 0 })
}

func (p *branch) since(at time.Time) {
	p.Seconds = p.born.Sub(at).Seconds()
	for _, c := range p.Processes {
		c.since(at)
	}
}

// comparePrograms counts the programs of both, by what was run.
func comparePrograms(then, now []happening) compared {
	c := compared{Missing: []string{}, New: []string{}}
	left := map[string]int{}
	for i := range then {
		if h := &then[i]; h.kind == "process.started" {
			left[h.text("cmdline")]++
			c.Then++
		}
	}
	for i := range now {
		h := &now[i]
		if h.kind != "process.started" {
			continue
		}
		if name := h.text("cmdline"); left[name] > 0 {
			left[name]--
			c.Again++
		} else if len(c.New) < maxDid {
			c.New = append(c.New, name)
		}
	}
	for name, n := range left {
		for ; n > 0 && len(c.Missing) < maxDid; n-- {
			c.Missing = append(c.Missing, name)
		}
	}
	slices.SortFunc(c.Missing, cmp.Compare[string])
	return c
}

// maxShown bounds a text in a line of the timeline.
const maxShown = 150

func shown(s string) string {
	s = plain(strings.TrimSpace(s))
	if r := []rune(s); len(r) > maxShown {
		return string(r[:maxShown]) + "…"
	}
	return s
}

// lines are the timeline as a person reads it.
func (t *timeline) lines() (out []string) {
	for _, g := range t.Inputs {
		out = append(out, g.line())
		for _, p := range g.Processes {
			out = p.lines(out, 1)
		}
	}
	if len(t.Others) > 0 {
		out = append(out, "of no input that is known:")
		for _, p := range t.Others {
			out = p.lines(out, 1)
		}
	}
	if len(t.Loose) > 0 {
		out = append(out, "and:")
		for _, l := range t.Loose {
			out = append(out, "    "+shown(l))
		}
	}
	return out
}

func (g *given) line() string {
	at := g.Recorded
	if when, err := time.Parse(time.RFC3339Nano, at); err == nil {
		at = when.UTC().Format("15:04:05.000")
	}
	what := g.Source
	switch {
	case g.Direction == "in":
		what = fmt.Sprintf("%s %s → %s", g.Protocol, g.Remote, g.Local)
	case g.Direction == "out":
		what = fmt.Sprintf("answers of %s %s", g.Protocol, g.Remote)
	}
	return fmt.Sprintf("#%d  %s  %s, %d bytes: %s", g.Number, plain(at), plain(what), g.Bytes, shown(g.Text))
}

func (p *branch) lines(out []string, depth int) []string {
	in := strings.Repeat("    ", depth)
	what := p.Cmdline
	if what == "" {
		what = "(" + p.Comm + ")"
	}
	if p.Exe != "" && !strings.HasPrefix(what, p.Exe) {
		what = p.Exe + ": " + what
	}
	line := fmt.Sprintf("%s+%.2fs  %d  %s", in, p.Seconds, p.PID, shown(what))
	if len(p.Inputs) > 0 {
		line += fmt.Sprintf("  (of one of #%s)", strings.Trim(strings.ReplaceAll(fmt.Sprint(p.Inputs), " ", ", #"), "[]"))
	}
	out = append(out, line)
	for _, d := range p.Did {
		out = append(out, in+"        "+shown(d))
	}
	for _, c := range p.Processes {
		out = c.lines(out, depth+1)
	}
	return out
}
