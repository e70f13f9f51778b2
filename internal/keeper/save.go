package keeper

import (
	"errors"
	"fmt"
	"os"
	"runtime"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"vigia/internal/checkpoint/page"
	"vigia/internal/checkpoint/protect"
)

const (
	runPages = 16   // read, and let go, at once
	waiting  = 1024 // runs that wait to be written: 64 MiB. Then the guest waits
	packers  = 2    // goroutines that compress
	// packerNice is the nice value of who hashes and compresses: a tenth of a guest's share where they want the same processor.
	packerNice = 10
	// protectStep is how much memory is protected at once while the guest runs, in bytes: it is held up meanwhile.
	protectStep = 8 << 20
	// hotPages is how many of the pages that a guest writes right after it goes on are copied while it stands still, and not
	// protected: 1 to 2 ms, and as many waits fewer. earlyFaults is how many first ones after an instant are taken for such.
	hotPages    = 1024
	earlyFaults = 512
	// startLater leaves the processors to the guest for a moment, when it goes on.
	startLater = 5 * time.Millisecond
)

// saver takes a machine's memory, again and again.
//
// With protection the instant is [saver.arm]: all pages that may have changed since the last time are protected, and are
// pending. Two copy them: a goroutine, in order, and the thread that is told of writes, which copies what is about to be
// written first. A page is copied by whoever comes first, under mu, while it is protected. The protection of a page that
// nobody writes stays: what is written until the next time is known, and only that is read then.
type saver struct {
	mem  memory
	prot *protect.Memory // nil: memory is copied while the guest stands still

	mu       sync.Mutex
	dirty    bitmap // not protected: written since the last arm
	prepared bool   // memory was protected a first time
	unsure   bool   // what was written since the last checkpoint is not known: every page counts
	pending  bitmap // of the checkpoint being taken: not yet copied
	active   bool   // a checkpoint is being taken
	hand     sync.WaitGroup

	known  *page.Known // of the last checkpoint
	last   page.ID
	job    *job
	next   uint64 // where a guest that writes in order will write next
	stride uint64
	hot    []uint64 // pages that were written early after an instant, the oldest first
	early  int      // faults since the last instant, up to earlyFaults
	faults int64
}

// job is one checkpoint being taken.
type job struct {
	id     page.ID
	out    *os.File
	writer *page.Writer
	src    memory // where pending pages are read
	queue  chan run
	done   chan struct{} // closed once stats or err are there
	stats  page.Stats
	err    error
	armed  bool
	hot    []run // copied at the instant
}

// run is some pages as they were at the instant; without data, zeros.
type run struct {
	first uint64
	n     uint64
	data  []byte
}

func newSaver(mem memory, prot *protect.Memory) *saver {
	s := &saver{mem: mem, prot: prot, dirty: newBitmap(mem.pages), pending: newBitmap(mem.pages), unsure: true, stride: 1}
	s.dirty.fill(mem.pages)
	if prot != nil {
		go prot.Serve(s.fault)
	}
	return s
}

// begin prepares a checkpoint while the guest still runs. It takes out over.
func (s *saver) begin(out *os.File, id, parent page.ID) error {
	w, err := s.open(out, id, parent)
	if err != nil {
		out.Close()
		return err
	}
	s.mu.Lock()
	s.job = &job{id: id, out: out, writer: w, src: s.mem, queue: make(chan run, waiting), done: make(chan struct{})}
	first := s.prot != nil && !s.prepared
	s.prepared = true
	s.mu.Unlock()
	if first {
		if err := s.prepare(); err != nil {
			s.abort()
			return err
		}
	}
	return nil
}

// current is the checkpoint being taken.
func (s *saver) current() *job {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.job
}

func (s *saver) open(out *os.File, id, parent page.ID) (*page.Writer, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	switch {
	case s.job != nil:
		return nil, errors.New("a checkpoint is being taken already")
	case parent == page.ID{}:
		s.known, s.unsure = page.NewKnown(s.mem.pages), true
	case s.known == nil || s.last != parent:
		return nil, fmt.Errorf("the last checkpoint known here is %x, not %x", s.last, parent)
	}
	return page.NewWriter(out, s.mem.pages, id, parent, s.known, packers, standBack)
}

