package probe

import (
	"context"
	"encoding/binary"
	"errors"
	"math/rand/v2"
	"os"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"vigia/internal/event"
	"vigia/internal/memory"
)

// newPage is a page as the daemon makes it.
func newPage(t testing.TB, size int64, seals int) *os.File {
	t.Helper()
	fd, err := unix.MemfdCreate("page", unix.MFD_CLOEXEC|unix.MFD_ALLOW_SEALING)
	if err != nil {
		t.Fatal(err)
	}
	f := os.NewFile(uintptr(fd), "page")
	t.Cleanup(func() { f.Close() })
	if err := f.Truncate(size); err != nil {
		t.Fatal(err)
	}
	if _, err := unix.FcntlInt(f.Fd(), unix.F_ADD_SEALS, seals); err != nil {
		t.Fatal(err)
	}
	return f
}

// cpu is the plugin's side of one virtual CPU, as probe.c has it.
type cpu struct {
	p *page
	n int
}

// hold stops the CPU at a point until it is seen, or gives up: it reports whether it was seen.
func (c cpu) hold(point uint32, patience time.Duration) bool {
	at := c.p.turn(c.n)
	held := c.p.u32(at)&^turnMask + 4 | turnHeld
	c.p.put32(at+slotPoint, point)
	c.p.put32(at, held)
	atomic.AddUint32(c.p.word(atBell), 1)
	if c.p.u32(atAsleep) != 0 {
		futexWake(c.p.word(atBell))
	}
	for end := time.Now().Add(patience); c.p.u32(at) == held; {
		left := time.Until(end)
		if left <= 0 {
			if atomic.CompareAndSwapUint32(c.p.word(at), held, held&^turnMask|turnGone) {
				c.p.put32(atMute, c.p.u32(atReader))
				atomic.AddUint64(c.p.long(at+slotLost), 1)
				return false
			}
			return true
		}
		futexWait(c.p.word(at), held, left)
	}
	return true
}

// stage is a guest whose CPUs show what a test puts before them.
type stage struct {
	scene
	moment atomic.Pointer[Moment]
	late   atomic.Pointer[chan struct{}] // a look waits until it is closed
	blind  atomic.Bool
}

func (s *stage) Sight(cpus int) (Sight, error) {
	if s.blind.Load() {
		return Sight{}, errGone
	}
	return Sight{Slide: 2 << 20, Current: make([]uint64, cpus)}, nil
}
func (s *stage) Moment(int) (Moment, error) {
	if late := s.late.Load(); late != nil {
		<-*late
	}
	if m := s.moment.Load(); m != nil {
		return *m, nil
	}
	return Moment{}, errGone
}
func (s *stage) Opening(int) (Opening, error) {
	return Opening{Path: "/etc/shadow", Known: true}, nil
}
func (s *stage) Connection(int) (Connection, error) {
	return Connection{"tcp", "0.0.0.0:1", "192.0.2.1:2"}, nil
}
func (s *stage) Called(int) (Called, error) { return Called{PID: 7, Name: "openat"}, nil }
func (s *stage) Coming() (Module, error)    { return Module{"evil", 1, 2}, nil }
func (s *stage) Recipe() ([]memory.Step, error) {
	return []memory.Step{{Op: memory.StepCopy, Len: 8}}, nil
}

// Recall gives the eyes that take the first byte of a copy for a pid.
func (s *stage) Recall(task uint64, c *memory.Copied) Eyes { return &recalled{s, task, c} }

type recalled struct {
	*stage
	task uint64
	copy *memory.Copied
}

func (r *recalled) Moment(int) (Moment, error) {
	space := memory.NewSpace(nil, 0, 4)
	space.From(r.copy)
	pid, err := space.U64(r.task)
	return Moment{Process: Process{PID: int64(pid), Comm: "copied"}}, err
}

type probed struct {
	t     *testing.T
	file  *os.File
	stage *stage
	w     *Watcher
	told  chan event.Event
	page  *page
	stop  func() // and wait until it has
}

func symbol(name string) (uint64, error) {
	if name == "tcp_connect" {
		return 0, errors.New("no such symbol")
	}
	return 0xffffffff81000000 + uint64(len(name))<<4, nil
}

// probe runs a watcher on a page that a plugin has taken up.
func newProbed(t *testing.T) *probed {
	t.Helper()
	p := &probed{t: t, file: newPage(t, PageSize, unix.F_SEAL_SHRINK), stage: &stage{}, told: make(chan event.Event, 1000)}
	p.start()
	return p
}

