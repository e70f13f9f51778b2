package volume

import (
	"errors"
	"fmt"
	"os"
)

// Freeze flushes and seals the overlay: from now on it is a layer like the others, and the volume takes no writes
// until Push gives it a new overlay. It returns the id of what was frozen.
func (v *Volume) Freeze() (ID, error) {
	v.flush.Lock()
	defer v.flush.Unlock()
	if v.top == nil {
		return ID{}, ErrReadOnly
	}
	if err := v.settle(); err != nil {
		return ID{}, fmt.Errorf("freeze overlay: %w", err)
	}
	v.write.Lock()
	defer v.write.Unlock()
	if err := v.seal(); err != nil {
		return ID{}, fmt.Errorf("freeze overlay: %w", err)
	}
	id := v.top.id
	v.unlock(v.top.f)
	v.top, v.topSrc, v.sealing = nil, 0, false
	v.mapMu.Lock()
	v.m.replace(srcZero, srcNone)
	v.mapMu.Unlock()
	return id, nil
}

// seal writes the last map with a header that says frozen. If it fails halfway, the header may be on the disk or not:
// writes are refused until a second Freeze has settled it. The caller holds flush and write.
func (v *Volume) seal() error {
	if v.top.state == layerFrozen {
		return nil
	}
	w := mapWrite{touched: v.touched.take(), chunks: v.dirty.take(), pages: v.m.mapPages(v.topSrc, v.top.geo), freeze: true}
	err := v.syncData(w.touched, nil)
	if err == nil {
		err = v.commit(w)
	}
	if err != nil {
		v.uncapture(w)
		v.sealing = v.top.pending != nil
	}
	return err
}

// Push gives a volume that has no overlay a new one, which Create has made over the topmost layer.
func (v *Volume) Push(overlay *os.File) error { return v.push(hostFile(overlay)) }

func (v *Volume) push(f file) error {
	v.flush.Lock()
	defer v.flush.Unlock()
	v.write.Lock()
	defer v.write.Unlock()
	if v.top != nil {
		return errors.New("push overlay: the volume still has one: freeze it first")
	}
	if len(v.chain) >= MaxLayers {
		return fmt.Errorf("push overlay: the chain is %d layers long, the most there can be", len(v.chain))
	}
	v.mapMu.Lock()
	defer v.mapMu.Unlock()
	size := v.size
	if err := v.openTop(f); err != nil {
		return fmt.Errorf("push overlay: %w", err)
	}
	if v.size != size {
		v.unlink(size)
		return fmt.Errorf("push overlay: %w: a running disk cannot change its size", ErrParent)
	}
	v.written, v.flushed = 1, 0 // the new file itself is not yet durable
	if err := v.loadLayer(v.topSrc, v.top); err != nil {
		v.unlink(size)
		return fmt.Errorf("push overlay: %w", err)
	}
	return nil
}

// unlink undoes openTop.
func (v *Volume) unlink(size int64) {
	v.unlock(v.top.f)
	v.chain, v.size, v.top, v.topSrc = v.chain[:len(v.chain)-1], size, nil, 0
}

// ID is the id of the topmost layer: the parent of the next.
func (v *Volume) ID() ID {
	v.mapMu.RLock()
	defer v.mapMu.RUnlock()
	return v.chain[len(v.chain)-1].id
}
