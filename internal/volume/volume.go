package volume

import (
	"errors"
	"fmt"
	"os"
	"sync"
	"sync/atomic"
	"time"
)

// Observer is told of each request in the order in which they are carried out: of a change once it is made, of a read before
// it is answered. It must be quick, must not keep data, which is only lent, and must not call the volume. Changes are told one
// at a time; Read may come at the same time as anything.
type Observer interface {
	Read(off, n int64)
	Written(off int64, data []byte)
	Trimmed(off, n int64)
	Zeroed(off, n int64)
}

// Options of an open volume. The zero value has no observer and gives host errors straight to the caller.
type Options struct {
	Observer Observer
	// OnStall is called when the host could not do what was asked (no room, over quota, an I/O error). The request is
	// held and tried again every RetryEvery, and at once on Retry; OnResume is called when all goes on. Nil: the error
	// is returned.
	OnStall    func(error)
	OnResume   func()
	RetryEvery time.Duration // 2 s if zero
	// Boot is the host's boot, HostBoot if zero: what a killed process had answered in this boot is all there.
	Boot Boot
	// Unlocked leaves out the lock that keeps a second process from writing the overlay.
	Unlocked bool
}

// Errors of requests.
var (
	ErrRange    = errors.New("beyond the end of the disk")
	ErrReadOnly = errors.New("volume is read-only")
	ErrClosed   = errors.New("volume is closed")
	ErrSealing  = errors.New("overlay is half frozen: freeze it again")
)

// Volume is an open chain of layers. Its methods may be called at the same time from many goroutines.
type Volume struct {
	o      Options
	size   int64
	stall  staller
	stats  counters
	closed atomic.Bool

	// mapMu guards what follows: readers look blocks up in it, writers change it while they hold write.
	mapMu sync.RWMutex
	m     *blockMap
	chain []*layer // bottom first; source s is chain[s-1]

	// write is held by whoever changes data or map, one at a time.
	write   sync.Mutex
	top     *layer // the overlay, nil if there is none
	topSrc  uint8
	dirty   dirtySet // chunks whose map changed since the last flush
	touched dirtySet // and whose data did
	written uint64   // counts changes, to see whether a flush has anything to do
	sealing bool     // a Freeze failed halfway
	idle    bool     // of tests: what a Swap leaves to do waits for the next Flush
	live    bool     // changes of the map are also written to the live map

	// flush is held by whoever syncs; it is taken before write.
	flush   sync.Mutex
	flushed uint64   // the value of written that is durable
	below   *sealing // the layer under the overlay, if it was one a moment ago and is not yet known to be frozen on the disk
}

// Open opens a chain: layers, the lowest first, all frozen, and the overlay that takes the writes, or nil for a volume
// that cannot be written. It takes the files over: Close closes them.
func Open(layers []*os.File, overlay *os.File, o Options) (*Volume, error) {
	if o.Boot == (Boot{}) {
		o.Boot = HostBoot()
	}
	files := make([]file, len(layers))
	for i, f := range layers {
		files[i] = hostFile(f)
	}
	if overlay == nil {
		return open(files, nil, o)
	}
	return open(files, hostFile(overlay), o)
}

func open(layers []file, overlay file, o Options) (*Volume, error) {
	if len(layers)+1 > MaxLayers {
		return nil, fmt.Errorf("open volume: %d layers, at most %d", len(layers), MaxLayers-1)
	}
	v := &Volume{o: o}
	v.stall.init(o)
	for i, f := range layers {
		l, err := openLayer(f)
		if err == nil && l.state != layerFrozen {
			err = v.openSwapped(l, overlay != nil && i == len(layers)-1)
		}
		if err == nil {
			err = v.link(l)
		}
		if err != nil {
			return nil, fmt.Errorf("open volume: layer %d: %w", i, err)
		}
	}
	if overlay == nil && len(layers) == 0 {
		return nil, errors.New("open volume: no layers")
	}
	if overlay != nil {
		if err := v.openTop(overlay); err != nil {
			return nil, fmt.Errorf("open volume: overlay: %w", err)
		}
	}
	if v.m == nil {
		v.m = newBlockMap(v.size)
	}
	for i, l := range v.chain {
		if err := v.loadLayer(uint8(i+1), l); err != nil {
			return nil, fmt.Errorf("open volume: layer %d: %w", i, err)
		}
	}
	if v.below != nil {
		v.below.begin()
	}
	return v, nil
}

