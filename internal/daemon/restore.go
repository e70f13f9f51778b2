package daemon

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"time"

	"vigia/internal/checkpoint"
	"vigia/internal/event"
	"vigia/internal/link"
	"vigia/internal/vm"
)

// restoreTime bounds the putting together of a checkpoint's memory.
const restoreTime = 5 * time.Minute

// restoration is a checkpoint being put back into a machine that starts: memory and devices come while QEMU does.
type restoration struct {
	from    checkpoint.Record
	devices *os.File // of the devices' state, once done is closed
	done    chan struct{}
	err     error
}

// restore begins to put a checkpoint's memory into ram; without, it is looked at whole and nothing is kept.
func (d *Daemon) restore(ctx context.Context, m *machine, from checkpoint.Record, ram *os.File) *restoration {
	r := &restoration{from: from, done: make(chan struct{})}
	go func() {
		defer close(r.done)
		if r.err = d.putBack(ctx, m, r, ram); r.err != nil {
			r.err = fmt.Errorf("checkpoint %s: %w", from.ID, r.err)
		}
	}()
	return r
}

func (d *Daemon) putBack(ctx context.Context, m *machine, r *restoration, ram *os.File) error {
	if ram != nil {
		defer ram.Close()
	}
	ctx, cancel := context.WithTimeout(ctx, restoreTime)
	defer cancel()
	p := newPace()
	k, err := d.startKeeper(ctx, m, "restorer")
	if err != nil {
		return err
	}
	defer k.end()
	p.mark("process")
	packed, err := d.checkpoints.Open(r.from.ID, checkpoint.FileDevices)
	if err != nil {
		return fmt.Errorf("%w: %w", checkpoint.ErrDamaged, err)
	}
	defer packed.Close()
	read, write, err := memoryFile("devices")
	if err != nil {
		return err
	}
	defer write.Close()
	ask := link.Restore{DevicesSum: r.from.DevicesSum, Files: []string{link.FileDevicesOut, link.FileDevices}}
	files := []*os.File{packed, write}
	if err := d.giveChain(ctx, k, r.from.ID, false); err != nil {
		read.Close()
		return err
	}
	if ram != nil {
		ask.Files, files = append(ask.Files, link.FileOut), append(files, ram)
	}
	p.mark("files")
	if _, err := k.conn.Call(ctx, link.CallRestore, ask, nil, files...); err != nil {
		read.Close()
		return err
	}
	p.mark("memory")
	d.log.Debug("a restoration's way", "checkpoint", r.from.ID, "ms", p.String())
	r.devices = read
	return nil
}

