package probe

import (
	"context"
	"fmt"
	"os"
	"runtime"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"vigia/internal/event"
	"vigia/internal/memory"
)

// Eyes see what a CPU does that is held.
type Eyes interface {
	Guest
	Sight(cpus int) (Sight, error)
	Moment(cpu int) (Moment, error)
	Opening(cpu int) (Opening, error)
	Connection(cpu int) (Connection, error)
	Coming() (Module, error) // the module that is on its way in
	Called(cpu int) (Called, error)

	// Recipe is how to copy what Moment and Opening see; Recall gives the eyes that see a copy, on whatever CPU.
	Recipe() ([]memory.Step, error)
	Recall(task uint64, copy *memory.Copied) Eyes
}

// Sight is what the plugin needs to know of a kernel: see its struct orders.
type Sight struct {
	Slide                 uint64
	Current               []uint64
	TGID, NameData        uint64
	Dentry                uint64
	Parent, Name, NameLen uint64
	Mount, Above, Point   uint64
	Root                  uint64
}

// Moment is the process that runs on a CPU.
type Moment struct {
	Process
	StartTime uint64
	Thread    bool   // not the first of its process's threads
	Kernel    bool   // a kernel thread
	Last      bool   // the last of its process's threads
	Exit      uint32 // its wait status
}

// Opening is a file that a process is opening.
type Opening struct {
	Path  string
	Write bool
	Known bool // Write is
}

// Connection is a socket that begins to connect or to listen.
type Connection struct{ Protocol, Local, Remote string }

// ids are a process's real and effective user ids.
type ids struct{ uid, euid int64 }

const (
	// tendPeriod is how often a watcher looks after what nobody rings for; up to calmTend where nothing rang and all was well. Each wait
	// costs more than it seems: a thread that waits in a system call is watched by the runtime for its first ten milliseconds.
	tendPeriod = time.Second
	calmTend   = 5 * time.Second
	// linger is how long copies gather in the ring before they are read together: to be woken for each would cost the guest the core that
	// it runs on. A CPU that is held is looked at at once.
	linger = 4 * time.Millisecond
	// retry is how soon copies are looked at again that can't be understood yet: the kernel is being looked for.
	retry    = 50 * time.Millisecond
	maxIDs   = 1 << 17
	maxBlind = 64
)

// Watcher reads what the plugin holds. It is the page's one reader, on a goroutine of its own.
type Watcher struct {
	page   *page
	cpus   int
	kinds  []*point // by number in the page
	absent []string // points that the kernel lacks
	eyes   func() (Eyes, error)
	emit   Emit

	mu    sync.Mutex
	paths func(string) (string, bool)
	sieve []anchor
	stale bool // sight or sieve are yet to be written into the page
	state string
	// seeing says that the page has what the plugin needs for seeing by itself.
	seeing bool
	sink   func(Called) // nil: nobody traces
	halt   *halt
	blind  int   // looks in a row at which a kernel was there and could not be understood
	broken error // why nothing is probed any more

	heard atomic.Uint64 // tasks that began

	copy [memory.MaxCopy]byte // the one that is being read

	ids  map[int64]ids
	life uint64
	lost []uint64 // by CPU, as last told of
	gone int64    // hits that could not be understood
	why  error    // the last one's reason
}

// Options are what a watcher is made of.
type Options struct {
	Page   *os.File
	CPUs   int
	Symbol func(name string) (uint64, error) // link addresses
	Eyes   func() (Eyes, error)
	Emit   Emit
}

// NewWatcher prepares the page, unless a plugin has taken it up already: then another guard was its reader before. The
// file may be closed afterwards.
func NewWatcher(o Options) (*Watcher, error) {
	p, err := openPage(o.Page)
	if err != nil {
		return nil, err
	}
	w := &Watcher{page: p, cpus: min(o.CPUs, maxCPUs), eyes: o.Eyes, emit: o.Emit, ids: map[int64]ids{}, stale: true,
		paths: func(string) (string, bool) { return "", false }}
	start, err := o.Symbol("start_kernel")
	if err != nil {
		return nil, err
	}
	var links []uint64
	for i := range points {
		link, err := o.Symbol(points[i].symbol)
		if err != nil {
			w.absent = append(w.absent, points[i].symbol)
			continue
		}
		links, w.kinds = append(links, link), append(w.kinds, &points[i])
	}
	if p.alive() {
		w.inherit(links)
	} else {
		p.prepare(links, start)
	}
	w.lost = make([]uint64, w.cpus)
	for cpu := range w.lost {
		w.lost[cpu] = p.lost(cpu)
	}
	return w, nil
}

