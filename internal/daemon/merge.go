package daemon

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"time"

	"vigia/internal/checkpoint"
	"vigia/internal/link"
	"vigia/internal/volume"
)

// A machine's disk grows by a layer at each checkpoint. Where checkpoints are removed, the layers between those that are left are needed
// by nobody apart: a confined process writes what they say together into one, which takes their place.
//
//	layers/NEW.vol is written; nothing names it, and the next start of a daemon would remove it
//	each machine that has the run of layers: its record names NEW instead, and its guard puts it in their place
//	each checkpoint that has it: its record names NEW instead
//	the old ones are named by nobody, and are removed
//
// Every record is right before and after its own step, since both the run and what takes its place are there until the last. So
// whatever is killed leaves records of which some name the one and some the other.

// A run is left alone until it is so long: each merge reads and writes all that it merges.
const mergeFrom = 8

// mergeTime bounds one merge: a disk of 100 GB is written in it.
const mergeTime = 30 * time.Minute

// mergeLayers merges what can be, until nothing is left that is worth it.
func (d *Daemon) mergeLayers(ctx context.Context) {
	if !d.merging.TryLock() {
		return // who does it looks again before it ends
	}
	defer d.merging.Unlock()
	for ctx.Err() == nil {
		run := d.nextRun()
		if run == nil {
			return
		}
		if err := d.mergeRun(ctx, run); err != nil {
			if ctx.Err() == nil {
				d.log.Warn("layers of a disk could not be merged: they go on taking room, and a chain may come to its limit", "layers", len(run), "error", err)
			}
			return
		}
	}
}

// nextRun finds layers to merge.
func (d *Daemon) nextRun() []string {
	chains, known := d.chains()
	if !known {
		return nil
	}
	for _, run := range runsOf(chains) {
		sizes := make([]int64, len(run))
		for i, name := range run {
			sizes[i] = usedBytes(d.files.layer(name))
		}
		if low := worthMerging(sizes); low >= 0 {
			return run[low:]
		}
	}
	return nil
}

// chains are the disks, as lists of layers, that machines and checkpoints have.
func (d *Daemon) chains() (chains [][]string, known bool) {
	for _, m := range d.all() {
		rec := m.record()
		if rec.Pending != "" { // its overlay is on its way
			chains = append(chains, append(slices.Clone(rec.Layers), rec.Pending))
		}
		chains = append(chains, rec.Layers)
		if rec.Recording != nil {
			chains = append(chains, rec.Recording.Layers)
		}
		if rec.Replays != nil {
			chains = append(chains, rec.Replays.Recording.Layers)
		}
	}
	for _, c := range d.checkpoints.List(func(*checkpoint.Record) bool { return true }) {
		chains = append(chains, c.Layers)
	}
	return chains, len(d.checkpoints.Damaged()) == 0
}

// runsOf finds the layers, two or more in a row, between which no chain ends and from which none branches off.
func runsOf(chains [][]string) (runs [][]string) {
	above := map[string]map[string]bool{}
	ends := map[string]bool{}
	for _, c := range chains {
		for i, name := range c {
			if above[name] == nil {
				above[name] = map[string]bool{}
			}
			if i+1 < len(c) {
				above[name][c[i+1]] = true
			} else {
				ends[name] = true
			}
		}
	}
	seen := map[string]bool{}
	for _, c := range chains {
		for i := 0; i < len(c); i++ {
			run := []string{c[i]}
			for last := c[i]; i+1 < len(c) && !ends[last] && len(above[last]) == 1; last = c[i] {
				i++
				run = append(run, c[i])
			}
			if len(run) > 1 && !seen[run[0]] {
				runs = append(runs, run)
			}
			seen[run[0]] = true
		}
	}
	return runs
}

// worthMerging says from which of a run's layers on it is worth it, or -1. A large layer below is left out until what lies over it is half
// its size: so a block is written anew as often as the logarithm of the disk's size says, and not at every checkpoint.
func worthMerging(sizes []int64) int {
	if len(sizes) < mergeFrom {
		return -1
	}
	low, over := len(sizes)-1, sizes[len(sizes)-1]
	for low > 0 && (sizes[low-1] <= 2*over || len(sizes)-low < 2 || low > 2*mergeFrom) {
		low--
		over += sizes[low]
	}
	return low
}

// mergeRun writes a run's layers into one, and puts it in their place everywhere.
func (d *Daemon) mergeRun(ctx context.Context, run []string) error {
	ctx, cancel := context.WithTimeout(ctx, mergeTime)
	defer cancel()
	name := newLayerName()
	d.keepLayers(1, append(slices.Clone(run), name)...)
	defer d.sweepLayers()
	defer func() { d.keepLayers(-1, append(slices.Clone(run), name)...) }()
	if err := d.writeMerged(ctx, run, name); err != nil {
		os.Remove(d.files.layer(name))
		return err
	}
	for _, m := range d.all() {
		if err := m.replaceRun(ctx, run, name); err != nil {
			return err
		}
	}
	for _, c := range d.checkpoints.List(func(c *checkpoint.Record) bool { return hasRun(c.Layers, run) }) {
		err := d.checkpoints.Change(c.ID, func(c *checkpoint.Record) { c.Layers = withoutRun(c.Layers, run, name) })
		if err != nil && !errors.Is(err, checkpoint.ErrNotFound) {
			return err
		}
	}
	d.log.Info("layers of a disk are merged", "layers", len(run), "bytes", usedBytes(d.files.layer(name)))
	return d.unpinned(ctx)
}

