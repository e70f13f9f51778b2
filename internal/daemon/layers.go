package daemon

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"vigia/internal/image"
	"vigia/internal/link"
	"vigia/internal/volume"
)

// A machine's disk is the image's layers, the layers that checkpoints froze, and its overlay. The frozen ones lie in
// STATE/layers under names that mean nothing, and a machine's record lists its own: what a file says of itself was written by
// a guard, and is believed only where it agrees.
//
// Its overlay changes its place in steps, so that the record is right whatever is killed between two of them:
//
//	record: Pending = NAME
//	layers/NAME.vol is a second name of overlay.vol; overlay.next is renamed to overlay.vol
//	record: Layers + NAME
//	the guard swaps (a killed swap is ended when the volume is opened the next time)
//	record: Pending = ""

// maxLayers bounds a disk's chain: beyond it no checkpoint is made. Package volume takes 250.
const maxLayers = 200

func (l layout) layer(name string) string { return l.path("layers", name+".vol") }

func newLayerName() string {
	var b [12]byte
	rand.Read(b[:])
	return hex.EncodeToString(b[:])
}

// makeOverlay makes an empty overlay over what is given, the uppermost layer or overlay.
func makeOverlay(path string, over *os.File) (*os.File, error) {
	base, err := volume.ReadInfo(over)
	if err != nil {
		return nil, err
	}
	os.Remove(path)
	f, err := os.OpenFile(path, os.O_CREATE|os.O_EXCL|os.O_RDWR, 0o600)
	if err != nil {
		return nil, err
	}
	if err := volume.Create(f, volume.CreateOptions{Size: base.Size, Parent: base.ID}); err != nil {
		f.Close()
		os.Remove(path)
		return nil, err
	}
	return f, nil
}

// openTop opens the layer that an overlay over the image and the layers named would lie on.
func (d *Daemon) openTop(img image.Image, layers []string) (*os.File, error) {
	if n := len(layers); n > 0 {
		return os.Open(d.files.layer(layers[n-1]))
	}
	files, err := img.OpenDisk()
	if err != nil {
		return nil, err
	}
	closeFiles(files[:len(files)-1])
	return files[len(files)-1], nil
}

// pushLayer puts a new overlay over the one in use, in the record and by name; the guard does it next.
func (m *machine) pushLayer(ctx context.Context) (*os.File, error) {
	if err := m.recoverLayers(ctx); err != nil {
		return nil, err
	}
	if len(m.record().Layers) >= maxLayers {
		return nil, fmt.Errorf("the disk of %s has %d layers already: %w: remove checkpoints that nobody needs, and they are merged", m.name(), maxLayers, errState)
	}
	m.laying.Lock()
	defer m.laying.Unlock()
	path, next, name := m.d.files.overlay(m.id()), m.d.files.machine(m.id())+"/overlay.next", newLayerName()
	over, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer over.Close()
	f, err := makeOverlay(next, over)
	if err != nil {
		return nil, err
	}
	err = m.change(ctx, func(r *record) { r.Pending = name })
	if err == nil {
		err = os.Link(path, m.d.files.layer(name))
	}
	if err == nil {
		err = os.Rename(next, path)
	}
	if err == nil {
		err = errors.Join(syncDir(filepath.Dir(path)), syncDir(m.d.files.path("layers")))
	}
	if err == nil {
		err = m.change(ctx, func(r *record) { r.Layers = append(slices.Clone(r.Layers), name) })
	}
	if err != nil {
		f.Close()
		return nil, errors.Join(err, m.settleLayers(ctx, false))
	}
	return f, nil
}

// settleLayers ends what was begun with the disk: swapped says whether the guard has put the new overlay to use.
func (m *machine) settleLayers(ctx context.Context, swapped bool) error {
	rec := m.record()
	if rec.Pending == "" {
		return nil
	}
	path, old := m.d.files.overlay(m.id()), m.d.files.layer(rec.Pending)
	listed := len(rec.Layers) > 0 && rec.Layers[len(rec.Layers)-1] == rec.Pending
	moved := !sameFile(path, old)
	os.Remove(m.d.files.machine(m.id()) + "/overlay.next")
	switch _, err := os.Stat(old); {
	case swapped && moved && err == nil:
		return m.change(ctx, func(r *record) {
			if !listed {
				r.Layers = append(slices.Clone(r.Layers), r.Pending)
			}
			r.Pending = ""
		})
	case err == nil && moved:
		if err := os.Rename(old, path); err != nil {
			return err
		}
	case err == nil:
		if err := os.Remove(old); err != nil {
			return err
		}
	}
	if err := syncDir(filepath.Dir(path)); err != nil {
		return err
	}
	return m.change(ctx, func(r *record) {
		if listed {
			r.Layers = slices.Clone(r.Layers[:len(r.Layers)-1])
		}
		r.Pending = ""
	})
}