// inherit takes the numbers of the points as a reader before this one, perhaps of another version, gave them.
func (w *Watcher) inherit(links []uint64) {
	byLink := map[uint64]*point{}
	for i, link := range links {
		byLink[link] = w.kinds[i]
	}
	w.kinds = nil
	for i := range min(w.page.u32(atPoints), maxPoints) {
		w.kinds = append(w.kinds, byLink[w.page.u64(atPoint+8*int(i))])
	}
}

// Watch says which files matter: those that meant picks; the paths are patterns by which they are found.
func (w *Watcher) Watch(paths []string, meant func(string) (string, bool)) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.paths, w.sieve, w.stale = meant, anchors(paths), true
	w.page.ring()
}

func (w *Watcher) meant(path string) (string, bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.paths(path)
}

// Rebooted says that the guest was reset: its kernel will lie elsewhere.
func (w *Watcher) Rebooted() {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.page.put64(atCopied, 0)
	w.page.put64(atSlide, slideUnknown)
	w.stale, w.seeing = true, false
	w.page.ring()
	w.enable()
}

func (w *Watcher) bits(which func(*point) bool) (b uint64) {
	for i, p := range w.kinds {
		if p != nil && which(p) {
			b |= 1 << i
		}
	}
	return b
}

// Alive reports whether a plugin has taken the page up, and the kernel is one that it can be asked about: then everything is told
// from here, and there is nothing to sample.
func (w *Watcher) Alive() bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.page.alive() && w.broken == nil
}

// Heard counts the new tasks that the plugin has told of, and all that it said nobody had looked at in time; alive is Alive. Where the
// kernel lacks the point that tells of them nothing can be missed from it.
func (w *Watcher) Heard() (tasks uint64, alive bool) {
	if len(w.absent) > 0 && slices.Contains(w.absent, pointForked) {
		w.heard.Add(1)
	}
	tasks = w.heard.Load()
	for cpu := range w.cpus {
		tasks += w.page.lost(cpu)
	}
	return tasks, w.Alive()
}

// State says in a line what is probed.
func (w *Watcher) State() string {
	w.mu.Lock()
	defer w.mu.Unlock()
	switch {
	case !w.page.alive():
		return "sampled: QEMU has not loaded the plugin"
	case w.broken != nil:
		return "sampled: " + w.broken.Error()
	case w.state != "":
		return w.state
	}
	return "probed, once the guest's kernel runs"
}

// Run reads until ctx ends.
func (w *Watcher) Run(ctx context.Context) {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	w.mu.Lock()
	w.enable()
	w.mu.Unlock()
	w.page.takeOver(w.cpus)
	defer w.page.put32(atReader, 0)
	stop := context.AfterFunc(ctx, w.page.ring)
	defer stop()
	var tended time.Time
	rest, seen := tendPeriod, 0
	for ctx.Err() == nil {
		bell := w.page.u32(atBell)
		held, read, stuck := w.sweep()
		seen += held + read
		switch {
		case stuck:
			w.page.rings(doze, bell, retry)
		case read > 0:
			w.page.rings(doze, bell, linger)
		case held == 0:
			w.page.rings(sound, bell, rest)
		}
		if now := time.Now(); now.Sub(tended) >= tendPeriod {
			tended, rest = now, min(2*rest, calmTend)
			if w.tend() || seen > 0 {
				rest = tendPeriod
			}
			seen = 0
		}
	}
}

// sweep reads the copies that there are and looks at every CPU that is held, and lets it go. What a CPU that is held did before is among the
// copies by then. stuck says that nothing can be understood yet.
func (w *Watcher) sweep() (held, read int, stuck bool) {
	var list [maxCPUs]uint32
	for cpu := range w.cpus {
		list[cpu] = w.page.u32(w.page.turn(cpu))
	}
	read, stuck = w.drain()
	for cpu, turn := range list[:w.cpus] {
		if turn&turnMask == turnHeld {
			held++
			w.attend(cpu, turn)
		}
	}
	return held, read, stuck
}

// attend looks at a CPU that is held.
func (w *Watcher) attend(cpu int, turn uint32) {
	number := w.page.pointOf(cpu)
	if w.isForked(number) {
		w.heard.Add(1)
	}
	list, err := w.look(cpu, number)
	pause := w.halted(list, turn)
	w.page.put32(atPause, pause)
	if w.page.release(w.page.turn(cpu), turn) {
		w.tell(list, err)
	} else if pause != 0 { // it had waited long enough: the plugin counts it among the lost
		w.halt.late()
	}
}

