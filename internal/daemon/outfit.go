package daemon

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"vigia/internal/image"
	"vigia/internal/jail"
	"vigia/internal/link"
	qemu "vigia/internal/machine"
	"vigia/internal/vm"
	"vigia/internal/volume"
)

// spawnGuard starts a guard and gives it all of its machine. Where QEMU is there, this guard replaces another; else nbd is the disk's
// socket, on which it is to listen.
func (d *Daemon) spawnGuard(ctx context.Context, m *machine, img image.Image, qemu *jail.Process, nbd *os.File) (*worker, error) {
	w, err := d.spawnWorker(ctx, m, "guard", jail.Guard)
	if err != nil {
		return nil, err
	}
	cfg := link.GuardConfig{ID: m.id(), Name: m.name(), Memory: m.rec.Spec.Memory, CPUs: m.rec.Spec.CPUs,
		Watch: d.watched(), Running: qemu != nil, Stands: m.stands(), Recorded: m.rec.replayMode() == "record", Probe: m.whySampled(), Check: d.opts.Check, Ahead: m.ahead}
	cfg.Replays = m.rec.Replays != nil
	if r := m.record().Replays; r != nil && r.Until != nil {
		at, err := d.resolve(m.id(), r.Recording, *r.Until)
		if err != nil {
			w.end()
			return nil, err
		}
		cfg.Until = &at
	}
	files, err := d.guardFiles(m, img, qemu, nbd, &cfg)
	defer closeFiles(files)
	if err == nil {
		_, err = w.conn.Call(ctx, link.CallConfigure, cfg, nil, files...)
	}
	if err != nil {
		w.end()
		return nil, fmt.Errorf("guard: %w", err)
	}
	return w, nil
}

// guardFiles opens all that a guard works on.
func (d *Daemon) guardFiles(m *machine, img image.Image, qemu *jail.Process, nbd *os.File, cfg *link.GuardConfig) (files []*os.File, err error) {
	add := func(name string, f *os.File, err2 error) {
		if err2 != nil && err == nil {
			err = fmt.Errorf("%s: %w", name, err2)
		}
		if f != nil {
			files, cfg.Files = append(files, f), append(cfg.Files, name)
		}
	}
	overlay, oerr := os.OpenFile(d.files.overlay(m.id()), os.O_RDWR, 0)
	add(link.FileOverlay, overlay, oerr)
	layers, lerr := img.OpenDisk()
	add(link.FileLayer, nil, lerr)
	d.lineage.Lock() // what the record names is there
	for _, name := range m.record().Layers {
		f, ferr := openLayer(d.files.layer(name))
		add("a layer", nil, ferr)
		layers = append(layers, f)
	}
	d.lineage.Unlock()
	for i, f := range layers {
		add(link.FileLayer+strconv.Itoa(i), f, nil)
	}
	profile, perr := img.OpenProfile()
	if !errors.Is(perr, fs.ErrNotExist) {
		add(link.FileProfile, profile, perr)
	}
	reference, perr := img.OpenReference()
	if !errors.Is(perr, fs.ErrNotExist) {
		add(link.FileReference, reference, perr)
	}
	modules, perr := img.OpenModules()
	if !errors.Is(perr, fs.ErrNotExist) {
		add(link.FileModules, modules, perr)
	}
	for i, path := range d.files.consoleLogs(m.id()) {
		flags := os.O_CREATE | os.O_RDWR
		f, ferr := os.OpenFile(path, flags, 0o600)
		name := link.FileConsoleLog
		if i > 0 {
			name = link.FileConsoleTail + strconv.Itoa(i-1)
		}
		add(name, f, ferr)
	}
	if m.private() {
		cfg.PrivateRAM = true
	} else if ram, rerr := d.openRAM(m, qemu); rerr == nil {
		add(link.FileRAM, ram, nil)
	} else if qemu != nil {
		d.log.Warn("the new guard can't see its machine's memory", "machine", m.name(), "error", rerr)
	} else {
		add(link.FileRAM, nil, rerr)
	}
	if page, err := d.openPage(m, qemu); err == nil && page != nil {
		add(link.FileProbe, page, nil)
	} else if err != nil {
		d.log.Warn("the guard can't see the probe's page: it samples", "machine", m.name(), "error", err)
	}
	var nerr error
	if nbd == nil {
		nbd, nerr = d.listenNBD(m)
	}
	add(link.FileNBD, nbd, nerr)
	for _, name := range []string{link.FileQMP, link.FileConsole, link.FileAgent, link.FileFrames} {
		if name == link.FileAgent && !m.rec.Spec.Has(vm.AdditionExec) || name == link.FileFrames && !m.rec.showsFrames() {
			continue
		}
		f, ferr := d.dialQEMU(m, name)
		add(name, f, ferr)
	}
	return files, err
}

