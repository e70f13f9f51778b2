package daemon

import (
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"time"

	"golang.org/x/sys/unix"

	"vigia/internal/checkpoint"
	"vigia/internal/event"
	"vigia/internal/link"
	"vigia/internal/vm"
)

// checkpointTime bounds the making of a checkpoint.
const checkpointTime = 5 * time.Minute

// maxChain bounds how many checkpoints' memory lies on one another; the next one is whole.
const maxChain = 150

// checkpointMaking is one checkpoint of one machine.
type checkpointMaking struct {
	*machine
	run    *run
	keeper *keeper
	draft  *checkpoint.Draft
	record checkpoint.Record
}

// saving says what a checkpoint is made for.
type saving struct {
	label     string
	stable    bool
	scheduled bool // by the machine's rule
}

// checkpoint saves a running machine. On an error nothing has changed; the guest goes on in any case.
func (m *machine) checkpoint(ctx context.Context, label string, stable bool) (checkpoint.Record, error) {
	return m.checkpointAs(ctx, saving{label: label, stable: stable})
}

func (m *machine) checkpointAs(ctx context.Context, s saving) (checkpoint.Record, error) {
	unlock, err := m.lock(ctx)
	if err != nil {
		return checkpoint.Record{}, err
	}
	defer unlock()
	r := m.running()
	if r == nil {
		return checkpoint.Record{}, m.errNotRunning()
	}
	if m.rec.replayMode() != "" {
		return checkpoint.Record{}, fmt.Errorf("checkpoint of %s: a machine that is recorded or replayed can't be saved in the middle: %w", m.name(), errState)
	}
	if !m.d.begin() {
		return checkpoint.Record{}, errEnding
	}
	defer m.d.tasks.Done()
	// Whoever asked may leave: what is begun is ended.
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), checkpointTime)
	defer cancel()
	c := &checkpointMaking{machine: m, run: r}
	rec, err := c.take(ctx, s)
	if err != nil {
		err = fmt.Errorf("checkpoint of %s: %w", m.name(), err)
		m.d.bus.emit(m.name(), event.CheckpointFailed, event.Fields{"reason": event.Text([]byte(err.Error()))})
	}
	return rec, err
}

func (c *checkpointMaking) take(ctx context.Context, s saving) (checkpoint.Record, error) {
	var err error
	if c.keeper, err = c.keep(ctx, c.run.qemu); err != nil {
		return c.record, err
	}
	rec := c.machine.record()
	c.record = checkpoint.Record{Machine: c.id(), Name: c.name(), Parent: c.parent(ctx, rec.Checkpoint), Label: s.label, Stable: s.stable, Scheduled: s.scheduled, Panicked: c.stands(),
		How: checkpoint.Protected, Disk: checkpoint.CrashConsistent, Spec: rec.Spec, Origin: rec.origin(), Accelerator: rec.Run.Accelerator, QEMU: c.d.qemuVersion}
	if c.keeper.why != "" {
		c.record.How, c.record.Why = checkpoint.Copied, c.keeper.why
	}
	if c.draft, err = c.d.checkpoints.Begin(); err != nil {
		return c.record, err
	}
	err = c.save(ctx)
	if err == nil {
		err = c.draft.Commit(c.record)
	}
	if err != nil {
		c.keeper.last = ""
		c.draft.Discard()
		return c.record, err
	}
	c.record.ID, c.keeper.last = c.draft.ID, c.draft.ID
	if err := c.change(ctx, func(r *record) { r.Checkpoint = c.draft.ID }); err != nil {
		return c.record, err
	}
	c.d.bus.emit(c.name(), event.CheckpointCreated, event.Fields{"id": string(c.record.ID), "label": s.label, "scheduled": s.scheduled, "parent": string(c.record.Parent),
		"pause": c.record.PauseSeconds, "seconds": c.record.Seconds, "bytes": c.record.Bytes(), "how": c.record.How, "disk": c.record.Disk, "disk_why": c.record.DiskWhy, "frozen": c.record.FrozenSeconds,
		"sum": c.record.MemorySum})
	return c.record, nil
}