func (p *probed) start() {
	p.t.Helper()
	var err error
	p.w, err = NewWatcher(Options{Page: p.file, CPUs: 2, Symbol: symbol, Eyes: func() (Eyes, error) { return p.stage, nil },
		Emit: func(k event.Kind, f event.Fields) { p.told <- event.Event{Kind: k, Fields: f} }})
	if err != nil {
		p.t.Fatal(err)
	}
	if p.page, err = openPage(p.file); err != nil {
		p.t.Fatal(err)
	}
	p.page.put64(atAlive, pageMagic)
	p.page.put32(atReads, 1)
	p.w.Watch([]string{"/etc/shadow"}, func(path string) (string, bool) { return path, path == "/etc/shadow" })
	before := p.page.u32(atReader)
	ctx, cancel := context.WithCancel(p.t.Context())
	over := make(chan struct{})
	go func() { p.w.Run(ctx); close(over) }()
	p.stop = func() { cancel(); <-over }
	for p.page.u32(atReader) == before {
		time.Sleep(time.Millisecond)
	}
}

func (p *probed) next() event.Event {
	p.t.Helper()
	select {
	case e := <-p.told:
		return e
	case <-time.After(10 * time.Second):
		p.t.Fatal("nothing was told")
	}
	return event.Event{}
}

// number is that of a point in the page.
func (p *probed) number(symbol string) uint32 {
	for i, k := range p.w.kinds {
		if k.symbol == symbol {
			return uint32(i)
		}
	}
	p.t.Fatal("no point", symbol)
	return 0
}

func TestWatcher(t *testing.T) {
	p := newProbed(t)
	c := cpu{p.page, 1}
	p.stage.moment.Store(&Moment{Process: Process{PID: 7, PPID: 1, UID: 1000, EUID: 1000, Comm: "x", Exe: "/bin/x", Cmdline: "x 1"}, Last: true, Exit: 3 << 8})
	for _, step := range []struct {
		point string
		kind  event.Kind
		field string
		want  any
	}{
		{"schedule_tail", event.ProcessForked, "pid", int64(7)},
		{"proc_exec_connector", event.ProcessStarted, "cmdline", "x 1"},
		{"security_file_open", event.FileOpened, "path", "/etc/shadow"},
		{"inet_csk_listen_start", event.SocketListening, "local", "0.0.0.0:1"},
		{"do_init_module", event.ModuleLoaded, "name", "evil"},
		{"taskstats_exit", event.ProcessExited, "exit_code", int64(3)},
	} {
		if !c.hold(p.number(step.point), 10*time.Second) {
			t.Fatalf("%s: nobody looked", step.point)
		}
		if e := p.next(); e.Kind != step.kind || e.Fields[step.field] != step.want || e.Fields["comm"] != "x" {
			t.Errorf("%s: %+v", step.point, e)
		}
	}
	p.stage.moment.Store(&Moment{Process: Process{PID: 7, UID: 1000, EUID: 1000}})
	c.hold(p.number("schedule_tail"), 10*time.Second)
	p.next()
	c.hold(p.number("proc_id_connector"), 10*time.Second) // a group id: nothing is told
	p.stage.moment.Store(&Moment{Process: Process{PID: 7}})
	c.hold(p.number("proc_id_connector"), 10*time.Second)
	if e := p.next(); e.Kind != event.ProcessCredentials || e.Fields["uid"] != int64(0) || e.Fields["old_uid"] != int64(1000) {
		t.Errorf("%+v", e)
	}
	for _, m := range []Moment{{Thread: true}, {Kernel: true}} {
		p.stage.moment.Store(&m)
		c.hold(p.number("schedule_tail"), 10*time.Second)
	}
	calls := make(chan Called, 1)
	end, err := p.w.Trace(7, func(c Called) { calls <- c })
	if err != nil {
		t.Fatal(err)
	}
	if _, err := p.w.Trace(0, nil); !errors.Is(err, ErrTraced) || p.page.u32(atTGID) != 7 {
		t.Errorf("traced twice: %v", err)
	}
	c.hold(p.number("syscall_exit_to_user_mode"), 10*time.Second)
	if got := <-calls; got.Name != "openat" {
		t.Errorf("%+v", got)
	}
	on := p.page.u64(atEnabled)
	end()
	if p.page.u64(atEnabled) != on&^(1<<p.number("syscall_exit_to_user_mode")) {
		t.Error("tracing does not end")
	}
	if len(p.told) > 0 {
		t.Errorf("a thread or a kernel thread is told of: %+v", <-p.told)
	}
	if s := p.w.State(); !strings.Contains(s, "no tcp_connect") {
		t.Errorf("what the kernel lacks is not said: %q", s)
	}
}

