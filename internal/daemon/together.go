package daemon

import (
	"context"
	"os"
	"path/filepath"
	"sync"

	"vigia/internal/image"
	"vigia/internal/jail"
	qemu "vigia/internal/machine"
	"vigia/internal/vm"
)

// together starts guard, gate and QEMU at the same time. None of them waits for another to be there: the daemon has made their
// sockets, and what is said to one that is not there yet waits in its queue. QEMU comes up stopped, and its guest's first
// instruction waits for all of them (letGo).
func (l *launch) together(ctx context.Context) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	var guard, gate *worker
	var emulator *jail.Process
	var all sync.WaitGroup
	begin := func(what string, start func() error) {
		all.Go(func() {
			if err := start(); err != nil {
				cancel(err) // the first one's reason is the start's
			}
			l.pace.mark(what)
		})
	}
	served := make(chan struct{})
	begin("guard", func() (err error) { defer close(served); guard, err = l.startGuard(ctx); return err })
	begin("gate", func() (err error) {
		<-served // QEMU is not up before it has its disk from the guard, and needs a gate last of all
		if ctx.Err() == nil {
			gate, err = l.startGate(ctx)
		}
		return err
	})
	begin("qemu", func() (err error) { emulator, err = l.startQEMU(ctx); return err })
	all.Wait()
	l.took(guard, gate, emulator)
	return context.Cause(ctx)
}

// took notes what has come up, also where something has not, and how it goes again: QEMU first, as it began last to need the others.
func (l *launch) took(guard, gate *worker, emulator *jail.Process) {
	if guard != nil {
		l.guard = guard
		l.state.worked(guard)
		l.setWorker("guard", guard)
		l.back.push(func() {
			l.setWorker("guard", nil)
			guard.end()
		})
	}
	l.back.push(func() { l.keepRAM(nil) })
	if gate != nil {
		l.state.worked(gate)
		closeFiles(l.publish) // the gate has its own
		l.publish = nil
		l.back.push(func() {
			l.setWorker("gate", nil)
			gate.end()
		})
	}
	if emulator != nil {
		l.qemu = emulator
		l.state.QEMU, l.state.InForce["qemu"] = refOf(emulator), emulator.Measures
		l.back.push(func() {
			emulator.Kill()
			<-emulator.Done()
			emulator.Close()
		})
		closeFiles(l.files)
	}
}

func (l *launch) startGuard(ctx context.Context) (*worker, error) {
	w, err := l.d.spawnGuard(ctx, l.machine, l.img, nil, l.nbd)
	if err != nil {
		return nil, err
	}
	if l.rec.Spec.Record { // the guard has opened the disk, and put the overlay in its place
		if err := l.settleLayers(ctx, true); err != nil {
			w.end()
			return nil, err
		}
	}
	l.keepInputs(ctx, l.state.Started, w)
	return w, nil
}

func (l *launch) startGate(ctx context.Context) (*worker, error) {
	if l.rec.Spec.Net.Mode != vm.NetNAT {
		return nil, nil
	}
	w, err := l.d.spawnGate(ctx, l.machine, l.state.Publish, l.publish)
	if err != nil {
		return nil, err
	}
	l.setWorker("gate", w)
	if l.record().Quarantined { // it may have been asked for while there was none
		if err := l.settleGate(ctx, w); err != nil {
			l.setWorker("gate", nil)
			w.end()
			return nil, err
		}
	}
	l.keepInputs(ctx, l.state.Started, w)
	return w, nil
}

func (l *launch) startQEMU(ctx context.Context) (*jail.Process, error) {
	paths, binds, err := l.paths()
	if err != nil {
		return nil, err
	}
	args := qemu.Args(qemu.Config{Spec: &l.rec.Spec, Accelerator: l.state.Accelerator, Paths: paths,
		Cmdline: l.img.Cmdline, FDs: l.descriptors(), Reconnect: 300, Origin: l.rec.origin(), Incoming: l.resume != nil, PrivateRAM: l.shared != nil,
		Record: l.rec.replayMode(), Began: l.rec.began()})
	log, err := os.OpenFile(l.d.files.workerLog(l.id(), "qemu"), os.O_CREATE|os.O_WRONLY|os.O_TRUNC|os.O_APPEND, 0o600)
	if err != nil {
		return nil, err
	}
	defer log.Close()
	group, err := l.d.group(l.machine, "qemu", jail.Limits{
		Memory: int64(l.rec.Spec.Memory) + qemuOverhead, CPUs: float64(l.rec.Spec.CPUs) + 0.5, PIDs: qemuThreads})
	if err != nil {
		return nil, err
	}
	return jail.QEMU{Tag: l.d.tag(l.machine, "qemu"), Binary: l.d.qemu, Args: args, Files: l.files, Stdout: log, Stderr: log, Binds: binds,
		KVM: l.state.Accelerator == "kvm", User: l.user("qemu"), Group: group, MaxFile: l.rec.Spec.Memory + logMost + l.rec.recordMost()}.Start(ctx)
}

// paths says what QEMU finds where, and binds it there. The host's own paths serve, but for a socket's that is too
// long for its address.
func (l *launch) paths() (qemu.Paths, []jail.Bind, error) {
	ram, sockets := l.d.files.ramFile(l.id()), l.d.files.qemuDir(l.id())
	if l.shared != nil {
		ram = l.shared.path
	}
	p := qemu.Paths{RAM: ram, Kernel: l.img.Path(image.PartKernel), Initrd: l.img.Path(image.PartInitrd), NBD: filepath.Join(sockets, qemu.NBDSocket)}
	if l.rec.replayMode() == "" { // what was recorded with the image's own is replayed with them
		p.Kernel, p.Initrd = l.d.bootFiles(l.img)
	}
	binds := []jail.Bind{
		{Source: ram, Write: true, Reason: "the guest's memory"},
		{Source: p.Kernel, Reason: "the guest's kernel"},
	}
	if p.Initrd != "" {
		binds = append(binds, jail.Bind{Source: p.Initrd, Reason: "the guest's initrd"})
	}
	if p.Plugin = l.plugin; l.plugin != "" {
		binds = append(binds, jail.Bind{Source: l.plugin, Exec: true, Reason: "the plugin that tells the guard what the guest's kernel does"})
	}
	if mode := l.rec.replayMode(); mode != "" {
		p.Log = l.d.files.recordingLog(l.id())
		binds = append(binds, jail.Bind{Source: p.Log, Write: mode == "record", Reason: "the recording of what enters the machine"})
	}
	const longest = 100 // of the 108 bytes of a unix socket's address
	disk := jail.Bind{Source: sockets, Reason: "the socket of the disk"}
	if len(p.NBD) > longest {
		disk.Target = "/run/vigia"
		p.NBD = filepath.Join(disk.Target, qemu.NBDSocket)
	}
	return p, append(binds, disk), nil
}
