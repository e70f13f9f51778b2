package volume

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"slices"
	"strconv"
	"testing"
)

const crashDisk = 5<<20 + 512

// stamped is a disk on which every write leaves its number in every sector, so that what is read after a crash tells
// which write it came from. Number 0 is zeros, 1 the layer below.
type stamped struct {
	t       *testing.T
	v       *Volume
	f       *crashFile // the overlay
	files   []chained  // it, last, and those that were frozen
	host    *host
	r       *rand.Rand
	history [crashDisk / sector][]stamp
	flushed []flushed
	next    uint32
}

// chained is a layer that is known to those who open the volume since the host's count was from.
type chained struct {
	*crashFile
	from int
}

type stamp struct {
	number uint32
	at     int // the host's count when the write began
	done   int // and when it was answered
}

// flushed is a flush that came back: what was written before the file's operation began is durable from operation done on.
type flushed struct {
	before []int // length of each sector's history when the flush began
	done   int
}

func stampWord(at int64, number uint32) []byte {
	if number == 0 {
		return make([]byte, 8)
	}
	return binary.LittleEndian.AppendUint64(nil, uint64(number)<<32|uint64(at))
}

func stampSectors(first, n int64, number uint32) []byte {
	p := make([]byte, n*sector)
	if number == 0 {
		return p
	}
	for i := range n {
		for k := range int64(sector / 8) {
			binary.LittleEndian.PutUint64(p[i*sector+8*k:], uint64(number)<<32|uint64(first+i))
		}
	}
	return p
}

// newStamped makes a disk whose lower layer has something in every other chunk.
func newStamped(t *testing.T, seed uint64) (*stamped, pages) {
	s := &stamped{t: t, r: rand.New(rand.NewPCG(seed, 7)), next: 2}
	base := newCrashFile(pages{}, 0)
	raw := make([]byte, crashDisk)
	for i := range s.history {
		number := uint32(0)
		if i/700%2 == 0 {
			number = 1
			copy(raw[i*sector:], stampSectors(int64(i), 1, 1))
		}
		s.history[i] = []stamp{{number, 0, 0}}
	}
	id, err := importRaw(base, bytes.NewReader(raw), crashDisk, nil)
	if err != nil {
		t.Fatal(err)
	}
	over := newCrashFile(pages{}, 0)
	if err := create(over, CreateOptions{Size: crashDisk, Parent: id}); err != nil {
		t.Fatal(err)
	}
	s.host = new(host)
	s.f = newCrashFile(over.now, over.size)
	s.f.host = s.host
	s.files = []chained{{s.f, 0}}
	s.v, err = open([]file{base}, s.f, Options{Boot: Boot{1}})
	if err != nil {
		t.Fatal(err)
	}
	s.v.idle = true
	s.record(0)
	return s, base.now
}

func (s *stamped) span() (first, n int64) {
	total := int64(len(s.history))
	first = s.r.Int64N(total)
	switch s.r.IntN(4) {
	case 0:
		n = 1 + s.r.Int64N(8)
	case 1:
		first, n = first/8*8, 8
	case 2:
		first, n = first/8*8, 8*(1+s.r.Int64N(16))
	default:
		n = 1 + s.r.Int64N(300)
	}
	return first, min(n, total-first)
}

func (s *stamped) put(first, n int64, number uint32, do func() error) {
	at := s.host.n
	for i := first; i < first+n; i++ {
		s.history[i] = append(s.history[i], stamp{number, at, at + 1<<30})
	}
	if err := do(); err != nil {
		s.t.Fatal(err)
	}
	for i := first; i < first+n; i++ {
		s.history[i][len(s.history[i])-1].done = s.host.n
	}
}

func (s *stamped) write() {
	first, n := s.span()
	number := s.next
	s.next++
	s.put(first, n, number, func() error {
		_, err := s.v.WriteAt(stampSectors(first, n, number), first*sector)
		return err
	})
}

func (s *stamped) zero() {
	first, n := s.span()
	s.put(first, n, 0, func() error { return s.v.WriteZeroes(first*sector, n*sector, s.r.IntN(3) == 0) })
}

func (s *stamped) trim() {
	first, n := s.span()
	from, to := (first+7)/8*8, (first+n)/8*8
	if first+n == int64(len(s.history)) {
		to = first + n
	}
	s.put(from, max(0, to-from), 0, func() error { return s.v.Trim(first*sector, n*sector) })
}