// openLayer opens a layer for reading. One that is not frozen was the overlay when something was killed, in the middle of a
// swap: no other machine can have it, and who opens it freezes it.
func openLayer(path string) (*os.File, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	if info, err := volume.ReadInfo(f); err != nil || info.Frozen {
		return f, nil // what can't be read is told by who opens the volume
	}
	f.Close()
	return os.OpenFile(path, os.O_RDWR, 0)
}

// openRAM opens the guest's memory for reading: by its name while the machine starts. Afterwards the name is gone, and
// the daemon hands on the descriptor that it has kept, or got from the guard when it found the machine running.
func (d *Daemon) openRAM(m *machine, qemu *jail.Process) (*os.File, error) {
	m.mu.Lock()
	kept := m.ram
	m.mu.Unlock()
	if kept == nil {
		f, err := os.Open(d.files.ramFile(m.id()))
		if errors.Is(err, fs.ErrNotExist) && qemu != nil {
			f, err = openMapped(qemu.PID, d.files.ramFile(m.id()), os.O_RDONLY)
		}
		if err != nil {
			return nil, err
		}
		m.keepRAM(f)
		kept = f
	}
	fd, err := unix.FcntlInt(kept.Fd(), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	return os.NewFile(uintptr(fd), "ram"), nil
}

// listenNBD opens the disk's socket anew; QEMU finds it by its name, also after a guard's death.
func (d *Daemon) listenNBD(m *machine) (*os.File, error) {
	dir, err := openSocketDir(d.files.qemuDir(m.id()))
	if err != nil {
		return nil, err
	}
	defer dir.close()
	l, err := dir.listen(qemu.NBDSocket)
	if err != nil {
		return nil, err
	}
	if err := os.Chmod(filepath.Join(dir.dir.Name(), qemu.NBDSocket), 0o666); err != nil { // QEMU is another user; only it is shown the directory
		l.Close()
		return nil, err
	}
	return socketFile(l)
}

// dialQEMU connects to one of the sockets on which QEMU listens.
func (d *Daemon) dialQEMU(m *machine, name string) (*os.File, error) {
	dir, err := openSocketDir(d.files.run(m.id()))
	if err != nil {
		return nil, err
	}
	defer dir.close()
	c, err := dir.dial(name + ".sock")
	if err != nil {
		return nil, err
	}
	return socketFile(c)
}

// spawnGate starts a gate and connects it to QEMU's network card.
func (d *Daemon) spawnGate(ctx context.Context, m *machine, publish []vm.Publish, listeners []*os.File) (*worker, error) {
	profile := jail.Gate
	if m.rec.Reenacts != nil {
		profile = jail.GateAlone
	}
	w, err := d.spawnWorker(ctx, m, "gate", profile)
	if err != nil {
		return nil, err
	}
	cfg := link.GateConfig{ID: m.id(), Name: m.name(), MAC: qemu.CardMAC(&m.rec.Spec, m.origin()), Address: m.rec.Spec.Identity.Address, Rules: m.rec.Spec.Net.Rules,
		Publish: publish, Resolvers: hostResolvers("/etc/resolv.conf"), MTU: qemu.MTU, Quarantined: m.rec.Quarantined, Ahead: m.ahead}
	files := slices.Clone(listeners)
	if m.rec.Reenacts != nil {
		play, logs := d.openPlay(*m.rec.Reenacts)
		defer closeFiles(logs)
		cfg.Stage, files = &play, append(files, logs...)
	}
	_, err = w.conn.Call(ctx, link.CallConfigure, cfg, nil, files...)
	if err == nil {
		var card []*os.File
		if card, err = d.dialCard(m); err == nil {
			_, err = w.conn.Call(ctx, link.CallFrames, nil, nil, card...)
			closeFiles(card)
		}
	}
	if err != nil {
		w.end()
		return nil, fmt.Errorf("gate: %w", err)
	}
	return w, nil
}

// dialCard connects to QEMU's network card: by one socket, or where it is recorded by one for each direction.
func (d *Daemon) dialCard(m *machine) (files []*os.File, err error) {
	names := []string{"net"}
	if m.rec.replayMode() == "record" {
		names = append(names, "netin")
	}
	for _, name := range names {
		f, err := d.dialQEMU(m, name)
		if err != nil {
			closeFiles(files)
			return nil, err
		}
		files = append(files, f)
	}
	return files, nil
}

// giveClock hands a guard the descriptors from which it reads the virtual CPUs' time.
func (d *Daemon) giveClock(ctx context.Context, m *machine, guard *worker, pid int) {
	files := vcpuSchedstat(pid)
	defer closeFiles(files)
	if len(files) == 0 {
		d.log.Warn("no thread of a virtual CPU was found: no cpu.usage events", "machine", m.name())
		return
	}
	if _, err := guard.conn.Call(ctx, link.CallCPU, nil, nil, files...); err != nil {
		d.log.Warn("the guard does not take the CPU clock", "machine", m.name(), "error", err)
	}
}

// vcpuThread tells a thread that runs the guest by its name: "CPU n/TCG", "CPU n/KVM", and "ALL CPUs/TCG" where one runs all in turns.
func vcpuThread(comm string) bool {
	return strings.HasPrefix(comm, "CPU ") || strings.HasPrefix(comm, "ALL CPUs/")
}

// vcpuSchedstat opens the schedstat file of each of QEMU's vCPU threads, which QEMU names "CPU n/TCG" or "CPU n/KVM"
// (-name debug-threads=on).
func vcpuSchedstat(pid int) []*os.File {
	tasks := fmt.Sprintf("/proc/%d/task", pid)
	entries, err := os.ReadDir(tasks)
	if err != nil {
		return nil
	}
	var files []*os.File
	for _, e := range entries {
		comm, err := os.ReadFile(filepath.Join(tasks, e.Name(), "comm"))
		if err != nil || !vcpuThread(string(comm)) || len(files) >= link.MaxFiles {
			continue
		}
		if f, err := os.Open(filepath.Join(tasks, e.Name(), "schedstat")); err == nil {
			files = append(files, f)
		}
	}
	return files
}

// openMapped opens a file that a process has mapped and whose name may be gone: QEMU keeps a descriptor of its memory's.
// What else the process has open is not touched.
func openMapped(pid int, path string, flags int) (*os.File, error) {
	for _, dir := range []string{"fd", "map_files"} {
		dir = fmt.Sprintf("/proc/%d/%s", pid, dir)
		entries, err := os.ReadDir(dir)
		if err != nil {
			continue
		}
		for _, e := range entries {
			name := filepath.Join(dir, e.Name())
			if target, err := os.Readlink(name); err == nil && strings.TrimSuffix(target, " (deleted)") == path {
				if f, err := os.OpenFile(name, flags, 0); err == nil {
					return f, nil
				}
			}
		}
	}
	return nil, fmt.Errorf("memory of QEMU: %s is not open to this user: %w", path, fs.ErrNotExist)
}