// TestTooLate: what is seen of a CPU that did not wait is not told, and is counted. The next one is looked at again.
func TestTooLate(t *testing.T) {
	p := newProbed(t)
	c := cpu{p.page, 0}
	p.stage.moment.Store(&Moment{Process: Process{PID: 7, Comm: "late"}})
	late := make(chan struct{})
	p.stage.late.Store(&late)
	seen := c.hold(p.number("schedule_tail"), 20*time.Millisecond)
	p.stage.late.Store(nil)
	close(late)
	if seen {
		t.Fatal("it was seen, and nobody had looked")
	}
	e := p.next()
	if e.Kind != event.ProcessMissed || e.Fields["count"] != int64(1) {
		t.Errorf("%+v", e)
	}
	if p.page.u32(atMute) == p.page.u32(atReader) {
		t.Error("the guard is still thought to be silent")
	}
	if !c.hold(p.number("schedule_tail"), 10*time.Second) {
		t.Error("nobody looks any more")
	}
	if e := p.next(); e.Kind != event.ProcessForked {
		t.Errorf("%+v", e)
	}
}

// TestBlind: a kernel that can't be understood is sampled, and the reason is said.
func TestBlind(t *testing.T) {
	p := newProbed(t)
	p.stage.blind.Store(true)
	p.w.Watch(nil, func(string) (string, bool) { return "", false }) // the sight is taken anew
	c := cpu{p.page, 0}
	for n := 0; p.w.Alive(); n++ {
		if n > maxBlind {
			t.Fatal("not given up")
		}
		c.hold(p.number("schedule_tail"), 10*time.Second)
	}
	if p.w.Alive() || p.page.u64(atEnabled) != 0 || !strings.HasPrefix(p.w.State(), "sampled: ") {
		t.Errorf("alive %v, enabled %#x, %s", p.w.Alive(), p.page.u64(atEnabled), p.w.State())
	}
}

// TestTakeOver: a CPU that was held for a dead guard is let go unseen, and the numbers of points are the page's.
func TestTakeOver(t *testing.T) {
	p := newProbed(t)
	p.stop()
	old := p.w
	left := p.page.turn(1)
	p.page.put32(left, 400|turnHeld) // asked of one that was killed
	p.page.put32(atReader, 77)
	p.page.put64(atPoint, 0x1234) // of another version of vigia
	p.start()
	if p.page.u32(left)&turnMask == turnHeld {
		t.Error("the CPU is still held")
	}
	if p.w.kinds[0] != nil || p.w.kinds[1] == nil || len(p.w.kinds) != len(old.kinds) {
		t.Errorf("points: %v", p.w.kinds)
	}
}

func TestPageRefused(t *testing.T) {
	for name, f := range map[string]*os.File{
		"short":    newPage(t, 4096, unix.F_SEAL_SHRINK),
		"not kept": newPage(t, PageSize, 0),
	} {
		if _, err := openPage(f); !errors.Is(err, ErrPage) {
			t.Errorf("%s: %v", name, err)
		}
	}
	plain, err := os.Create(t.TempDir() + "/page")
	if err != nil {
		t.Fatal(err)
	}
	defer plain.Close()
	if err := plain.Truncate(PageSize); err != nil {
		t.Fatal(err)
	}
	if _, err := openPage(plain); !errors.Is(err, ErrPage) {
		t.Errorf("a file that can be cut short: %v", err)
	}
}