// wait returns when memory and devices are there.
func (r *restoration) wait(ctx context.Context) error {
	select {
	case <-r.done:
		return r.err
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// usable says why a machine can't go on from a checkpoint here.
func (d *Daemon) usable(r checkpoint.Record) error {
	switch {
	case r.Accelerator != d.accelerator:
		return fmt.Errorf("checkpoint %s was made under %s, this host runs %s: %w", r.ID, r.Accelerator, d.accelerator, errState)
	case r.QEMU != d.qemuVersion:
		return fmt.Errorf("checkpoint %s was made by QEMU %s, this host has %s: %w", r.ID, r.QEMU, d.qemuVersion, errState)
	}
	return nil
}

// canRollBack says why the machine can't be put back to a checkpoint.
func (m *machine) canRollBack(to checkpoint.Record) error {
	if to.Machine != m.id() && m.record().Checkpoint != to.ID && !m.descends(to.ID) {
		return fmt.Errorf("checkpoint %s is of %s and %s does not come from it: %w: use: vigia clone %s@%s NEW", to.ID, to.Name, m.name(), errState, to.Name, to.ID)
	}
	return m.d.usable(to)
}

// goBack puts a machine back to a checkpoint of its own line: what it did since is gone.
func (m *machine) goBack(ctx context.Context, to checkpoint.Record, reason string) error {
	if err := m.canRollBack(to); err != nil {
		return err
	}
	unlock, err := m.lock(ctx)
	if err != nil {
		return err
	}
	defer unlock()
	to, unpin, err := m.d.held(to) // before anything is ended for it
	if err != nil {
		return err
	}
	defer unpin()
	if !m.d.begin() {
		return errEnding
	}
	defer m.d.tasks.Done()
	began, p := time.Now(), newPace()
	past, err := m.lookAhead(ctx, to)
	if err != nil {
		return fmt.Errorf("%s is as it was: %w", m.name(), err)
	}
	m.past = past
	defer func() { m.past = nil; past.giveBack() }()
	p.mark("ahead")
	ctx = context.WithoutCancel(ctx)
	if r := m.running(); r != nil {
		if err := m.ask(ctx, vm.EndedForced); err != nil {
			return err
		}
		r.qemu.Kill() // what it has not flushed is not wanted
		<-r.qemu.Done()
		p.mark("killed")
		<-r.ended
		p.mark("put away")
	}
	if err := m.change(ctx, func(r *record) { r.Rollback = to.ID }); err != nil {
		return err
	}
	if err := m.finishRollback(ctx); err != nil {
		return fmt.Errorf("roll %s back: %w", m.name(), err)
	}
	p.mark("disk")
	if err := m.startLocked(ctx); err != nil {
		return err
	}
	p.mark("runs")
	m.awaitArrival(ctx)
	p.mark("helped")
	m.d.log.Debug("a rollback's way", "machine", m.name(), "ms", p.String())
	m.d.bus.emit(m.name(), event.CheckpointRestored, event.Fields{"id": string(to.ID), "label": to.Label, "taken": time.Since(to.Time).Seconds(),
		"seconds": time.Since(began).Seconds(), "reason": reason})
	return nil
}

// descends says whether the machine's line goes back to a checkpoint.
func (m *machine) descends(id checkpoint.ID) bool {
	chain, err := m.d.checkpoints.Chain(m.record().Checkpoint)
	return err == nil && slices.ContainsFunc(chain, func(r checkpoint.Record) bool { return r.ID == id })
}

// finishRollback gives a machine the disk of the checkpoint it is to go back to, and notes that it goes on from there. It can be
// done again: a new daemon ends what a killed one began.
func (m *machine) finishRollback(ctx context.Context) error {
	rec := m.record()
	if rec.Rollback == "" {
		return nil
	}
	to, err := m.d.checkpoints.Get(rec.Rollback)
	if err != nil {
		return err
	}
	if err := m.freshOverlay(to.Layers); err != nil {
		return err
	}
	m.d.lineage.Lock()
	err = m.change(ctx, func(r *record) {
		r.Layers, r.Pending, r.Checkpoint, r.Resume, r.Rollback = to.Layers, "", to.ID, to.ID, ""
	})
	m.d.lineage.Unlock()
	m.d.sweepLayers()
	return err
}

// freshOverlay puts an empty overlay over the layers named in the place of the machine's.
func (m *machine) freshOverlay(layers []string) error {
	img, err := m.d.images.Get(m.record().Spec.ImageID)
	if err != nil {
		return err
	}
	top, err := m.d.openTop(img, layers)
	if err != nil {
		return err
	}
	defer top.Close()
	next := m.d.files.machine(m.id()) + "/overlay.next"
	f, err := makeOverlay(next, top)
	if err != nil {
		return err
	}
	f.Close()
	if err := os.Rename(next, m.d.files.overlay(m.id())); err != nil {
		return err
	}
	return syncDir(m.d.files.machine(m.id()))
}

// cloneOrder says what a clone is to be.
type cloneOrder struct {
	name, owner, purpose string
	expires              time.Time
	connect              bool // let it on the network at once
	publish              []vm.Publish
	identity             vm.Identity // what is empty stays as the other's
}

// held is a usable checkpoint's record as it is now, which stays until unpin is called.
func (d *Daemon) held(from checkpoint.Record) (now checkpoint.Record, unpin func(), err error) {
	if err := d.usable(from); err != nil {
		return now, nil, err
	}
	if unpin, err = d.pin(from.ID); err != nil {
		return now, nil, err
	}
	if now, err = d.checkpoints.Get(from.ID); err != nil { // its layers may have been merged
		unpin()
		return now, nil, err
	}
	return now, unpin, nil
}

// clone makes a machine that goes on from a checkpoint.
func (d *Daemon) clone(ctx context.Context, from checkpoint.Record, o cloneOrder) (*machine, error) {
	from, unpin, err := d.held(from)
	if err != nil {
		return nil, err
	}
	defer unpin()
	if err := d.layersOf(from); err != nil {
		return nil, err
	}
	began, p := time.Now(), newPace()
	spec := from.Spec
	spec.Name, spec.ID, spec.Created, spec.Expires, spec.Publish = o.name, vm.NewID(), began.UTC(), o.expires, o.publish
	if err := o.identify(&spec); err != nil {
		return nil, err
	}
	if o.owner != "" {
		spec.Owner = o.owner
	}
	if o.purpose != "" {
		spec.Purpose = o.purpose
	}
	if err := spec.Check(); err != nil {
		return nil, err
	}
	rec := cloneRecord(from, spec)
	rec.Quarantined = !o.connect
	m, err := d.cloneRunning(ctx, rec)
	if err != nil {
		return nil, err
	}
	p.mark("runs")
	m.awaitArrival(ctx)
	p.mark("helped")
	d.log.Debug("a clone's way", "machine", m.name(), "ms", p.String())
	d.bus.emit(m.name(), event.CloneCreated, event.Fields{"checkpoint": string(from.ID), "from": from.Name, "from_id": string(from.Machine),
		"seconds": time.Since(began).Seconds(), "connected": o.connect})
	return m, nil
}

// cloneRunning starts a clone: one that was made ahead where there is one.
func (d *Daemon) cloneRunning(ctx context.Context, rec record) (m *machine, err error) {
	var ready *launch
	if !own(rec) {
		var rest []*launch
		if ready, rest = d.spares.want(rec.Checkpoint, time.Now()); len(rest) > 0 {
			d.spawn(func() { d.discard(rest) })
		}
	}
	if ready != nil {
		m, err = d.claim(ctx, ready, rec)
	} else if m, err = d.createFrom(ctx, rec); err == nil {
		err = m.start(ctx)
	}
	if err != nil && m != nil {
		d.remove(context.WithoutCancel(ctx), m)
		return nil, err
	}
	return m, err
}

// createFrom makes a machine's record and its overlay.
func (d *Daemon) createFrom(ctx context.Context, rec record) (*machine, error) {
	m := newMachine(d, rec)
	if err := d.enter(m); err != nil {
		return nil, err
	}
	if err := d.makeDisk(m); err != nil {
		d.forget(m)
		return nil, fmt.Errorf("disk of %s: %w", m.name(), err)
	}
	if err := d.keepRecord(ctx, m); err != nil {
		d.forget(m)
		return nil, err
	}
	return m, nil
}

func (d *Daemon) makeDisk(m *machine) error {
	img, err := d.images.Get(m.rec.Spec.ImageID)
	if err != nil {
		return err
	}
	top, err := d.openTop(img, m.rec.Layers)
	if err != nil {
		return err
	}
	defer top.Close()
	if err := os.Mkdir(d.files.machine(m.id()), 0o700); err != nil {
		return err
	}
	f, err := makeOverlay(d.files.overlay(m.id()), top)
	if err != nil {
		return err
	}
	return f.Close()
}

// shared is a checkpoint's memory in a file that clones map, each for itself: a page is theirs alone once they write it.
type shared struct {
	path  string
	file  *os.File
	ready *restoration
	users int
}

// share returns the file of a checkpoint's memory for one more clone; unshare gives it back. The first one begins to fill it.
func (d *Daemon) share(ctx context.Context, m *machine, from checkpoint.Record) (*shared, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if s := d.shared[from.ID]; s != nil {
		s.users++
		return s, nil
	}
	path := d.files.ramFile(vm.ID(from.ID))
	os.Remove(path) // a dead daemon's
	f, err := os.OpenFile(path, os.O_CREATE|os.O_EXCL|os.O_RDWR, 0o600)
	if err != nil {
		return nil, fmt.Errorf("memory: %w", err)
	}
	// Each clone's QEMU is another user. It opens the file for writing, since it knows no other way, and maps it for itself.
	err = errors.Join(f.Chmod(0o666), f.Truncate(int64(from.Spec.Memory)))
	out, oerr := os.OpenFile(path, os.O_RDWR, 0)
	if err = errors.Join(err, oerr); err != nil {
		f.Close()
		os.Remove(path)
		return nil, err
	}
	s := &shared{path: path, file: f, users: 1}
	s.ready = d.restore(context.WithoutCancel(ctx), m, from, out)
	d.shared[from.ID] = s
	return s, nil
}

func (d *Daemon) unshare(id checkpoint.ID) {
	d.mu.Lock()
	defer d.mu.Unlock()
	s := d.shared[id]
	if s == nil {
		return
	}
	if s.users--; s.users <= 0 {
		delete(d.shared, id)
		os.Remove(s.path)
		go func() {
			<-s.ready.done
			if s.ready.devices != nil {
				s.ready.devices.Close()
			}
			s.file.Close()
		}()
	}
}