func sameFile(a, b string) bool {
	x, err1 := os.Stat(a)
	y, err2 := os.Stat(b)
	return err1 == nil && err2 == nil && os.SameFile(x, y)
}

// recoverLayers is settleLayers for who does not know how it went. A guard that runs says which overlay it has, once it saves no more;
// where there is none, the next one opens what the record says, and so ends the swap. One that is on its way is waited for.
//
// What a guard says of the swap it was asked for is not enough: one that has taken another's place meanwhile found the new overlay in
// its place, refuses to put it there again, and has it in use.
func (m *machine) recoverLayers(ctx context.Context) error {
	m.laying.Lock()
	defer m.laying.Unlock()
	rec := m.record()
	if rec.Pending == "" {
		return nil
	}
	swapped := true
	if guard, _ := m.bothWorkers(); !guard.gone() {
		ctx, cancel := context.WithTimeout(ctx, layersTime)
		defer cancel()
		// A daemon that was killed may have begun a checkpoint which its guard is just taking.
		var has link.GuardStatus
		_, err := guard.conn.Call(ctx, link.CallSettled, nil, nil)
		if err == nil {
			_, err = guard.conn.Call(ctx, link.CallGuardStatus, nil, &has)
		}
		if err != nil && !guard.gone() {
			return err
		}
		if err == nil {
			if swapped, err = m.hasOverlay(has.Top); err != nil {
				return err
			}
		}
	}
	return m.settleLayers(ctx, swapped)
}

// layersTime bounds the wait for a guard that is saving: it holds its guest for 20 seconds at most, and freezes a layer then.
const layersTime = 90 * time.Second

// hasOverlay reports whether an overlay, by its id, is the one that the machine's directory has.
func (m *machine) hasOverlay(id string) (bool, error) {
	over, err := os.Open(m.d.files.overlay(m.id()))
	if err != nil {
		return false, err
	}
	defer over.Close()
	info, err := volume.ReadInfo(over)
	if err != nil {
		return false, err
	}
	return info.ID.String() == id, nil
}

// sweepLayers removes the layers that no machine and no checkpoint needs. Machines are asked before checkpoints: what a machine
// hands on to a checkpoint meanwhile is seen at one of the two.
func (d *Daemon) sweepLayers() {
	d.lineage.Lock()
	defer d.lineage.Unlock()
	machines := d.machinesLayers()
	used, known := d.checkpoints.Layers()
	if !known {
		d.log.Warn("a checkpoint is damaged, so layers that nobody needs can't be told and stay")
		return
	}
	for _, name := range machines {
		used[name] = true
	}
	entries, err := os.ReadDir(d.files.path("layers"))
	if err != nil {
		return
	}
	for _, e := range entries {
		name, ok := strings.CutSuffix(e.Name(), ".vol")
		if ok && !used[name] && d.kept[name] == 0 {
			if err := os.Remove(d.files.path("layers", e.Name())); err != nil && !errors.Is(err, fs.ErrNotExist) {
				d.log.Warn("a layer that nobody needs stays", "layer", name, "error", err)
			}
		}
	}
}

// machinesLayers are the layers that machines need.
func (d *Daemon) machinesLayers() (names []string) {
	for _, m := range d.all() {
		rec := m.record()
		names = append(append(names, rec.Layers...), rec.Pending)
		if rec.Recording != nil {
			names = append(names, rec.Recording.Layers...)
		}
		if rec.Replays != nil {
			names = append(names, rec.Replays.Recording.Layers...)
		}
	}
	return names
}

func syncDir(dir string) error {
	f, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer f.Close()
	return f.Sync()
}