// FuzzPage lets QEMU write what it likes into the page: a watcher reads it, tells and survives.
func FuzzPage(f *testing.F) {
	f.Add([]byte{}, uint64(1))
	f.Add([]byte{0, 1, 0, 0, 0, 0xff, 0xff, 0xff, 0xff}, uint64(2))
	f.Fuzz(func(t *testing.T, b []byte, seed uint64) {
		file := newPage(t, PageSize, unix.F_SEAL_SHRINK)
		p, err := openPage(file)
		if err != nil {
			t.Fatal(err)
		}
		r := rand.New(rand.NewPCG(seed, 1))
		scribble := func() {
			for i := 0; i+8 < len(b); i += 9 {
				at := (int(b[i])<<8 | int(b[i+1])) % (PageSize - 8) &^ 7
				p.put64(at, binary.LittleEndian.Uint64(b[i+1:]))
			}
			for range 20 {
				p.put32(p.turn(r.IntN(maxCPUs)), r.Uint32())
				p.put32(p.turn(r.IntN(maxCPUs))+slotPoint, r.Uint32N(80))
			}
		}
		if seed%2 == 0 {
			p.put64(atAlive, pageMagic)
			p.put32(atPoints, r.Uint32())
		}
		s := &stage{}
		s.moment.Store(&Moment{Process: Process{PID: 1}})
		w, err := NewWatcher(Options{Page: file, CPUs: 64, Symbol: symbol, Eyes: func() (Eyes, error) { return s, nil }, Emit: func(event.Kind, event.Fields) {}})
		if err != nil {
			t.Fatal(err)
		}
		w.Watch([]string{"/etc/shadow", "**"}, func(p string) (string, bool) { return p, true })
		w.page.takeOver(w.cpus)
		for range 8 {
			scribble()
			w.sweep()
			w.tend()
			w.Rebooted()
		}
		_ = unix.Munmap(p.b)
		_ = unix.Munmap(w.page.b)
	})
}

func TestAnchors(t *testing.T) {
	for path, want := range map[string]anchor{
		"/etc/shadow": {"shadow", nameIs}, "/etc/pam.d/**": {"pam.d", nameIs}, "/etc/ssh/ssh_host_**": {"ssh_host_", nameBegins},
		"**/.ssh/id_**": {".ssh", nameIs}, "/etc/cron**": {"cron", nameBegins}, "**.bashrc": {".bashrc", nameEnds}, "**": {"", nameAny},
		"/x/" + strings.Repeat("n", 100): {strings.Repeat("n", 60), nameBegins},
	} {
		if got := anchorOf(path); got != want {
			t.Errorf("%s: %+v, want %+v", path, got, want)
		}
	}
	if got := anchors([]string{"/a", "/b/a", "**"}); len(got) != 1 || got[0].how != nameAny {
		t.Errorf("a pattern that any file may fit: %v", got)
	}
}

// TestHalt: the machine is paused at the event that is waited for, and at no other; one that nobody waited for in time is said to be late.
func TestHalt(t *testing.T) {
	p := newProbed(t)
	p.stop()
	late := make(chan bool, 10)
	p.w.Halt(func(k event.Kind, f event.Fields) bool { return k == event.ProcessStarted && f["pid"] == int64(7) }, func() { late <- true })
	ctx, cancel := context.WithCancel(t.Context())
	over := make(chan struct{})
	go func() { p.w.Run(ctx); close(over) }()
	defer func() { cancel(); <-over }()
	c := cpu{p.page, 0}
	at := p.page.turn(0)
	hold := func(pid int64, point string, patience time.Duration) (pause bool) {
		p.stage.moment.Store(&Moment{Process: Process{PID: pid}})
		if !c.hold(p.number(point), patience) {
			return false
		}
		return p.page.u32(atPause) == p.page.u32(at)&^turnMask
	}
	if hold(7, "proc_exec_connector", 10*time.Second) {
		t.Error("a plugin is told to pause that can't")
	}
	p.page.put32(atPauses, 1)
	if hold(8, "proc_exec_connector", 10*time.Second) || hold(7, "schedule_tail", 10*time.Second) {
		t.Error("it is paused at another event")
	}
	if !hold(7, "proc_exec_connector", 10*time.Second) {
		t.Error("it is not paused at the event")
	}
	if hold(8, "proc_exec_connector", 10*time.Second) {
		t.Error("it is paused again at another event")
	}
	slow := make(chan struct{})
	p.stage.late.Store(&slow)
	hold(7, "proc_exec_connector", 20*time.Millisecond)
	p.stage.late.Store(nil)
	close(slow)
	select {
	case <-late:
	case <-time.After(10 * time.Second):
		t.Error("nobody is told that it was too late")
	}
}

// TestDecline: a guard that has no orders says so, and takes nothing back that was ordered.
func TestDecline(t *testing.T) {
	f := newPage(t, PageSize, unix.F_SEAL_SHRINK)
	if err := Decline(f); err != nil {
		t.Fatal(err)
	}
	p, err := openPage(f)
	if err != nil || p.u64(atMagic) != pageMagic || p.u32(atPoints) != 0 {
		t.Errorf("magic %#x, %d points, %v", p.u64(atMagic), p.u32(atPoints), err)
	}
	ordered := newProbed(t)
	if err := Decline(ordered.file); err != nil || ordered.page.u32(atPoints) == 0 {
		t.Errorf("orders are gone, %v", err)
	}
}
