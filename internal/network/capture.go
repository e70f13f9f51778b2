package network

import (
	"errors"
	"io"
	"sync"
	"sync/atomic"
	"time"

	"github.com/gopacket/gopacket"
	"github.com/gopacket/gopacket/layers"
	"github.com/gopacket/gopacket/pcapgo"
)

// A capture is a pcapng stream of the frames as they passed, and of those that a quarantine dropped. The frame loop copies each into
// a bounded queue; a goroutine writes them out. A slow file loses frames, counted, but delays none.

type direction bool

const (
	fromGuest direction = false
	toGuest   direction = true
)

// CaptureOptions bound a capture. Zero fields: whole frames, no limit of bytes.
type CaptureOptions struct {
	SnapLength int   // bytes kept of each frame
	MaxBytes   int64 // of frames; then the capture ends by itself
}

// CaptureStats is what the current or last capture did.
type CaptureStats struct {
	On      bool
	Frames  int64
	Bytes   int64
	Dropped int64 // frames for which the queue had no room, or that came after MaxBytes or a write error
	Error   error // the write that failed
}

// captureQueue is how many bytes may wait for the file.
const captureQueue = 1 << 20

// taps holds the capture, if there is one.
type taps struct {
	current atomic.Pointer[capture]
	mu      sync.Mutex                   // one switch at a time
	last    atomic.Pointer[CaptureStats] // of the one that ended
}

type capture struct {
	opt  CaptureOptions
	file io.Writer
	mu   sync.Mutex
	wake sync.Cond
	// queue holds frames not yet written; bytes is their sum.
	queue []captured
	bytes int
	ended bool
	stats CaptureStats
	done  chan struct{}
}

type captured struct {
	at     time.Time
	dir    direction
	length int
	data   []byte
}

// Capture starts a capture into w, ending the one before; a nil w only ends it. It returns what the ended one did, when
// all of it has been written, or the writer has been stuck for captureStuck. A writer with SetWriteDeadline (a pipe, a socket) is
// then told to give up.
func (n *Network) Capture(w io.Writer, opt CaptureOptions) (CaptureStats, error) {
	n.taps.mu.Lock()
	defer n.taps.mu.Unlock()
	last := n.taps.end()
	if w == nil {
		return last, nil
	}
	out, err := newPcap(w, opt)
	if err != nil {
		return last, err
	}
	c := &capture{opt: opt, file: w, done: make(chan struct{})}
	c.wake.L = &c.mu
	c.stats.On = true
	go c.run(out)
	n.taps.current.Store(c)
	if n.ctx.Err() != nil { // Close may not have seen it
		return n.taps.end(), ErrClosed
	}
	return last, nil
}

func newPcap(w io.Writer, opt CaptureOptions) (*pcapgo.NgWriter, error) {
	i := pcapgo.NgInterface{Name: "machine", LinkType: layers.LinkTypeEthernet, TimestampResolution: 9, SnapLength: uint32(max(opt.SnapLength, 0))}
	out, err := pcapgo.NewNgWriterInterface(w, i, pcapgo.NgWriterOptions{SectionInfo: pcapgo.NgSectionInfo{Application: "vigia"}})
	if err != nil {
		return nil, err
	}
	return out, out.Flush()
}

func (t *taps) active() bool { return t.current.Load() != nil }

func (t *taps) frame(frame []byte, dir direction) {
	if c := t.current.Load(); c != nil {
		c.add(frame, dir)
	}
}

// end stops the current capture. The caller holds mu.
func (t *taps) end() CaptureStats {
	c := t.current.Swap(nil)
	if c == nil {
		return t.stats()
	}
	c.mu.Lock()
	c.ended = true
	c.wake.Signal()
	c.mu.Unlock()
	if !c.written(captureStuck) {
		if d, ok := c.file.(interface{ SetWriteDeadline(time.Time) error }); ok {
			d.SetWriteDeadline(time.Unix(1, 0))
			c.written(captureStuck)
		}
	}
	s := c.snapshot()
	s.On = false
	t.last.Store(&s)
	return s
}

// captureStuck is how long the end of a capture waits for its writer.
const captureStuck = time.Second

// written waits for the last write.
func (c *capture) written(most time.Duration) bool {
	select {
	case <-c.done:
		return true
	case <-time.After(most):
		return false
	}
}

// stop is end when no start can follow.
func (t *taps) stop() {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.end()
}

func (t *taps) stats() CaptureStats {
	if c := t.current.Load(); c != nil {
		return c.snapshot()
	}
	if s := t.last.Load(); s != nil {
		return *s
	}
	return CaptureStats{}
}

func (c *capture) snapshot() CaptureStats {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.stats
}

func (c *capture) add(frame []byte, dir direction) {
	c.mu.Lock()
	defer c.mu.Unlock()
	keep := frame
	if c.opt.SnapLength > 0 && len(keep) > c.opt.SnapLength {
		keep = keep[:c.opt.SnapLength]
	}
	if c.ended || !c.stats.On || c.bytes+len(keep) > captureQueue {
		c.stats.Dropped++
		return
	}
	if c.opt.MaxBytes > 0 && c.stats.Bytes+int64(len(keep)) > c.opt.MaxBytes {
		c.stats.On = false
		c.stats.Dropped++
		return
	}
	c.stats.Frames++
	c.stats.Bytes += int64(len(keep))
	c.bytes += len(keep) + 64 // with its own weight, so that empty frames are bounded too
	c.queue = append(c.queue, captured{time.Now(), dir, len(frame), append([]byte(nil), keep...)})
	c.wake.Signal()
}

// run writes what is queued until the capture has ended.
func (c *capture) run(out *pcapgo.NgWriter) {
	defer close(c.done)
	for {
		batch, more := c.take()
		err := writeFrames(out, batch)
		if err != nil {
			c.mu.Lock()
			c.stats.On, c.stats.Error = false, errors.Join(c.stats.Error, err)
			c.stats.Dropped += int64(len(c.queue))
			c.queue, c.bytes = nil, 0
			c.mu.Unlock()
		}
		if !more {
			return
		}
	}
}

func (c *capture) take() (batch []captured, more bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for len(c.queue) == 0 && !c.ended {
		c.wake.Wait()
	}
	batch, c.queue, c.bytes = c.queue, nil, 0
	return batch, !c.ended
}

func writeFrames(out *pcapgo.NgWriter, batch []captured) error {
	for _, f := range batch {
		flags := &pcapgo.NgEpbFlags{Direction: pcapgo.NgEpbFlagDirectionOutbound}
		if f.dir == toGuest {
			flags.Direction = pcapgo.NgEpbFlagDirectionInbound
		}
		ci := gopacket.CaptureInfo{Timestamp: f.at, CaptureLength: len(f.data), Length: f.length}
		if err := out.WritePacketWithOptions(ci, f.data, pcapgo.NgPacketOptions{Flags: flags}); err != nil {
			return err
		}
	}
	return out.Flush()
}