// prepare protects memory for the first time, while the guest runs: page tables are made now, and not in the pause.
func (s *saver) prepare() error {
	for off := uint64(0); off < s.mem.pages*page.Size; off += protectStep {
		n := min(protectStep, s.mem.pages*page.Size-off)
		s.mu.Lock()
		err := s.prot.Protect(off, n)
		for p := off / page.Size; p < (off+n)/page.Size && err == nil; p++ {
			s.dirty.del(p)
		}
		s.mu.Unlock()
		if err != nil {
			return fmt.Errorf("protect memory: %w", err)
		}
	}
	return nil
}

// arm is called while the guest stands still: memory is taken as it is now.
func (s *saver) arm() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	j := s.job
	if j == nil || j.armed {
		return errors.New("no checkpoint is being taken")
	}
	if s.prot == nil {
		f, err := s.copyAll()
		if err != nil {
			return fmt.Errorf("copy memory: %w", err)
		}
		j.src = memory{r: f, file: f, pages: s.mem.pages}
		s.pending.fill(s.mem.pages)
	} else if err := s.protectDirty(); err != nil {
		return err
	}
	j.armed, s.active = true, true
	go s.complete(j)
	return nil
}

// protectDirty protects what was written, and makes it pending.
func (s *saver) protectDirty() error {
	copy(s.pending, s.dirty)
	if s.unsure {
		s.pending.fill(s.mem.pages)
	}
	hot := s.takeHot()
	for p, n := s.dirty.next(0, ^uint64(0)); n > 0; p, n = s.dirty.next(p+n, ^uint64(0)) {
		if err := s.prot.Protect(p*page.Size, n*page.Size); err != nil {
			return fmt.Errorf("protect memory: %w", err)
		}
	}
	clear(s.dirty)
	for _, p := range hot {
		s.dirty.add(p)
	}
	return nil
}

// takeHot copies the pages that will be written first, and takes them out of what is to be protected: they stay as if written.
// The caller holds mu.
func (s *saver) takeHot() (left []uint64) {
	if n := len(s.hot); n > hotPages {
		s.hot = append([]uint64(nil), s.hot[n-hotPages:]...)
	}
	for _, p := range s.hot {
		if !s.dirty.has(p) || !s.pending.has(p) {
			continue // protected still, or named twice
		}
		s.job.hot = append(s.job.hot, s.take(p, 1))
		s.dirty.del(p)
		left = append(left, p)
	}
	s.hot, s.early = append([]uint64(nil), left...), 0
	return left
}

// copyAll copies memory into a file of its own. It is the way of a host that refuses protection.
func (s *saver) copyAll() (*os.File, error) {
	fd, err := unix.MemfdCreate("memory", unix.MFD_CLOEXEC)
	if err != nil {
		return nil, err
	}
	f := os.NewFile(uintptr(fd), "memory")
	if err := f.Truncate(int64(s.mem.pages) * page.Size); err != nil {
		f.Close()
		return nil, err
	}
	buf := make([]byte, 1<<20)
	for first, n := s.mem.data(0); n > 0; first, n = s.mem.data(first + n) {
		n = min(n, uint64(len(buf))/page.Size)
		b := buf[:n*page.Size]
		if err = s.mem.read(first, b); err == nil {
			_, err = f.WriteAt(b, int64(first)*page.Size)
		}
		if err != nil {
			f.Close()
			return nil, err
		}
	}
	return f, nil
}

// fault is told that the guest waits to write a page.
func (s *saver) fault(off uint64) {
	p := off / page.Size
	s.mu.Lock()
	s.faults++
	if s.early < earlyFaults {
		s.early++
		s.hot = append(s.hot, p)
	}
	first, n := p, s.reach(p)
	var taken []run
	for q := first; q < first+n; {
		if !s.active || !s.pending.has(q) {
			q++
			continue
		}
		_, k := s.pending.next(q, first+n-q)
		taken = append(taken, s.take(q, k))
		q += k
	}
	for q := first; q < first+n; q++ {
		s.dirty.add(q)
	}
	s.prot.Lift(first*page.Size, n*page.Size) // under mu: arm must not come between
	j := s.job
	if len(taken) > 0 {
		s.hand.Add(1)
		defer s.hand.Done()
	}
	s.mu.Unlock()
	for _, r := range taken {
		j.queue <- r
	}
}

// reach is how many pages are let go at once: more and more while a guest writes in order. The caller holds mu.
func (s *saver) reach(p uint64) uint64 {
	if p == s.next {
		s.stride = min(2*s.stride, runPages)
	} else {
		s.stride = max(1, s.stride/2)
	}
	n := uint64(1)
	for n < s.stride && p+n < s.mem.pages && !s.dirty.has(p+n) {
		n++
	}
	s.next = p + n
	return n
}