// keepLayers keeps layers from being swept though nobody names them: they are being made, or just replaced.
func (d *Daemon) keepLayers(n int, names ...string) {
	d.lineage.Lock()
	defer d.lineage.Unlock()
	for _, name := range names {
		if d.kept[name] += n; d.kept[name] == 0 {
			delete(d.kept, name)
		}
	}
}

// unpinned waits until nobody is about to go on from a checkpoint whose record he read before it was changed.
func (d *Daemon) unpinned(ctx context.Context) error {
	for {
		d.lineage.Lock()
		n := len(d.pinned)
		d.lineage.Unlock()
		if n == 0 {
			return nil
		}
		select {
		case <-time.After(100 * time.Millisecond):
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

func (d *Daemon) writeMerged(ctx context.Context, run []string, name string) error {
	var layers []*os.File
	defer func() { closeFiles(layers) }()
	var room int64
	for _, l := range run {
		f, err := os.Open(d.files.layer(l))
		if err != nil {
			return err
		}
		layers = append(layers, f)
		room += usedBytes(f.Name())
	}
	if free, err := freeBytes(d.files.path("layers")); err == nil && free < uint64(room)+minRoom {
		return fmt.Errorf("%d MiB are free, %d are needed for a while", free>>20, (room+minRoom)>>20)
	}
	dst, err := os.OpenFile(d.files.layer(name), os.O_CREATE|os.O_EXCL|os.O_RDWR, 0o600)
	if err != nil {
		return err
	}
	defer dst.Close()
	if err := d.convert.Flatten(ctx, layers, dst); err != nil {
		return err
	}
	return errors.Join(standsFor(dst, layers), syncDir(d.files.path("layers")))
}

// standsFor checks what the confined process says that it wrote, by the headers.
func standsFor(merged *os.File, layers []*os.File) error {
	is, err1 := volume.ReadInfo(merged)
	low, err2 := volume.ReadInfo(layers[0])
	high, err3 := volume.ReadInfo(layers[len(layers)-1])
	if err := errors.Join(err1, err2, err3); err != nil {
		return err
	}
	if !is.Frozen || is.ID != high.ID || is.Parent != low.Parent || is.Size != high.Size {
		return errors.New("what was merged is not the layer it should be")
	}
	return nil
}

// replaceRun puts a layer in the place of a run in a machine's record, and in the guard that has its disk open.
func (m *machine) replaceRun(ctx context.Context, run []string, name string) error {
	has := func(r *record) bool {
		return hasRun(r.Layers, run) || r.Recording != nil && hasRun(r.Recording.Layers, run) || r.Replays != nil && hasRun(r.Replays.Recording.Layers, run)
	}
	if rec := m.record(); !has(&rec) {
		return nil
	}
	unlock, err := m.lock(ctx)
	if errors.Is(err, errNoMachine) {
		return nil // removed meanwhile
	}
	if err != nil {
		return err
	}
	defer unlock()
	if err := m.recoverLayers(ctx); err != nil {
		return err
	}
	m.laying.Lock() // a guard opens what was named before, or what is named from now on; a guard's replacement waits for this
	err = m.change(ctx, func(r *record) {
		r.Layers = withoutRun(r.Layers, run, name)
		if r.Recording != nil {
			again := *r.Recording
			again.Layers = withoutRun(again.Layers, run, name)
			r.Recording = &again
		}
		if r.Replays != nil {
			again := *r.Replays
			again.Recording.Layers = withoutRun(again.Recording.Layers, run, name)
			r.Replays = &again
		}
	})
	m.laying.Unlock()
	if err != nil || m.running() == nil {
		return err
	}
	f, err := os.Open(m.d.files.layer(name))
	if err != nil {
		return err
	}
	defer f.Close()
	// A guard that can't goes on with the files it has, and the next one opens what the record says.
	if _, err := m.callGuard(ctx, link.CallReplace, nil, nil, f); err != nil {
		m.d.log.Warn("a guard goes on with the layers that were merged", "machine", m.name(), "error", err)
	}
	return nil
}

func hasRun(chain, run []string) bool { return runAt(chain, run) >= 0 }

func runAt(chain, run []string) int {
	at := slices.Index(chain, run[0])
	if at < 0 || at+len(run) > len(chain) || !slices.Equal(chain[at:at+len(run)], run) {
		return -1
	}
	return at
}

// withoutRun is a chain in which one layer is in the place of a run; a chain that lacks the run stays.
func withoutRun(chain, run []string, name string) []string {
	at := runAt(chain, run)
	if at < 0 {
		return chain
	}
	return slices.Concat(chain[:at], []string{name}, chain[at+len(run):])
}
