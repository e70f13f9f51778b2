package probe

import (
	"errors"
	"fmt"
	"os"
	"sync/atomic"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// The page that guard and plugin share: struct orders in its first half, which the guard writes, struct tidings in the other
// (plugin/probe.c), and the ring of copies behind them. QEMU may be its guest's: whatever stands in the page may be a lie at any time, so that every number taken
// from it is checked once taken, and nothing that the guard has written is believed to be there still.
const (
	PageSize = 2*half + ringSize
	half     = 1 << 15
	ringSize = 1 << 20

	pageMagic = 0x32626f7270676976 // "vigprob2"

	atMagic, atPoints, atReader         = 0, 8, 12
	atEnabled, atFiltered, atTraced     = 16, 24, 32
	atSlide, atStart                    = 40, 48
	atPatience, atSpin, atNames, atTGID = 56, 60, 64, 68
	atNameData, atDentry, atParent      = 72, 76, 80
	atName, atNameLen, atTaskTGID       = 84, 88, 92
	atPoint, atCurrent, atFilter        = 96, 608, 1120
	atCopied, atTail                    = 9312, 9320
	atMount, atAbove, atOn, atRoot      = 9328, 9332, 9336, 9340
	atRecipe, atPause                   = 9344, 10368

	tidings                  = half
	atAlive, atAPI, atReads  = tidings, tidings + 8, tidings + 12
	atBell, atAsleep, atMute = tidings + 24, tidings + 28, tidings + 32
	atHead, atPauses         = tidings + 40, tidings + 48
	atSlot, slotSize         = tidings + 64, 64
	slotPoint, slotLost      = 4, 8

	maxPoints  = 64
	maxCPUs    = 64
	maxNames   = 128
	nameSize   = 64
	maxNameLen = 60

	slideUnknown = ^uint64(0)

	// patience is how long a virtual CPU waits for a guard that says nothing: once, then not at all.
	patience = 250 * time.Millisecond
	spin     = 300
)

// Whose turn it is in a slot.
const (
	turnIdle = iota
	turnHeld
	turnSeen
	turnGone
	turnMask = 3
)

// ErrPage is wrapped where what was handed over can't be the page.
var ErrPage = errors.New("not a probe's page")

// page is the mapping.
type page struct{ b []byte }

// openPage maps the page. A file that could be cut short is refused: a read would then end this process.
func openPage(f *os.File) (*page, error) {
	st, err := f.Stat()
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrPage, err)
	}
	seals, err := unix.FcntlInt(f.Fd(), unix.F_GET_SEALS, 0)
	if err != nil || st.Size() != PageSize || seals&unix.F_SEAL_SHRINK == 0 {
		return nil, fmt.Errorf("%w: %d bytes, seals %#x", ErrPage, st.Size(), seals)
	}
	b, err := unix.Mmap(int(f.Fd()), 0, PageSize, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrPage, err)
	}
	return &page{b}, nil
}

func (p *page) word(at int) *uint32 { return (*uint32)(unsafe.Pointer(&p.b[at])) }
func (p *page) long(at int) *uint64 { return (*uint64)(unsafe.Pointer(&p.b[at])) }

func (p *page) u32(at int) uint32         { return atomic.LoadUint32(p.word(at)) }
func (p *page) u64(at int) uint64         { return atomic.LoadUint64(p.long(at)) }
func (p *page) put32(at int, v uint32)    { atomic.StoreUint32(p.word(at), v) }
func (p *page) put64(at int, v uint64)    { atomic.StoreUint64(p.long(at), v) }
func (p *page) turn(cpu int) int          { return atSlot + cpu*slotSize }
func (p *page) lost(cpu int) uint64       { return p.u64(atSlot + cpu*slotSize + slotLost) }
func (p *page) pointOf(cpu int) uint32    { return p.u32(atSlot + cpu*slotSize + slotPoint) }
func (p *page) enabled(bits uint64)       { p.put64(atEnabled, bits) }
func (p *page) current(cpu int, v uint64) { p.put64(atCurrent+8*cpu, v) }

// alive says that the plugin has taken the page up, and reads whether it can tell the files that matter.
func (p *page) alive() bool { return p.u64(atAlive) == pageMagic }
func (p *page) reads() bool { return p.u32(atReads) != 0 }

// Decline tells a plugin that nobody will ask it for anything: orders that came when the guest runs would be taken for what is translated from
// then on only.
func Decline(f *os.File) error {
	p, err := openPage(f)
	if err != nil {
		return err
	}
	defer unix.Munmap(p.b)
	if p.u64(atMagic) == 0 {
		p.prepare(nil, ^uint64(0))
	}
	return nil
}

// pauses says that the plugin can have the machine paused where it holds a CPU.
func (p *page) pauses() bool { return p.u32(atPauses) != 0 }

// prepare writes the addresses that the plugin looks for; it takes them once, before the guest's first instruction.
func (p *page) prepare(points []uint64, start uint64) {
	for i, link := range points {
		p.put64(atPoint+8*i, link)
	}
	p.put32(atPoints, uint32(len(points)))
	p.put64(atStart, start)
	p.put32(atPatience, uint32(patience.Microseconds()))
	p.put32(atSpin, spin)
	p.put64(atSlide, slideUnknown)
	p.put64(atMagic, pageMagic)
}

// takeOver makes this process the reader. What was asked of the one before is let go unseen: the CPU may have waited
// long enough and gone on, and then what can be seen belongs to something else.
func (p *page) takeOver(cpus int) {
	for cpu := range cpus {
		if at := p.turn(cpu); p.u32(at)&turnMask == turnHeld {
			p.release(at, p.u32(at))
		}
	}
	p.newReader()
}

// newReader gives the reader a number of which nobody thinks that it is silent.
func (p *page) newReader() {
	n := p.u32(atReader)
	for n++; n == 0 || n == p.u32(atMute); n++ {
	}
	p.put32(atReader, n)
}

// release lets a held CPU go. It reports whether the CPU was held until now: only then has what was seen belonged together.
func (p *page) release(at int, held uint32) bool {
	if !atomic.CompareAndSwapUint32(p.word(at), held, held&^turnMask|turnSeen) {
		return false
	}
	futexWake(p.word(at))
	return true
}

// ring wakes the reader, as a plugin would.
func (p *page) ring() {
	atomic.AddUint32(p.word(atBell), 1)
	futexWake(p.word(atBell))
}

// How a reader sleeps: so that any hit wakes it, or only a CPU that is held, and a ring that fills.
const (
	sound = 1
	doze  = 2
)

// rings waits for a hit, a little while at most.
func (p *page) rings(how, last uint32, most time.Duration) {
	p.put32(atAsleep, how)
	if p.u32(atBell) == last && (how == doze || p.u64(atHead) == p.u64(atTail)) {
		futexWait(p.word(atBell), last, most)
	}
	p.put32(atAsleep, 0)
}

// A futex in a file's mapping is shared by all who map it (futex(2)).
const futexOpWait, futexOpWake = 0, 1

func futexWait(word *uint32, value uint32, most time.Duration) {
	t := unix.NsecToTimespec(int64(most))
	unix.Syscall6(unix.SYS_FUTEX, uintptr(unsafe.Pointer(word)), futexOpWait, uintptr(value), uintptr(unsafe.Pointer(&t)), 0, 0)
}

func futexWake(word *uint32) {
	unix.Syscall6(unix.SYS_FUTEX, uintptr(unsafe.Pointer(word)), futexOpWake, 1, 0, 0, 0)
}
