package volume

import (
	"errors"
	"fmt"
	"os"
)

// Flatten writes what a run of frozen layers, the lowest first, says together into the empty file dst, as one frozen layer that can
// take their place in any chain: it has the id of the topmost and the parent of the lowest. The layers are only read, so
// machines may run over them meanwhile. progress may be nil. Until the last step the file has no header.
func Flatten(dst *os.File, layers []*os.File, progress func(done, total int64)) error {
	files := make([]file, len(layers))
	for i, f := range layers {
		files[i] = hostFile(f)
	}
	if progress == nil {
		progress = func(int64, int64) {}
	}
	if err := flatten(hostFile(dst), files, progress); err != nil {
		return fmt.Errorf("flatten layers: %w", err)
	}
	return nil
}

func flatten(dst file, files []file, progress func(done, total int64)) error {
	run, err := openRun(files)
	if err != nil {
		return err
	}
	if n, err := dst.Size(); err != nil || n != 0 {
		return errors.Join(errors.New("the layer's file must be empty"), err)
	}
	lowest, top := run[0], run[len(run)-1]
	h := header{generation: 1, id: top.id, parent: lowest.parent, size: top.size, state: layerFrozen, geo: top.geo}
	if err := dst.Truncate(h.geo.fileSize(h.size)); err != nil {
		return err
	}
	m := newBlockMap(h.size)
	for i, l := range run {
		if err := l.loadMap(func(c int64, st []byte) { m.apply(c, st, uint8(i+1), srcZero) }); err != nil {
			return fmt.Errorf("layer %d: %w", i, err)
		}
	}
	if h.parent.IsZero() {
		m.replace(srcZero, srcNone) // nothing is below that zeros would have to hide
	}
	if err := copyRun(dst, h, run, m, progress); err != nil {
		return err
	}
	return sealNew(dst, h, m)
}

// openRun opens layers that lie over each other. What the lowest lies over is not asked.
func openRun(files []file) ([]*layer, error) {
	if len(files) == 0 || len(files) >= MaxLayers {
		return nil, fmt.Errorf("%d layers, must be 1 to %d", len(files), MaxLayers-1)
	}
	var run []*layer
	for i, f := range files {
		l, err := openLayer(f)
		switch {
		case err != nil:
		case l.state != layerFrozen:
			err = ErrNotFrozen
		case i > 0 && (l.parent != run[i-1].id || l.size < run[i-1].size):
			err = ErrParent
		}
		if err != nil {
			return nil, fmt.Errorf("layer %d: %w", i, err)
		}
		run = append(run, l)
	}
	return run, nil
}

// copyRun copies each block from the layer that has it, and makes the new layer its source.
func copyRun(dst file, h header, run []*layer, m *blockMap, progress func(done, total int64)) error {
	buf := make([]byte, copySize)
	for b := int64(0); b < m.blocks; {
		src, n := m.run(b, min(copySize/BlockSize, m.blocks-b))
		if src != srcNone && src != srcZero {
			p, at := buf[:n*BlockSize], h.geo.dataOff+b*BlockSize
			l := run[src-1]
			if err := readFull(l.f, p, l.geo.dataOff+b*BlockSize); err != nil {
				return err
			}
			if _, err := dst.WriteAt(p, at); err != nil {
				return err
			}
			m.set(b, n, 1)
		}
		b += n
		progress(b*BlockSize, m.blocks*BlockSize)
	}
	return nil
}