// drain reads the copies in the ring, a ringful at most. They stay there while there is nobody to understand them.
func (w *Watcher) drain() (read int, stuck bool) {
	if w.page.u64(atHead) == w.page.u64(atTail) {
		return 0, false
	}
	eyes, err := w.eyes()
	if err != nil {
		return 0, true
	}
	w.fresh(eyes)
	for ; read < ringSize/copyHead; read++ {
		c, more, err := w.page.next(w.copy[:])
		if !more {
			break
		}
		var list []told
		if w.isForked(c.point) {
			w.heard.Add(1)
		}
		if err == nil {
			list, err = w.ask(c.cpu, c.point, eyes.Recall(c.task, c.what))
		}
		w.tell(list, err)
	}
	return read, false
}

// tell passes on what was seen.
func (w *Watcher) tell(list []told, err error) {
	if err != nil {
		w.gone, w.why = w.gone+1, err
	}
	for _, t := range list {
		if t.settle != nil {
			t.settle()
		}
		if t.kind != "" {
			w.emit(t.kind, t.fields)
		}
	}
}

func (w *Watcher) isForked(number uint32) bool {
	return number < uint32(len(w.kinds)) && w.kinds[number] != nil && w.kinds[number].symbol == pointForked
}

func (w *Watcher) look(cpu int, number uint32) ([]told, error) {
	eyes, err := w.eyes()
	if err != nil {
		return nil, err
	}
	w.fresh(eyes)
	return w.ask(cpu, number, eyes)
}

func (w *Watcher) ask(cpu int, number uint32, eyes Eyes) ([]told, error) {
	if number >= uint32(len(w.kinds)) || w.kinds[number] == nil {
		return nil, fmt.Errorf("%w: point %d", ErrPage, number)
	}
	return w.kinds[number].tell(w, cpu, eyes)
}

// fresh writes what the plugin needs once the guest's kernel is found, and when something of it changed.
func (w *Watcher) fresh(eyes Eyes) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if !w.stale {
		return
	}
	sight, err := eyes.Sight(w.cpus)
	if err != nil {
		if w.blind++; w.blind == maxBlind { // no kernel that is being booted takes so many looks
			w.broken = err
			w.enable()
		}
		return
	}
	w.stale, w.seeing, w.blind = false, false, 0
	p := w.page
	w.enable()
	for cpu, at := range sight.Current {
		p.current(cpu, at)
	}
	for _, f := range []struct {
		at int
		v  uint64
	}{{atNameData, sight.NameData}, {atDentry, sight.Dentry}, {atParent, sight.Parent}, {atName, sight.Name}, {atNameLen, sight.NameLen}, {atTaskTGID, sight.TGID},
		{atMount, sight.Mount}, {atAbove, sight.Above}, {atOn, sight.Point}, {atRoot, sight.Root}} {
		p.put32(f.at, uint32(f.v))
	}
	p.sift(w.sieve)
	p.put64(atFiltered, w.bits(func(p *point) bool { return p.filtered }))
	p.put64(atTraced, w.bits(func(p *point) bool { return p.traced }))
	if steps, err := eyes.Recipe(); err == nil && w.halt == nil { // where the machine is to be paused its CPUs must wait
		p.recipe(steps, w.bits(func(p *point) bool { return p.copied }))
	}
	p.put64(atSlide, sight.Slide)
	w.seeing = true
	w.enable()
	w.state = "probed: complete"
	if !p.reads() {
		w.state = "probed: complete, but for opened files: this QEMU does not let a plugin read memory"
	}
	for _, name := range w.absent {
		w.state += "; the kernel has no " + name
	}
	list, _ := eyes.Glances(nil)
	for _, g := range list {
		if _, known := w.ids[g.PID]; !known && !g.Kernel {
			w.ids[g.PID] = ids{int64(g.UID), int64(g.EUID)}
		}
	}
}

// tend looks after what nobody rings for: hits that were lost, a reader that was thought to be silent, a kernel that was
// found only now. It reports whether there was any of that.
func (w *Watcher) tend() (some bool) {
	var lost int64
	for cpu := range w.lost {
		now := w.page.lost(cpu)
		lost += int64(min(now-w.lost[cpu], 1<<32))
		w.lost[cpu] = now
	}
	if w.page.u32(atMute) == w.page.u32(atReader) {
		w.page.newReader()
	}
	w.missed(lost, "the guard did not look in time")
	some = lost > 0 || w.gone > 0
	if w.gone > 0 {
		w.missed(w.gone, "could not be understood: "+w.why.Error())
		w.gone = 0
	}
	if eyes, err := w.eyes(); err == nil && w.page.alive() {
		w.fresh(eyes)
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	return some || w.stale
}

func (w *Watcher) missed(n int64, why string) {
	if n > 0 {
		w.emit(event.ProcessMissed, event.Fields{"count": n, "threads": true, "reason": event.Text([]byte(why))})
	}
}