func (s *stamped) lengths() []int {
	before := make([]int, len(s.history))
	for i := range before {
		before[i] = len(s.history[i])
	}
	return before
}

func (s *stamped) record(done int) {
	s.flushed = append(s.flushed, flushed{s.lengths(), done})
}

// flush flushes, and in one case of three other writes happen while it waits for the disk.
func (s *stamped) flush() {
	before := s.lengths()
	s.f.onSync = nil
	if s.r.IntN(3) == 0 {
		s.f.onSync = func() { s.change() }
	}
	if err := s.v.Flush(); err != nil {
		s.t.Fatal(err)
	}
	s.f.onSync = nil
	s.flushed = append(s.flushed, flushed{before, s.host.n})
}

// swap puts a new overlay on top. Other writes happen before the old one is frozen, by the next flush, and while it waits for the disk.
func (s *stamped) swap() {
	f := newCrashFile(pages{}, 0)
	f.host = s.host
	if err := create(f, CreateOptions{Size: crashDisk, Parent: s.v.ID()}); err != nil {
		s.t.Fatal(err)
	}
	n, err := s.v.prepare(f)
	if err != nil {
		s.t.Fatal(err)
	}
	s.files = append(s.files, chained{f, s.host.n})
	for range s.r.IntN(3) {
		s.change()
	}
	if _, _, err := s.v.Swap(n); err != nil {
		s.t.Fatal(err)
	}
	s.f.onSync = func() { s.change() }
	s.f = f
	for range s.r.IntN(6) {
		s.change()
	}
}

func (s *stamped) change() {
	switch s.r.IntN(8) {
	case 0:
		s.trim()
	case 1:
		s.zero()
	default:
		s.write()
	}
}

// verify reads a disk found after a crash at operation k. If only the process was killed, everything that was answered
// has to be there, flushed or not: what the guest wrote last, but for the one write that was under way.
func (s *stamped) verify(v *Volume, k int, killed bool) error {
	var last flushed
	for _, f := range s.flushed {
		if f.done <= k {
			last = f
		}
	}
	p := make([]byte, crashDisk)
	if _, err := v.ReadAt(p, 0); err != nil {
		return err
	}
	for i, h := range s.history {
		got := binary.LittleEndian.Uint64(p[i*sector:])
		number := uint32(got >> 32)
		if !uniformWords(p[i*sector:(i+1)*sector], stampWord(int64(i), number)) {
			return fmt.Errorf("sector %d is torn", i)
		}
		from := last.before[i] - 1
		if killed {
			for from+1 < len(h) && h[from+1].done <= k {
				from++
			}
		}
		ok := h[from].number == number
		for j := from + 1; j < len(h) && h[j].at < k; j++ {
			ok = ok || h[j].number == number
		}
		if !ok {
			return fmt.Errorf("sector %d holds write %d, flushed was %d", i, number, h[last.before[i]-1].number)
		}
	}
	return nil
}

// uniformWords says that p is nothing but the eight bytes of w again and again.
func uniformWords(p, w []byte) bool {
	return bytes.Equal(p[:8], w) && bytes.Equal(p[8:], p[:len(p)-8])
}

// crashAt plays a crash of all files when the host's count was t, with or without loss of what was not synced.
func (s *stamped) crashAt(base pages, baseSize int64, t int, tear *rand.Rand) error {
	chain := []*crashFile{newCrashFile(base, baseSize)}
	for _, f := range s.files {
		if f.from > t {
			break
		}
		disk := f.after(f.until(t), tear)
		rep, err := Check(disk, f.size)
		if err != nil || !rep.Sound() {
			return errors.Join(err, fmt.Errorf("check: %v", rep.Damage))
		}
		chain = append(chain, newCrashFile(disk, f.size))
	}
	if err := checkAll(chain); err != nil {
		return err
	}
	boot := Boot{1}
	if tear != nil {
		boot = Boot{2} // after a power cut
	}
	v, err := openAll(chain, Options{Boot: boot})
	if err != nil {
		return err
	}
	if err := s.verify(v, t, tear == nil); err != nil {
		return err
	}
	return s.goOn(v, chain)
}

func checkAll(chain []*crashFile) error {
	var reps []Report
	for _, f := range chain {
		rep, err := Check(f.now, f.size)
		if err != nil {
			return err
		}
		reps = append(reps, rep)
	}
	CheckChain(reps)
	for i, rep := range reps {
		if !rep.Sound() {
			return fmt.Errorf("check of the chain: layer %d: %v", i, rep.Damage)
		}
	}
	return nil
}