// take copies pending pages. The caller holds mu.
func (s *saver) take(first, n uint64) run {
	r := run{first: first, n: n, data: make([]byte, n*page.Size)}
	if err := s.job.src.read(first, r.data); err != nil && s.job.err == nil {
		s.job.err = fmt.Errorf("read memory: %w", err)
	}
	for q := first; q < first+n; q++ {
		s.pending.del(q)
	}
	return r
}

// complete copies and writes all that the instant holds, and waits for the disk.
func (s *saver) complete(j *job) {
	time.Sleep(startLater)
	written := make(chan struct{})
	go func() {
		defer close(written)
		standBack()
		j.collect()
	}()
	for _, r := range j.hot {
		j.queue <- r
	}
	s.sweep(j)
	s.mu.Lock()
	s.active = false
	s.mu.Unlock()
	s.hand.Wait()
	close(j.queue)
	<-written
	if j.src.file != s.mem.file {
		j.src.file.Close()
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.job = nil; j.err != nil {
		s.lost()
	} else {
		s.last, s.unsure = j.id, s.prot == nil
	}
	close(j.done)
}

// standBack makes the thread of a goroutine, which ends with it, one that yields to the guest's: what is copied can wait to be packed, and on two
// processors a guest that goes on after an instant would share them with all who pack.
func standBack() {
	runtime.LockOSThread()
	unix.Setpriority(unix.PRIO_PROCESS, 0, packerNice) // refused: they are as quick as others
}

// finish waits until everything is written and on the disk.
func (j *job) finish() (page.Stats, error) {
	<-j.done
	return j.stats, j.err
}

// sweep copies what is pending, in order.
func (s *saver) sweep(j *job) {
	for p := uint64(0); p < s.mem.pages; {
		from, n := j.src.data(p)
		s.gaps(j, p, from)
		for p = from; p < from+n; {
			s.mu.Lock()
			q, k := s.pending.next(p, runPages)
			if k = min(k, max(from+n, q)-q); k > 0 {
				r := s.take(q, k)
				s.mu.Unlock()
				j.queue <- r
			} else {
				s.mu.Unlock()
				q = from + n
			}
			p = q + k
		}
	}
}

// gaps gives pending pages that nobody has ever written as the zeros they are. One that was written just now is not pending
// any more: its zeros were taken.
func (s *saver) gaps(j *job, from, to uint64) {
	var found []run
	s.mu.Lock()
	for p, n := s.pending.next(from, to-from); n > 0 && p < to; p, n = s.pending.next(p+n, to-from) {
		n = min(n, to-p)
		for q := p; q < p+n; q++ {
			s.pending.del(q)
		}
		found = append(found, run{first: p, n: n})
	}
	s.mu.Unlock()
	for _, r := range found {
		j.queue <- r
	}
}

// collect writes what is copied, until the queue is closed.
func (j *job) collect() {
	for r := range j.queue {
		for i := range r.n {
			if r.data == nil {
				j.writer.Zero(uint32(r.first + i))
			} else {
				j.writer.Page(uint32(r.first+i), r.data[i*page.Size:(i+1)*page.Size])
			}
		}
	}
	stats, err := j.writer.Finish()
	if err == nil {
		err = j.out.Sync()
	}
	j.out.Close()
	if j.stats = stats; j.err == nil {
		j.err = err
	}
}

// abort gives a checkpoint up. Of one that is armed some pages are gone already: the rest goes too.
func (s *saver) abort() {
	s.mu.Lock()
	j := s.job
	armed := j != nil && j.armed
	s.mu.Unlock()
	switch {
	case armed:
		j.finish()
	case j != nil:
		j.writer.Abort()
		j.out.Close()
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.job = nil
	s.lost()
}

// lost: what was written since the last good checkpoint is not known any more, nor what that one holds. The caller holds mu.
func (s *saver) lost() {
	s.unsure, s.active, s.known, s.last = true, false, nil, page.ID{}
}

// adopt learns from a chain what the last checkpoint holds.
func (s *saver) adopt(c page.Chain) error {
	known, err := c.Known()
	if err != nil {
		return err
	}
	if c[0].Pages() != s.mem.pages {
		return fmt.Errorf("%w: a checkpoint of %d pages for a machine of %d", page.ErrChain, c[0].Pages(), s.mem.pages)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.known, s.last, s.unsure = known, c[len(c)-1].ID(), true
	return nil
}