// parent makes the keeper know the checkpoint on which the next one will lie. Where that can't be, the next one is whole.
func (c *checkpointMaking) parent(ctx context.Context, last checkpoint.ID) checkpoint.ID {
	chain, err := c.d.checkpoints.Chain(last)
	if last == "" || err != nil || len(chain) >= maxChain {
		return ""
	}
	if c.keeper.last == last {
		return last
	}
	if err := c.d.giveChain(ctx, c.keeper, last, true); err != nil {
		c.d.log.Warn("the last checkpoint can't be read, the next one is whole", "machine", c.name(), "error", err)
		return ""
	}
	return last
}

// save goes through keeper and guard. After an error the disk is as it was, or as the guard says.
func (c *checkpointMaking) save(ctx context.Context) (err error) {
	files, err := c.files()
	defer files.close()
	if err != nil {
		return err
	}
	begin := link.Begin{ID: wide(c.draft.ID), Parent: wide(c.record.Parent),
		Files: []string{link.FileOut, link.FileDevices, link.FileDevicesOut, link.FileKeeper}}
	if _, err := c.keeper.conn.Call(ctx, link.CallBegin, begin, nil, files.memory, files.devices, files.packed, files.toGuard); err != nil {
		return err
	}
	done, err := c.instant(ctx, files)
	var saved link.Saved
	if err == nil {
		_, err = c.keeper.conn.Call(ctx, link.CallFinish, nil, &saved)
	} else {
		c.keeper.conn.Call(ctx, link.CallAbort, nil, nil)
	}
	if err != nil {
		return err
	}
	c.frozen(done)
	r := &c.record
	r.PauseSeconds, r.Seconds, r.Pages = done.PauseSeconds, saved.Seconds, saved.Pages
	r.MemoryBytes, r.MemorySum = saved.Bytes, saved.Sum
	r.DevicesBytes, r.DevicesSum = saved.DevicesSize, saved.DevicesSum
	r.Layers = c.machine.record().Layers
	r.DiskBytes = usedBytes(c.d.files.layer(r.Layers[len(r.Layers)-1]))
	return nil
}

// instant lets the guard hold the guest for it.
func (c *checkpointMaking) instant(ctx context.Context, files *savingFiles) (done link.Checkpointed, err error) {
	overlay, err := c.pushLayer(ctx)
	if err != nil {
		return done, err
	}
	defer overlay.Close()
	c.machine.keepMore(ctx, c.run)
	c.record.Time = time.Now().UTC()
	ask := link.Checkpoint{Freeze: c.freezes(ctx), Files: []string{link.FileDevices, link.FileKeeper, link.FileOverlay}}
	_, err = c.callGuard(ctx, link.CallCheckpoint, ask, &done, files.toQEMU, files.toKeeper, overlay)
	if err == nil && done.At.After(c.record.Time) && done.At.Before(time.Now()) { // since when the guest stood still, from who held it
		c.record.Time = done.At.UTC()
	}
	if err == nil && done.Failed != "" {
		err = errors.New(done.Failed)
	}
	return done, errors.Join(err, c.recoverLayers(ctx)) // what is in use is asked for, whatever was said
}

// wide is an id as package page has it.
func wide(id checkpoint.ID) string { return string(id) }

// savingFiles are the descriptors that go to keeper and guard.
type savingFiles struct {
	memory, packed    *os.File // the checkpoint's, to be written
	devices, toQEMU   *os.File // one file, for reading and for writing
	toGuard, toKeeper *os.File // one connection
}

func (f *savingFiles) close() {
	closeFiles([]*os.File{f.memory, f.packed, f.devices, f.toQEMU, f.toGuard, f.toKeeper})
}