// openAll opens a chain whose topmost layer may have been frozen.
func openAll(chain []*crashFile, o Options) (*Volume, error) {
	var layers []file
	for _, f := range chain {
		layers = append(layers, f)
	}
	k := len(layers) - 1
	v, err := open(layers[:k], layers[k], o)
	if errors.Is(err, ErrFrozen) {
		return open(layers, nil, o)
	}
	return v, err
}

// goOn makes sure that what was found can be worked with: a write, a flush, and everything as before after another power cut.
func (s *stamped) goOn(v *Volume, chain []*crashFile) error {
	if v.ReadOnly() {
		return nil
	}
	before, after := make([]byte, crashDisk), make([]byte, crashDisk)
	mark := pattern(BlockSize, 9)
	if _, err := v.WriteAt(mark, 5*BlockSize); err != nil {
		return err
	}
	v.ReadAt(before, 0)
	if err := v.Flush(); err != nil {
		return err
	}
	for i, f := range chain {
		chain[i] = newCrashFile(f.after(f.done(), rand.New(rand.NewPCG(1, 1))), f.size)
		if rep, err := Check(chain[i].now, f.size); i < len(chain)-1 && (err != nil || !rep.Frozen) {
			return fmt.Errorf("flushed, but layer %d below is not frozen: %v", i, err)
		}
	}
	again, err := openAll(chain, Options{})
	if err != nil {
		return fmt.Errorf("opened, written, flushed, then: %w", err)
	}
	again.ReadAt(after, 0)
	if string(before) != string(after) {
		return errors.New("a flush after the crash did not hold")
	}
	return nil
}

// crashPoints is how many crashes are played: VIGIA_SOAK=2000 for a night.
func crashPoints() int {
	if n, err := strconv.Atoi(os.Getenv("VIGIA_SOAK")); err == nil {
		return n
	}
	return 200
}

func TestPowerCut(t *testing.T) {
	points := crashPoints()
	runs := 1 + points/400
	for run := range runs {
		t.Run(strconv.Itoa(run), func(t *testing.T) {
			t.Parallel()
			powerCut(t, uint64(run), points/runs)
		})
	}
}

// folds is when maps and headers were written, so that half of the crashes can fall there.
func (s *stamped) folds() (at []int) {
	g := geometryOf(crashDisk)
	for _, f := range s.files {
		for _, o := range f.ops {
			if !o.sync && (o.off < g.logOff || o.off >= g.mapOff[0] && o.off < g.liveOff) {
				at = append(at, o.at)
			}
		}
	}
	return at
}

// live is everything a machine does to its disk: flushes until the log was folded, swaps, and a freeze in the end. It says when
// the swaps began.
func (s *stamped) live() (swaps int) {
	busy := func(n int) {
		for range n {
			for range s.r.IntN(4) {
				s.change()
			}
			s.flush()
		}
	}
	for busy(300); s.v.Stats().Checkpoints == 0; {
		busy(1)
	}
	busy(20)
	swaps = s.host.n
	for range 5 {
		s.swap()
		busy(s.r.IntN(6))
	}
	for range 5 {
		s.change()
	}
	if _, err := s.v.Freeze(); err != nil {
		s.t.Fatal(err)
	}
	s.record(s.host.n)
	return swaps
}

func powerCut(t *testing.T, seed uint64, points int) {
	s, base := newStamped(t, seed)
	baseSize := geometryOf(crashDisk).fileSize(crashDisk)
	swaps, folds := s.live(), s.folds()
	at := make([]int, points)
	for i := range at {
		switch i % 4 {
		case 0:
			at[i] = 1 + s.r.IntN(s.host.n)
		case 1:
			at[i] = swaps + s.r.IntN(s.host.n-swaps+1)
		default:
			at[i] = max(1, min(folds[s.r.IntN(len(folds))]+s.r.IntN(4), s.host.n))
		}
	}
	slices.Sort(at)
	for i, k := range at {
		tear := rand.New(rand.NewPCG(seed, uint64(i)))
		if i%5 == 0 {
			tear = nil
		}
		if err := s.crashAt(base, baseSize, k, tear); err != nil {
			t.Fatalf("seed %d, crash %d at %d of %d: %v", seed, i, k, s.host.n, err)
		}
	}
}
