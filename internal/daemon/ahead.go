package daemon

import (
	"context"
	"fmt"
	"os"

	"golang.org/x/sys/unix"

	"vigia/internal/checkpoint"
	"vigia/internal/volume"
)

// ahead is a checkpoint put together while the machine still is what it is: what is damaged is found before anything is ended for it,
// and the guest stands still only for the rest. Its memory has no name until the machine starts on it, so a crash leaves nothing.
type ahead struct {
	file     *os.File // nil: the checkpoint was looked at whole, and nothing of it kept
	put      *restoration
	taken    bool
	giveBack func()
}

// lookAhead puts a checkpoint's memory together, and looks at its devices' state and at the layers of its disk.
func (m *machine) lookAhead(ctx context.Context, from checkpoint.Record) (*ahead, error) {
	if err := m.d.layersOf(from); err != nil {
		return nil, err
	}
	if m.record().Shares {
		return m.shareAhead(ctx, from)
	}
	a := &ahead{}
	out, err := a.room(m, from)
	if err != nil {
		return nil, err
	}
	a.put = m.d.restore(context.WithoutCancel(ctx), m, from, out)
	a.giveBack = func() {
		<-a.put.done
		if !a.taken && a.put.devices != nil {
			a.put.devices.Close()
		}
		if a.file != nil {
			a.file.Close()
		}
	}
	if err := a.put.wait(ctx); err != nil {
		a.giveBack()
		return nil, err
	}
	return a, nil
}

// room makes the file for it. Where there is none for a second memory beside the machine's own, there is no file.
func (a *ahead) room(m *machine, from checkpoint.Record) (*os.File, error) {
	if err := m.d.files.prepareRAM(); err != nil {
		return nil, err
	}
	size := from.Spec.Memory
	if free, err := freeBytes(m.d.files.ram); err == nil && free < size {
		return nil, nil
	}
	f, err := os.OpenFile(m.d.files.ram, unix.O_TMPFILE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, fmt.Errorf("memory: %w", err)
	}
	out, err := os.OpenFile(fmt.Sprintf("/proc/self/fd/%d", f.Fd()), os.O_RDWR, 0)
	if err == nil {
		err = f.Truncate(int64(size))
	}
	if err != nil {
		closeFiles([]*os.File{f, out})
		return nil, fmt.Errorf("memory: %w", err)
	}
	a.file = f
	return out, nil
}

// shareAhead is for a machine that has its memory in common with other clones: the file is theirs too.
func (m *machine) shareAhead(ctx context.Context, from checkpoint.Record) (*ahead, error) {
	s, err := m.d.share(ctx, m, from)
	if err != nil {
		return nil, err
	}
	a := &ahead{put: s.ready, giveBack: func() { m.d.unshare(from.ID) }}
	if err := s.ready.wait(ctx); err != nil {
		a.giveBack()
		return nil, err
	}
	return a, nil
}

// layersOf sees that a checkpoint's disk is there, and is one: each layer frozen, and lying on the one before it.
func (d *Daemon) layersOf(from checkpoint.Record) error {
	img, err := d.images.Get(from.Spec.ImageID)
	if err != nil {
		return err
	}
	below, err := d.openTop(img, nil)
	if err != nil {
		return err
	}
	info, err := volume.ReadInfo(below)
	below.Close()
	for _, name := range from.Layers {
		if err != nil {
			break
		}
		under := info.ID
		if info, err = d.readLayer(name); err == nil && (!info.Frozen || info.Parent != under) {
			err = fmt.Errorf("layer %s does not lie where it should", name)
		}
	}
	if err != nil {
		return fmt.Errorf("checkpoint %s: %w: its disk: %w", from.ID, checkpoint.ErrDamaged, err)
	}
	return nil
}

func (d *Daemon) readLayer(name string) (volume.Info, error) {
	f, err := os.Open(d.files.layer(name))
	if err != nil {
		return volume.Info{}, err
	}
	defer f.Close()
	info, err := volume.ReadInfo(f)
	if err != nil {
		return volume.Info{}, fmt.Errorf("layer %s: %w", name, err)
	}
	return info, nil
}

// takeAhead gives the machine the memory that was put together for it, under its name.
func (l *launch) takeAhead(from checkpoint.ID, path string) (f *os.File, err error) {
	a := l.past
	if a == nil || a.file == nil || a.put.from.ID != from {
		return nil, nil
	}
	fd := fmt.Sprintf("/proc/self/fd/%d", a.file.Fd())
	if err := unix.Linkat(unix.AT_FDCWD, fd, unix.AT_FDCWD, path, unix.AT_SYMLINK_FOLLOW); err != nil {
		return nil, fmt.Errorf("memory: %w", err)
	}
	l.back.push(func() { os.Remove(path) })
	a.taken = true
	l.putBack(a.put)
	return a.file, nil
}
