package introspect

import (
	"fmt"
	"slices"
	"sync"
	"time"

	"vigia/internal/kernel"
	"vigia/internal/memory"
)

// Guest is a guest's memory, understood. Its methods may be called from several goroutines; they take turns.
type Guest struct {
	mem     Physical // as given, for the search
	meter   meter    // mem, for the views
	limit   int      // of reads in a view
	profile *kernel.Profile
	layout  *layout
	link    linkAddrs

	mu    sync.Mutex
	boot  Boot
	last  Boot          // the last boot that was found, also while it is being looked for again
	alias Boot          // what it has come to look like, written over
	dead  []Boot        // boots that are known to be over, whose bytes may still be in RAM
	space *memory.Space // the kernel's own tables
	user  *memory.Space // the tables of the process being read
	clock uint64        // run-time address of the timekeeper, once found

	copying bool // what is read was copied, and nothing of the guest is

	tick   uint64    // the guest's jiffies when last looked at
	tickAt time.Time // and since when they are that
	doubt  doubt     // about a kernel that lacks something it is found by

	modules *moduleLayout // of the other views, resolved when first asked for
	files   *fileLayout
	sockets *socketLayout
	codes   *codeLayout
	glances *glanceLayout
	tables  *tableLayout
	maps    *mapsLayout
	moments *momentLayout

	callNames map[int64]string // of system calls, as far as they were asked for

	points     []uint64          // link addresses of the kernel's tracepoints
	fieldMemo  map[string]uint64 // what the checks of control flow have looked up: fields and sizes of types
	symbolMemo map[string]uint64 // and link addresses of symbols

	taskPart [maxSpan]byte

	taskViews   *taskViewLayout // of the checks
	slabs       *slabLayout
	moduleViews *moduleViewLayout
	creds       *credLayout

	seen seen // what several tasks share, as this view has read it

	reference   *kernel.Reference // of the kernel's code; nil: noReference says why
	noReference error
	moduleFiles ModuleFiles // nil: none are known
	textSound   soundText

	scratch [max(maxPath, maxCmdline)]byte // for text on its way to becoming a string
}

// Boot tells one life of a guest's kernel from the next.
type Boot struct {
	Phys   uint64 // physical address of _text
	Slide  uint64 // run-time less link address
	Levels int    // of its page tables
	canary uint64 // init_task's stack canary: random at each boot
}

// linkAddrs are the link addresses that finding a kernel takes.
type linkAddrs struct {
	text, banner, initTask, topPgt uint64
	// What a kernel may lack: 0.
	level5, jiffies, clock, panicCPU, cmdline, taint, forks uint64
}

const (
	kernelAlign = 2 << 20
	maxSlide    = 1 << 30 // the kernel's window of virtual addresses
	stillFor    = time.Second
	maxDead     = 16
	headText    = 16 // of the banner: enough to pass over other places without reading it all
)

// Attach finds the kernel of profile in mem. It returns ErrNotReady where it is not there, or not far enough in its
// boot, and kernel.ErrUnsupported, with what is missing, where the kernel is one that can't be found. A kernel that has written
// over what it is found by is known by its tick, for which 60 ms are waited: an idle one may take several calls. What is missing for a
// view alone is that view's error, and in System.Missing.
func Attach(mem Physical, profile *kernel.Profile) (*Guest, error) {
	g := &Guest{mem: mem, meter: meter{mem: mem, left: maxReads}, limit: maxReads, profile: profile, layout: newLayout(profile)}
	if err := g.resolveLink(); err != nil {
		return nil, fmt.Errorf("attach: %w", err)
	}
	err := g.locate()
	profile.Trim()
	if err != nil {
		return nil, err
	}
	return g, nil
}

func (g *Guest) resolveLink() (err error) {
	for _, s := range []struct {
		at   *uint64
		name string
	}{{&g.link.text, "_text"}, {&g.link.banner, "linux_banner"}, {&g.link.initTask, "init_task"}, {&g.link.topPgt, "init_top_pgt"}} {
		if *s.at, err = g.profile.Symbol(s.name); err != nil {
			return err
		}
	}
	if len(g.profile.Banner()) <= headText {
		return &kernel.MissingError{What: "table", Name: "linux_banner"}
	}
	l := &g.link
	for _, s := range []struct {
		at   *uint64
		name string
	}{{&l.level5, "__pgtable_l5_enabled"}, {&l.jiffies, "jiffies_64"}, {&l.clock, "tk_core"}, {&l.panicCPU, "panic_cpu"},
		{&l.cmdline, "saved_command_line"}, {&l.taint, "tainted_mask"}, {&l.forks, "total_forks"}} {
		*s.at, _ = g.profile.Symbol(s.name)
	}
	return nil
}

// Boot returns which life of the guest's kernel the last view saw.
func (g *Guest) Boot() Boot {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.boot
}

// Rebooted says that the guest was reset: what is now in memory is over, though its bytes may stay for a while.
func (g *Guest) Rebooted() {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.last != (Boot{}) {
		g.bury(g.last)
	}
	if g.alias != (Boot{}) {
		g.bury(g.alias)
	}
	g.last, g.alias, g.boot = Boot{}, Boot{}, Boot{}
}

func (g *Guest) bury(b Boot) {
	if len(g.dead) == maxDead {
		g.dead = slices.Delete(g.dead, 0, 1)
	}
	g.dead = append(g.dead, b)
}

// seen keeps what several tasks or files of one view share, by address.
type seen struct {
	proxies     map[uint64]Namespaces // by nsproxy
	cgroups     map[uint64]string     // paths, by css_set
	filesystems map[uint64]string     // names of their sorts, by super block
}

func (s *seen) clear() {
	if s.proxies == nil {
		s.proxies, s.cgroups, s.filesystems = make(map[uint64]Namespaces), make(map[uint64]string), make(map[uint64]string)
	}
	clear(s.proxies)
	clear(s.cgroups)
	clear(s.filesystems)
}

// begin prepares for a view: it makes sure the kernel is still the one found, and alive, else looks for it anew.
func (g *Guest) begin() error {
	if g.boot == (Boot{}) {
		return g.locate()
	}
	if now, ok := g.identify(g.boot.Phys); ok && now == g.boot {
		g.space.Flush()
		if !g.still() {
			return nil
		}
	} else if g.lives(g.boot) {
		if g.alias = now; !ok {
			g.alias = Boot{}
		}
		return nil
	}
	return g.locate()
}

// still reports, once a second, that the kernel's tick has not moved: the guest is paused or idle, or this is what a
// reset has left of it and another kernel runs. Searching again costs little, and finds the one or the other.
func (g *Guest) still() bool {
	if g.link.jiffies == 0 {
		return false
	}
	tick := g.ticks()
	now := time.Now()
	if tick != g.tick || g.tickAt.IsZero() {
		g.tick, g.tickAt = tick, now
		return false
	}
	if now.Sub(g.tickAt) < stillFor {
		return false
	}
	g.tickAt = now
	return true
}
