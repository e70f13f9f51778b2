package daemon

import (
	"context"
	"errors"
	"fmt"
	"os"
	"time"

	"connectrpc.com/connect"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/types/known/timestamppb"

	"vigia/internal/api/vigiav1"
	"vigia/internal/checkpoint"
	"vigia/internal/convert"
	"vigia/internal/event"
)

// What lies between two of a machine's checkpoints, or between one and now, is found by two confined processes: one reads both disks,
// one both memories, which keepers put together for it. Now is a checkpoint too, made for this and removed again; of a machine that does
// not run the disk alone can be compared.

// between is what was found.
type between struct {
	from, to  checkpoint.Record // to has no ID where it is the disk of a machine that does not run
	files     convert.Files
	processes convert.Processes
	notes     []string
}

// difference compares a checkpoint with another, or where that has no ID with now.
func (m *machine) difference(ctx context.Context, from, to checkpoint.Record) (b between, err error) {
	b.from, b.to = from, to
	if to.ID == "" && m.running() != nil {
		if b.to, err = m.checkpoint(ctx, "to compare with "+string(from.ID), false); err != nil {
			return b, err
		}
		defer func() {
			if rerr := m.d.removeCheckpoint(b.to, "it was made to compare with"); err == nil {
				err = rerr
			}
		}()
	}
	for _, r := range []checkpoint.Record{b.from, b.to} {
		if r.ID != "" && (r.Spec.ImageID != m.rec.Spec.ImageID || r.Spec.Memory != m.rec.Spec.Memory) {
			return b, fmt.Errorf("checkpoint %s is of another image, or of a machine with other memory: %w", r.ID, errState)
		}
	}
	if b.files, err = m.diffDisks(ctx, b.from, b.to); err != nil {
		return b, err
	}
	if b.to.ID == "" {
		b.notes = append(b.notes, "the machine does not run: it has no processes to compare with")
		return b, nil
	}
	if b.processes, err = m.diffProcesses(ctx, b.from, b.to); err != nil {
		if ctx.Err() != nil {
			return b, err
		}
		b.notes = append(b.notes, "the processes are not known: "+event.Text([]byte(err.Error())))
	}
	return b, nil
}

func (m *machine) diffDisks(ctx context.Context, from, to checkpoint.Record) (convert.Files, error) {
	disks, done, err := m.openDisks(ctx, from, to)
	defer done()
	if err != nil {
		return convert.Files{}, err
	}
	ctx, cancel := context.WithTimeout(ctx, compareTime)
	defer cancel()
	return m.d.convert.Differ(ctx, disks)
}

func (m *machine) diffProcesses(ctx context.Context, from, to checkpoint.Record) (found convert.Processes, err error) {
	img, err := m.d.images.Get(m.rec.Spec.ImageID)
	if err != nil {
		return found, err
	}
	profile, err := img.OpenProfile()
	if err != nil {
		return found, errors.New("this machine's image has no kernel profile: import it with its kernel")
	}
	defer profile.Close()
	unlock, err := m.lock(ctx) // one keeper of the machine's puts memory together at a time
	if err != nil {
		return found, err
	}
	defer unlock()
	a, err := m.memoryOf(ctx, from)
	if err != nil {
		return found, err
	}
	defer a.Close()
	b, err := m.memoryOf(ctx, to)
	if err != nil {
		return found, err
	}
	defer b.Close()
	ctx, cancel := context.WithTimeout(ctx, compareTime)
	defer cancel()
	return m.d.convert.Processes(ctx, m.rec.Spec.Memory, a, b, profile)
}

// memoryOf puts a checkpoint's memory together in a file without a name.
func (m *machine) memoryOf(ctx context.Context, c checkpoint.Record) (*os.File, error) {
	if free, err := freeBytes(m.d.files.ram); err == nil && free < c.Spec.Memory {
		return nil, fmt.Errorf("only %d MiB are free for the memory of checkpoint %s", free>>20, c.ID)
	}
	fd, err := unix.MemfdCreate("memory", unix.MFD_CLOEXEC)
	if err != nil {
		return nil, err
	}
	f := os.NewFile(uintptr(fd), "memory")
	out, err := os.OpenFile(fmt.Sprintf("/proc/self/fd/%d", fd), os.O_RDWR, 0)
	if err == nil {
		err = f.Truncate(int64(c.Spec.Memory))
	}
	if err != nil {
		f.Close()
		return nil, err
	}
	r := m.d.restore(ctx, m, c, out)
	<-r.done
	if r.devices != nil {
		r.devices.Close()
	}
	if r.err != nil {
		f.Close()
		return nil, r.err
	}
	return f, nil
}

// Diff lists what lies between two checkpoints of a machine.
func (s checkpointsServer) Diff(ctx context.Context, r *connect.Request[vigiav1.DiffRequest]) (*connect.Response[vigiav1.DiffResponse], error) {
	began := time.Now()
	m, err := s.d.machine(r.Msg.Name)
	if err != nil {
		return nil, err
	}
	from, err := s.d.findCheckpoint(r.Msg.From)
	if err != nil {
		return nil, err
	}
	var to checkpoint.Record
	if r.Msg.To != "" {
		if to, err = s.d.findCheckpoint(r.Msg.To); err != nil {
			return nil, err
		}
	}
	unpin, err := s.d.pinAll(from.ID, to.ID)
	if err != nil {
		return nil, err
	}
	defer unpin()
	b, err := m.difference(ctx, from, to)
	if err != nil {
		return nil, err
	}
	out := &vigiav1.DiffResponse{From: string(from.ID), To: string(to.ID), FilesLeftOut: b.files.LeftOut, ProcessesLeftOut: b.processes.LeftOut,
		Notes: append(b.files.Notes, b.notes...), TookMs: time.Since(began).Seconds() * 1000}
	for _, c := range b.files.Files {
		out.Files = append(out.Files, &vigiav1.ChangedFile{Path: c.Path, Change: c.Change, What: c.What, Before: nodeMessage(c.Before), After: nodeMessage(c.After)})
	}
	for _, p := range b.processes.List {
		out.Processes = append(out.Processes, &vigiav1.ChangedProcess{Change: p.Change, What: p.What, Pid: p.PID, Ppid: p.PPID, Uid: int64(p.UID), Euid: int64(p.EUID),
			Comm: p.Comm, Cmdline: p.Cmdline, Exe: p.Exe})
	}
	return connect.NewResponse(out), nil
}

func nodeMessage(n *convert.FileState) *vigiav1.FileState {
	if n == nil {
		return nil
	}
	return &vigiav1.FileState{Mode: n.Mode, Size: n.Size, Uid: n.UID, Gid: n.GID, Modified: timestamppb.New(n.Modified)}
}

// pinAll is pin for those that have an ID.
func (d *Daemon) pinAll(ids ...checkpoint.ID) (unpin func(), err error) {
	var undone []func()
	unpin = func() {
		for _, f := range undone {
			f()
		}
	}
	for _, id := range ids {
		if id == "" {
			continue
		}
		f, err := d.pin(id)
		if err != nil {
			unpin()
			return nil, err
		}
		undone = append(undone, f)
	}
	return unpin, nil
}
