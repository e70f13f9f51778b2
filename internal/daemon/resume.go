package daemon

import (
	"context"
	"fmt"
	"os"

	"golang.org/x/sys/unix"

	"vigia/internal/checkpoint"
	"vigia/internal/link"
	"vigia/internal/vm"
)

// goesOnFrom is the checkpoint that this start goes on from; nil where the machine boots.
func (l *launch) goesOnFrom() (*checkpoint.Record, error) {
	id := l.record().Resume
	if id == "" {
		return nil, nil
	}
	r, err := l.d.checkpoints.Get(id)
	if err != nil {
		return nil, err
	}
	return &r, l.d.usable(r)
}

// forgetFalseStart gives a machine that goes on from a checkpoint the disk of it. An earlier start may have let the guest go, and
// been killed before the record said so: what the guest has written then is not what the memory of the checkpoint knows.
func (l *launch) forgetFalseStart() error {
	rec := l.record()
	if rec.Resume == "" {
		return nil
	}
	return l.freshOverlay(rec.Layers)
}

// putBack takes a restoration that has begun; its end is waited for whatever becomes of the start.
func (l *launch) putBack(r *restoration) {
	l.resume = r
	l.back.push(func() {
		<-r.done
		if r.devices != nil {
			r.devices.Close()
		}
	})
}

// shareRAM maps a checkpoint's memory for this machine.
func (l *launch) shareRAM(from checkpoint.Record) error {
	s, err := l.d.share(l.d.ctx, l.machine, from)
	if err != nil {
		return err
	}
	l.back.push(func() {
		l.keepRAM(nil)
		l.d.unshare(from.ID)
	})
	fd, err := unix.FcntlInt(s.file.Fd(), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		return err
	}
	l.keepRAM(os.NewFile(uintptr(fd), "shared ram"))
	l.shared, l.resume = s, s.ready
	l.state.PrivateRAM, l.state.Shared = true, from.ID
	return nil
}

// load gives QEMU the state of its devices, once its memory is as it was; nothing to one that boots.
func (l *launch) load(ctx context.Context) error {
	if l.resume == nil {
		return nil
	}
	ctx, cancel := l.whileQEMU(ctx)
	defer cancel()
	if err := l.resume.wait(ctx); err != nil {
		return err
	}
	// Each reader has its own place in the file: other clones read it too.
	devices, err := os.Open(fmt.Sprintf("/proc/self/fd/%d", l.resume.devices.Fd()))
	if err != nil {
		return err
	}
	defer devices.Close()
	if _, err := l.guard.conn.Call(ctx, link.CallIncoming, nil, nil, devices); err != nil {
		return l.whyNot(err)
	}
	if l.shared == nil {
		l.resume.devices.Close()
	}
	return nil
}

// showMemory lets a guard see the memory that QEMU has for itself.
func (m *machine) showMemory(ctx context.Context, guard *worker, pid int) error {
	m.mu.Lock()
	kept := m.ram
	m.mu.Unlock()
	if kept == nil {
		return fmt.Errorf("memory of %s is not at hand", m.name())
	}
	base, err := mappedAt(pid, kept)
	if err != nil {
		return err
	}
	mem, err := os.Open(fmt.Sprintf("/proc/%d/mem", pid))
	if err != nil {
		return err
	}
	defer mem.Close()
	_, err = guard.conn.Call(ctx, link.CallMemory, link.Memory{Base: base}, nil, mem)
	return err
}

// private says whether QEMU has the machine's memory for itself, in this run or the one that begins.
func (m *machine) private() bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.rec.Run != nil {
		return m.rec.Run.PrivateRAM
	}
	return m.rec.Shares && m.rec.Resume != ""
}

func (m *machine) origin() vm.ID {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.rec.origin()
}

// giveBackRAM gets the descriptor of the guest's memory again, for a new daemon.
func (m *machine) giveBackRAM(ctx context.Context, pid int) ([]*os.File, error) {
	if run := m.record().Run; run != nil && run.PrivateRAM {
		f, err := openMapped(pid, m.d.files.ramFile(vm.ID(run.Shared)), os.O_RDONLY)
		if err != nil {
			return nil, err
		}
		return []*os.File{f}, nil
	}
	return m.guard.conn.Call(ctx, link.CallRAM, nil, nil)
}