// link puts l on top of the chain.
func (v *Volume) link(l *layer) error {
	var below ID
	if k := len(v.chain); k > 0 {
		below = v.chain[k-1].id
	}
	if l.parent != below {
		return fmt.Errorf("%w: it names %.12s, below it lies %.12s", ErrParent, l.parent, below)
	}
	if l.size < v.size {
		return fmt.Errorf("%w: its disk is smaller (%d bytes, below it %d)", ErrParent, l.size, v.size)
	}
	v.chain, v.size = append(v.chain, l), l.size
	return nil
}

// openTop checks and locks the overlay and links it.
func (v *Volume) openTop(f file) error {
	if err := v.lock(f); err != nil {
		return err
	}
	l, err := openLayer(f)
	if err == nil && l.state == layerFrozen {
		err = ErrFrozen
	}
	if err == nil {
		err = v.link(l)
	}
	if err != nil {
		return err
	}
	v.setTop(l)
	return nil
}

// lock keeps other processes from writing f.
func (v *Volume) lock(f file) error {
	if lk, ok := f.(interface{ lock() error }); ok && !v.o.Unlocked {
		return lk.lock()
	}
	return nil
}

func (v *Volume) unlock(f file) {
	if lk, ok := f.(interface{ unlock() }); ok && !v.o.Unlocked {
		lk.unlock()
	}
}

// setTop makes the topmost layer the overlay.
func (v *Volume) setTop(l *layer) {
	v.top, v.topSrc = l, uint8(len(v.chain))
	v.dirty.init(l.geo.chunks)
	v.touched.init(l.geo.chunks)
}

// loadLayer lays a layer's map over what is loaded so far.
func (v *Volume) loadLayer(src uint8, l *layer) error {
	zero := uint8(srcNone)
	if l == v.top {
		zero = srcZero
	}
	apply := func(c int64, st []byte) { v.m.apply(c, st, src, zero) }
	if err := l.loadMap(apply); err != nil || l.state == layerFrozen {
		return err
	}
	if err := l.replayLog(apply); err != nil {
		return err
	}
	live, err := l.openLive(v.o.Boot, func(c int64, st []byte) {
		apply(c, st)
		if l != v.top {
			v.below.keep(uint32(c), st)
			return
		}
		v.dirty.add(c)
		v.touched.add(c)
		v.written = 1
	})
	if l == v.top {
		v.live = live
	}
	return err
}

// Size is the size of the disk in bytes.
func (v *Volume) Size() int64 { return v.size }

// ReadOnly says that the volume has no overlay to write to.
func (v *Volume) ReadOnly() bool {
	v.write.Lock()
	defer v.write.Unlock()
	return v.top == nil
}

// Close flushes and closes the files. Requests that are held for want of room fail. It is for after Serve has returned.
func (v *Volume) Close() error {
	v.stall.close()
	err := v.Flush()
	if v.closed.Swap(true) {
		return ErrClosed
	}
	v.flush.Lock()
	defer v.flush.Unlock()
	if v.below != nil {
		v.below.abandon()
	}
	v.mapMu.Lock()
	defer v.mapMu.Unlock()
	for _, l := range v.chain {
		if c, ok := l.f.(interface{ Close() error }); ok {
			err = errors.Join(err, c.Close())
		}
	}
	return err
}

// writable says why the volume takes no writes. The caller holds write.
func (v *Volume) writable() error {
	switch {
	case v.top == nil:
		return ErrReadOnly
	case v.sealing:
		return ErrSealing
	}
	return nil
}

func (v *Volume) checkRange(off, n int64) error {
	if off < 0 || n < 0 || off > v.size || n > v.size-off {
		return fmt.Errorf("%w: %d bytes at %d of %d", ErrRange, n, off, v.size)
	}
	if v.closed.Load() {
		return ErrClosed
	}
	return nil
}
