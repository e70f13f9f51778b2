package volume

import (
	"errors"
	"fmt"
	"os"
	"sync"
)

// ErrNotEmpty is returned for a new overlay that has something in it already.
var ErrNotEmpty = errors.New("overlay is not empty")

// Next is an overlay that is ready to take the place of the one in use.
type Next struct {
	l    *layer
	live bool
}

// Prepare makes a new overlay ready for Swap: it checks the file, which Create has made over the overlay in use (ID names
// it), locks it, and waits until it is durable and the layer that the Swap before left is frozen. Requests go on meanwhile. The
// volume takes the file over with Swap only.
func (v *Volume) Prepare(overlay *os.File) (*Next, error) { return v.prepare(hostFile(overlay)) }

func (v *Volume) prepare(f file) (*Next, error) {
	if err := v.lock(f); err != nil {
		return nil, fmt.Errorf("prepare overlay: %w", err)
	}
	// Two layers that are not frozen may lie under an overlay at no time: Open could not tell what was flushed.
	v.flush.Lock()
	err := v.settle()
	v.flush.Unlock()
	var n *Next
	if err == nil {
		n, err = v.loadNext(f)
	}
	if err != nil {
		v.unlock(f)
		return nil, fmt.Errorf("prepare overlay: %w", err)
	}
	return n, nil
}

func (v *Volume) loadNext(f file) (*Next, error) {
	l, err := openLayer(f)
	switch {
	case err != nil:
		return nil, err
	case l.state == layerFrozen:
		return nil, ErrFrozen
	case l.size != v.size:
		return nil, fmt.Errorf("%w: a running disk cannot change its size", ErrParent)
	}
	empty := true
	full := func(int64, []byte) { empty = false }
	if err := l.loadMap(full); err != nil {
		return nil, err
	}
	if err := l.replayLog(full); err != nil {
		return nil, err
	}
	live, err := l.openLive(v.o.Boot, full)
	if err == nil && !empty {
		err = ErrNotEmpty
	}
	if err == nil {
		err = f.Sync()
	}
	return &Next{l, live}, err
}

// Swap puts a prepared overlay on top and freezes the one that was there: at one instant between two requests, which go on at once.
// What is left, waiting for the host's disk and writing the frozen layer's map, is done beside them, and done is told
// how it ended: nil when the layer is frozen on the disk and may be shared. With an error it is not yet so, and every Flush tries
// again. No Flush comes back before: what a guest has flushed after a Swap lies over a layer that survives too.
//
// Whoever keeps the list of layers writes the new one down before Swap: Open ends what a killed process or a power cut left
// of a Swap, whether it had begun or not.
func (v *Volume) Swap(n *Next) (frozen ID, done <-chan error, err error) {
	v.flush.Lock()
	defer v.flush.Unlock()
	if err := v.settle(); err != nil {
		return ID{}, nil, fmt.Errorf("swap overlays: %w", err)
	}
	v.write.Lock()
	defer v.write.Unlock()
	switch err := v.writable(); {
	case err != nil:
		return ID{}, nil, fmt.Errorf("swap overlays: %w", err)
	case v.closed.Load():
		return ID{}, nil, fmt.Errorf("swap overlays: %w", ErrClosed)
	case len(v.chain) >= MaxLayers:
		return ID{}, nil, fmt.Errorf("swap overlays: the chain is %d layers long, the most there can be", len(v.chain))
	case n.l.parent != v.top.id:
		return ID{}, nil, fmt.Errorf("swap overlays: %w: it names %.12s, in use is %.12s", ErrParent, n.l.parent, v.top.id)
	}
	v.below = v.detach()
	v.mapMu.Lock()
	v.m.replace(srcZero, srcNone)
	v.chain = append(v.chain, n.l)
	v.mapMu.Unlock()
	v.setTop(n.l)
	v.live, v.flushed = n.live, v.written
	return v.below.l.id, v.below.begin(), nil
}

// detach takes down what freezing the overlay will need of the map, which from now on is another's. The caller holds write.
func (v *Volume) detach() *sealing {
	s := &sealing{v: v, l: v.top, states: make(map[uint32][chunkStates]byte, len(v.touched.list))}
	var st [chunkStates]byte
	for _, set := range []*dirtySet{&v.touched, &v.dirty} {
		for _, c := range set.take() {
			if _, ok := s.states[c]; !ok {
				v.m.states(int64(c), v.topSrc, st[:])
				s.states[c] = st
			}
		}
	}
	return s
}

// sealing is a layer that was the overlay, on its way to being frozen.
type sealing struct {
	v *Volume
	l *layer
	// states are the map of the chunks that changed since it was last made durable. The rest is in the file.
	states map[uint32][chunkStates]byte

	mu     sync.Mutex // held while it is worked on
	over   bool
	closed bool // and its file with it
}

// keep notes a chunk's states.
func (s *sealing) keep(c uint32, st []byte) {
	if s.states == nil {
		s.states = map[uint32][chunkStates]byte{}
	}
	s.states[c] = [chunkStates]byte(st)
}

// begin freezes the layer beside everything else, and says how the first attempt ended.
func (s *sealing) begin() <-chan error {
	done := make(chan error, 1)
	if s.v.idle {
		return done
	}
	go func() { done <- s.run() }()
	return done
}

// run returns when the layer is frozen on the disk, or with why it is not.
func (s *sealing) run() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	switch {
	case s.over:
		return nil
	case s.closed:
		return ErrClosed
	}
	if err := s.freeze(); err != nil {
		return fmt.Errorf("freeze layer %.12s: %w", s.l.id, err)
	}
	s.over = true
	s.v.unlock(s.l.f)
	return nil
}

// abandon is for when the files are closed: Open goes on with it another time.
func (s *sealing) abandon() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.closed = true
}

func (s *sealing) freeze() error {
	if err := s.l.finishHeader(&s.v.stall); err != nil || s.l.state == layerFrozen {
		return err
	}
	if err := s.l.syncData(&s.v.stall, s.rewrite); err != nil {
		return err
	}
	m, err := s.wholeMap()
	if err != nil {
		return err
	}
	return s.l.fold(m.mapPages(1, s.l.geo), true, &s.v.stall)
}

func (s *sealing) rewrite(rewrite func(c int64, states []byte) error) error {
	for c, st := range s.states {
		if err := rewrite(int64(c), st[:]); err != nil {
			return err
		}
	}
	return nil
}

// wholeMap is the layer's map: what its file has of it, and what had changed since.
func (s *sealing) wholeMap() (*blockMap, error) {
	m := newBlockMap(s.l.size)
	apply := func(c int64, st []byte) { m.apply(c, st, 1, srcZero) }
	err := s.v.stall.try(func() error {
		if err := s.l.loadMap(apply); err != nil {
			return err
		}
		return s.l.replayLog(apply)
	})
	for c, st := range s.states {
		apply(int64(c), st[:])
	}
	return m, err
}

// openSwapped takes a layer that is not frozen for what a killed process or a power cut left of a Swap, if it lies right under the
// overlay. It may have been the overlay still: nothing can lie over it that was flushed, and if anything does, it is of this boot.
func (v *Volume) openSwapped(l *layer, underOverlay bool) error {
	if !underOverlay || v.lock(l.f) != nil {
		return ErrNotFrozen
	}
	v.below = &sealing{v: v, l: l}
	return nil
}