func (c *checkpointMaking) files() (*savingFiles, error) {
	var f savingFiles
	var err1, err2, err3, err4 error
	f.memory, err1 = c.draft.Create(checkpoint.FileMemory)
	f.packed, err2 = c.draft.Create(checkpoint.FileDevices)
	f.devices, f.toQEMU, err3 = memoryFile("devices")
	var ours, theirs *os.File
	ours, theirs, err4 = filePair()
	f.toGuard, f.toKeeper = ours, theirs
	return &f, errors.Join(err1, err2, err3, err4)
}

// memoryFile makes a file without a name, open for reading and, a second time, for writing alone: QEMU takes no other.
func memoryFile(name string) (read, write *os.File, err error) {
	fd, err := unix.MemfdCreate(name, unix.MFD_CLOEXEC)
	if err != nil {
		return nil, nil, err
	}
	read = os.NewFile(uintptr(fd), name)
	write, err = os.OpenFile(fmt.Sprintf("/proc/self/fd/%d", fd), os.O_WRONLY, 0)
	return read, write, err
}

func filePair() (a, b *os.File, err error) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, nil, err
	}
	return os.NewFile(uintptr(fds[0]), "socket"), os.NewFile(uintptr(fds[1]), "socket"), nil
}

func usedBytes(path string) int64 {
	var st unix.Stat_t
	if unix.Stat(path, &st) != nil {
		return 0
	}
	return st.Blocks * 512
}

// findCheckpoint reads an id, or the beginning of one that no other has. With a machine it must be one of its line.
func (d *Daemon) findCheckpoint(text string) (checkpoint.Record, error) {
	if len(text) == 16 {
		if id, err := checkpoint.ParseID(text); err == nil {
			return d.checkpoints.Get(id)
		}
	}
	if _, err := hex.DecodeString(text + text); err != nil || len(text) < 3 || len(text) > 16 {
		return checkpoint.Record{}, fmt.Errorf("%w: checkpoint %q: use its id, or the first digits of it, at least 3", vm.ErrInvalid, event.Text([]byte(text)))
	}
	found := d.checkpoints.List(func(r *checkpoint.Record) bool { return string(r.ID[:len(text)]) == text })
	switch len(found) {
	case 0:
		return checkpoint.Record{}, fmt.Errorf("%w: %s: vigia checkpoints shows those there are", checkpoint.ErrNotFound, text)
	case 1:
		return found[0], nil
	}
	return checkpoint.Record{}, fmt.Errorf("%w: checkpoint %s: %d begin so: use more digits", vm.ErrInvalid, text, len(found))
}

// pin keeps a checkpoint from being removed until unpin is called: somebody begins to go on from it.
func (d *Daemon) pin(id checkpoint.ID) (unpin func(), err error) {
	d.lineage.Lock()
	defer d.lineage.Unlock()
	if _, err := d.checkpoints.Get(id); err != nil {
		return nil, err
	}
	d.pinned[id]++
	return func() {
		d.lineage.Lock()
		defer d.lineage.Unlock()
		if d.pinned[id]--; d.pinned[id] == 0 {
			delete(d.pinned, id)
		}
	}, nil
}

// removeCheckpoint takes one away, and the layers that nobody needs then.
func (d *Daemon) removeCheckpoint(rec checkpoint.Record, reason string) error {
	if err := d.takeAway(rec); err != nil {
		return err
	}
	d.bus.emit(rec.Name, event.CheckpointRemoved, event.Fields{"id": string(rec.ID), "reason": reason})
	d.sweepLayers()
	d.spawn(func() { d.mergeLayers(d.ctx) })
	return nil
}

func (d *Daemon) takeAway(rec checkpoint.Record) error {
	d.discard(d.spares.drop(rec.ID))
	d.lineage.Lock()
	defer d.lineage.Unlock()
	if d.pinned[rec.ID] > 0 {
		return fmt.Errorf("checkpoint %s: a machine is just going on from it: %w", rec.ID, errState)
	}
	for _, m := range d.all() {
		if r := m.record(); r.Resume == rec.ID || r.Rollback == rec.ID {
			return fmt.Errorf("checkpoint %s is what %s goes on from when it is started: %w", rec.ID, m.name(), errState)
		}
	}
	return d.checkpoints.Remove(rec.ID)
}
