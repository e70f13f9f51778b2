package probe

import (
	"encoding/binary"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"vigia/internal/event"
	"vigia/internal/memory"
)

// give puts a copy of the 8 bytes at task into the ring, as probe.c does: false where there is no room.
func (c cpu) give(point uint32, task, value uint64, pad int) bool {
	b := make([]byte, copyHead, copyHead+64)
	b = binary.LittleEndian.AppendUint64(b, task)
	b = binary.LittleEndian.AppendUint32(b, 8)
	b = append(b, 0, 0, 0, 0)
	b = binary.LittleEndian.AppendUint64(b, value)
	for range pad {
		b = binary.LittleEndian.AppendUint64(b, 0)
		b = binary.LittleEndian.AppendUint64(b, 0)
	}
	binary.LittleEndian.PutUint32(b, uint32(len(b)))
	binary.LittleEndian.PutUint16(b[4:], uint16(point))
	binary.LittleEndian.PutUint16(b[6:], uint16(c.n))
	binary.LittleEndian.PutUint64(b[8:], task)
	head, skip := c.p.u64(atHead), 0
	left := ringSize - int(head%ringSize)
	if left < len(b) {
		skip = left
	}
	if head-c.p.u64(atTail)+uint64(skip+len(b)) > ringSize {
		return false
	}
	if skip > 0 {
		c.p.put64(2*half+int(head%ringSize), uint64(skip)|copySkip<<32)
		head += uint64(skip)
	}
	copy(c.p.b[2*half+int(head%ringSize):], b)
	c.p.put64(atHead, head+uint64(len(b)))
	if c.p.u32(atAsleep) == sound {
		c.p.ring()
	}
	return true
}

// TestCopies: what was copied is told in its order, many times around the ring, while no CPU waits; and before what a CPU is held for.
func TestCopies(t *testing.T) {
	p := newProbed(t)
	c := cpu{p.page, 1}
	forked := p.number("schedule_tail")
	if p.page.u64(atCopied)>>forked&1 != 0 {
		t.Error("it is copied before anybody knows how")
	}
	p.stage.moment.Store(&Moment{Process: Process{PID: 7, Comm: "held"}})
	c.hold(forked, 10*time.Second)
	if e := p.next(); e.Fields["comm"] != "held" {
		t.Errorf("%+v", e)
	}
	if p.page.u64(atCopied)>>forked&1 != 1 || p.page.u64(atCopied)>>p.number("do_init_module")&1 != 0 {
		t.Errorf("copied: %b", p.page.u64(atCopied))
	}
	const many = 3 * ringSize / 2000
	go func() {
		for n := range uint64(many) {
			for !c.give(forked, 0xffff888000000000+n, n, 120) {
				time.Sleep(time.Millisecond)
			}
		}
	}()
	for n := range many {
		if e := p.next(); e.Kind != event.ProcessForked || e.Fields["pid"] != int64(n) || e.Fields["comm"] != "copied" {
			t.Fatalf("the %d.: %+v", n, e)
		}
	}
	before := p.w.heard.Load()
	c.give(forked, 0xffff888000000000, 5, 0)
	c.hold(p.number("do_init_module"), 10*time.Second)
	if e := p.next(); e.Kind != event.ProcessForked {
		t.Errorf("held for before copied: %+v", e)
	}
	if e := p.next(); e.Kind != event.ModuleLoaded || p.w.heard.Load() != before+1 {
		t.Errorf("%+v, %d heard", e, p.w.heard.Load()-before)
	}
}

// TestCopiesOutliveTheGuard: what was copied while nobody read is told by the next guard.
func TestCopiesOutliveTheGuard(t *testing.T) {
	p := newProbed(t)
	p.stop()
	c := cpu{p.page, 0}
	if !c.give(p.number("proc_exec_connector"), 0xffff888000000000, 9, 0) || !c.give(p.number("schedule_tail"), 0xffff888000000000, 10, 0) {
		t.Fatal("no room")
	}
	p.start()
	for _, want := range []event.Event{{Kind: event.ProcessStarted, Fields: event.Fields{"pid": int64(9)}}, {Kind: event.ProcessForked, Fields: event.Fields{"pid": int64(10)}}} {
		if e := p.next(); e.Kind != want.Kind || e.Fields["pid"] != want.Fields["pid"] {
			t.Errorf("%+v, want %+v", e, want)
		}
	}
}

// TestTornRing: a ring that makes no sense is passed over, and said to be missed; what comes after it is told.
func TestTornRing(t *testing.T) {
	p := newProbed(t)
	c := cpu{p.page, 0}
	forked := p.number("schedule_tail")
	p.page.put64(2*half, 0)
	p.page.put64(atHead, 64)
	p.page.ring()
	e := p.next()
	if e.Kind != event.ProcessMissed || e.Fields["count"] != int64(1) {
		t.Errorf("%+v", e)
	}
	c.give(forked, 0xffff888000000000, 11, 0)
	if e := p.next(); e.Fields["pid"] != int64(11) {
		t.Errorf("%+v", e)
	}
}

// FuzzRing reads a ring that QEMU filled with what it liked: it ends, and never reads beyond.
func FuzzRing(f *testing.F) {
	f.Add(uint64(0), uint64(32), []byte{32, 0, 0, 0, 1, 0, 0, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 9, 9, 9, 9, 9, 9, 9, 0, 0, 0, 0, 0, 0, 0, 0})
	f.Add(uint64(ringSize-8), uint64(ringSize+8), []byte{8, 0, 0, 0, 0xff, 0xff, 0, 0})
	file := newPage(f, PageSize, unix.F_SEAL_SHRINK)
	p, err := openPage(file)
	if err != nil {
		f.Fatal(err)
	}
	f.Fuzz(func(t *testing.T, tail, head uint64, b []byte) {
		at := int(tail % ringSize)
		copy(p.b[2*half+at:], b)
		if head-tail < ringSize && len(b) > 0 {
			for i := at; i < at+int(head-tail) && i < ringSize; i += len(b) {
				copy(p.b[2*half+i:], b)
			}
		}
		p.put64(atTail, tail)
		p.put64(atHead, head)
		var buf [memory.MaxCopy]byte
		for n := 0; ; n++ {
			_, more, _ := p.next(buf[:])
			if !more {
				break
			}
			if n > ringSize/8 {
				t.Fatal("it does not end")
			}
		}
	})
}
