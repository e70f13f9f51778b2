package daemon

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"vigia/internal/event"
	"vigia/internal/image"
	"vigia/internal/jail"
	"vigia/internal/link"
	qemu "vigia/internal/machine"
	"vigia/internal/vm"
)

// What a machine's processes may use of the host beside its RAM: QEMU itself and its translation cache, a disk and
// console's buffers; a guard's or gate's heap.
const (
	qemuOverhead = 512 << 20
	qemuThreads  = 256
	runTime      = time.Minute // for QEMU to come up and let the guest go
)

var workerLimits = jail.Limits{Memory: 512 << 20, PIDs: 256}

// logMost is the largest log that QEMU or a worker may write, in bytes; beyond it the process ends.
const logMost = 64 << 20

// launch is one start of a machine: what it has opened so far, and the way back.
type launch struct {
	*machine
	img     image.Image
	run     runState
	sockets socketDir
	back    undo
	files   []*os.File // QEMU's descriptors, from 3 on
	publish []*os.File
}

// start runs a machine. On an error everything it did is undone.
func (m *machine) start(ctx context.Context) error {
	m.op.Lock()
	defer m.op.Unlock()
	m.mu.Lock()
	if m.qemu != nil {
		m.mu.Unlock()
		return fmt.Errorf("machine %s runs already: %w", m.name(), errState)
	}
	m.starting = true
	m.mu.Unlock()
	defer func() {
		m.mu.Lock()
		m.starting = false
		m.mu.Unlock()
	}()
	l := &launch{machine: m, run: runState{Started: time.Now().UTC(), InForce: map[string][]jail.Measure{}}}
	if err := l.steps(ctx); err != nil {
		l.back.unwind()
		return fmt.Errorf("start %s: %w", m.name(), err)
	}
	l.back.forget()
	m.d.bus.emit(m.name(), event.MachineStarted, event.Fields{"accelerator": l.run.Accelerator, "pid": int64(l.run.QEMU.PID)})
	return nil
}

// steps are taken in order, each pushing its reversal.
func (l *launch) steps(ctx context.Context) error {
	for _, step := range []func(context.Context) error{
		l.prepare, l.bindPorts, l.makeRAM, l.listen, l.startGuard, l.startGate, l.startQEMU, l.letGo,
	} {
		if err := ctx.Err(); err != nil {
			return err
		}
		if err := step(ctx); err != nil {
			return err
		}
	}
	return nil
}

// prepare finds what the machine is made of and makes its run directory.
func (l *launch) prepare(ctx context.Context) error {
	var err error
	if l.img, err = l.d.images.Get(l.rec.Spec.ImageID); err != nil {
		return err
	}
	l.run.Accelerator = l.d.accelerator
	l.d.sweepRun(l.id()) // what a crash may have left
	if err := os.MkdirAll(l.d.files.qemuDir(l.id()), 0o711); err != nil {
		return err
	}
	l.back.push(func() { l.d.sweepRun(l.id()) })
	l.sockets, err = openSocketDir(l.d.files.run(l.id()))
	if err == nil {
		l.back.push(l.sockets.close)
	}
	return err
}

// bindPorts opens the published ports here, so that one in use is found before anything runs.
func (l *launch) bindPorts(context.Context) error {
	files, chosen, err := bindPublished(l.rec.Spec.Publish)
	if err != nil {
		return err
	}
	l.publish, l.run.Publish = files, chosen
	l.back.push(func() { closeFiles(files) })
	return nil
}

func bindPublished(ports []vm.Publish) (files []*os.File, chosen []vm.Publish, err error) {
	for _, p := range ports {
		f, at, err := bindPort(p)
		if err != nil {
			closeFiles(files)
			return nil, nil, fmt.Errorf("publish %s: %w: choose another host port, or find what uses it with: ss -lntup", p, err)
		}
		files, chosen = append(files, f), append(chosen, at)
	}
	return files, chosen, nil
}

func bindPort(p vm.Publish) (*os.File, vm.Publish, error) {
	if p.Protocol == "udp" {
		c, err := net.ListenUDP("udp", net.UDPAddrFromAddrPort(p.Host))
		if err != nil {
			return nil, p, cause(err)
		}
		p.Host = c.LocalAddr().(*net.UDPAddr).AddrPort()
		f, err := socketFile(c)
		return f, p, err
	}
	l, err := net.ListenTCP("tcp", net.TCPAddrFromAddrPort(p.Host))
	if err != nil {
		return nil, p, cause(err)
	}
	p.Host = l.Addr().(*net.TCPAddr).AddrPort()
	f, err := socketFile(l)
	return f, p, err
}

// cause is the system's own word of a network error.
func cause(err error) error {
	var se *os.SyscallError
	if errors.As(err, &se) {
		return se.Err
	}
	return err
}

// makeRAM makes the file that is the guest's memory. Its name is removed once QEMU has it: a crash leaves none behind.
func (l *launch) makeRAM(context.Context) error {
	size := l.rec.Spec.Memory
	if free, err := freeBytes(l.d.files.ram); err == nil && free < size {
		return fmt.Errorf("memory %s: only %d MiB are free in /dev/shm: use less, stop another machine, or enlarge it (mount -o remount,size=… /dev/shm)", vm.FormatSize(size), free>>20)
	}
	path := l.d.files.ramFile(l.id())
	f, err := os.OpenFile(path, os.O_CREATE|os.O_EXCL|os.O_RDWR, 0o600)
	if err != nil {
		return fmt.Errorf("memory: %w", err)
	}
	defer f.Close()
	l.back.push(func() { os.Remove(path) })
	if err := f.Truncate(int64(size)); err != nil {
		return fmt.Errorf("memory: %w", err)
	}
	return l.give(f)
}

// give makes a file QEMU's own user's.
func (l *launch) give(f *os.File) error {
	if u := l.user("qemu"); u != nil {
		return f.Chown(u.UID, u.GID)
	}
	return nil
}

// qemuSockets are the sockets on which QEMU listens, in the order of its descriptors.
func (l *launch) qemuSockets() []string {
	names := []string{"qmp", "console"}
	if l.rec.Spec.Net.Mode == vm.NetNAT {
		names = append(names, "net")
	}
	if l.rec.Spec.Has(vm.AdditionExec) {
		names = append(names, "agent")
	}
	return names
}

// listen opens QEMU's sockets: a connection made now waits in their queues until QEMU takes it.
func (l *launch) listen(context.Context) error {
	for _, name := range l.qemuSockets() {
		socket, err := l.sockets.listen(name + ".sock")
		if err != nil {
			return err
		}
		f, err := socketFile(socket)
		if err != nil {
			return err
		}
		l.files = append(l.files, f)
		l.back.push(func() { f.Close() })
	}
	return nil
}

// descriptors says where startQEMU puts the sockets.
func (l *launch) descriptors() qemu.Descriptors {
	at := map[string]int{}
	for i, name := range l.qemuSockets() {
		at[name] = 3 + i
	}
	return qemu.Descriptors{QMP: at["qmp"], Console: at["console"], Net: at["net"], Agent: at["agent"]}
}

func (l *launch) startGuard(ctx context.Context) error {
	w, err := l.d.spawnGuard(ctx, l.machine, l.img, false)
	if err != nil {
		return err
	}
	l.guard = w
	l.run.Guard, l.run.InForce["guard"] = refOf(w.proc), w.proc.Measures
	l.back.push(func() { w.end(); l.setWorkers(nil, nil) })
	return nil
}

func (l *launch) startGate(ctx context.Context) error {
	if l.rec.Spec.Net.Mode != vm.NetNAT {
		return nil
	}
	w, err := l.d.spawnGate(ctx, l.machine, l.run.Publish, l.publish)
	if err != nil {
		return err
	}
	l.gate = w
	l.run.Gate, l.run.InForce["gate"] = refOf(w.proc), w.proc.Measures
	closeFiles(l.publish) // the gate has its own
	l.publish = nil
	l.back.push(func() { w.end() })
	return nil
}

func (m *machine) setWorkers(guard, gate *worker) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.guard, m.gate = guard, gate
}

func (l *launch) startQEMU(ctx context.Context) error {
	paths, binds, err := l.paths()
	if err != nil {
		return err
	}
	args := qemu.Args(qemu.Config{Spec: &l.rec.Spec, Accelerator: l.run.Accelerator, Paths: paths,
		Cmdline: l.img.Cmdline, FDs: l.descriptors(), Reconnect: 300})
	log, err := os.OpenFile(l.d.files.workerLog(l.id(), "qemu"), os.O_CREATE|os.O_WRONLY|os.O_TRUNC|os.O_APPEND, 0o600)
	if err != nil {
		return err
	}
	defer log.Close()
	group, err := l.d.group(l.machine, "qemu", jail.Limits{
		Memory: int64(l.rec.Spec.Memory) + qemuOverhead, CPUs: float64(l.rec.Spec.CPUs) + 0.5, PIDs: qemuThreads})
	if err != nil {
		return err
	}
	proc, err := jail.QEMU{Tag: l.d.tag(l.machine, "qemu"), Binary: l.d.qemu, Args: args, Files: l.files, Stdout: log, Stderr: log, Binds: binds,
		KVM: l.run.Accelerator == "kvm", User: l.user("qemu"), Group: group, MaxFile: l.rec.Spec.Memory + logMost}.Start(ctx)
	if err != nil {
		return err
	}
	l.run.QEMU, l.run.InForce["qemu"] = refOf(proc), proc.Measures
	l.mu.Lock()
	l.qemu = proc
	l.mu.Unlock()
	l.back.push(func() {
		proc.Kill()
		<-proc.Done()
		proc.Close()
		l.mu.Lock()
		l.qemu = nil
		l.mu.Unlock()
	})
	closeFiles(l.files)
	return nil
}

// paths says what QEMU finds where, and binds it there. The host's own paths serve, but for a socket's that is too
// long for its address.
func (l *launch) paths() (qemu.Paths, []jail.Bind, error) {
	ram, sockets := l.d.files.ramFile(l.id()), l.d.files.qemuDir(l.id())
	p := qemu.Paths{RAM: ram, Kernel: l.img.Path(image.PartKernel), NBD: filepath.Join(sockets, qemu.NBDSocket)}
	binds := []jail.Bind{
		{Source: ram, Write: true, Reason: "the guest's memory"},
		{Source: p.Kernel, Reason: "the guest's kernel"},
	}
	if initrd := l.img.Path(image.PartInitrd); initrd != "" {
		p.Initrd = initrd
		binds = append(binds, jail.Bind{Source: initrd, Reason: "the guest's initrd"})
	}
	const longest = 100 // of the 108 bytes of a unix socket's address
	disk := jail.Bind{Source: sockets, Reason: "the socket of the disk"}
	if len(p.NBD) > longest {
		disk.Target = "/run/vigia"
		p.NBD = filepath.Join(disk.Target, qemu.NBDSocket)
	}
	return p, append(binds, disk), nil
}

// letGo waits for QEMU's monitor, hands the guard what only the daemon can open, and lets the guest run.
func (l *launch) letGo(ctx context.Context) error {
	ctx, cancel := context.WithTimeoutCause(ctx, runTime, errors.New("QEMU did not come up in a minute"))
	defer cancel()
	go func() {
		select {
		case <-l.qemu.Done():
			cancel()
		case <-ctx.Done():
		}
	}()
	if _, err := l.guard.conn.Call(ctx, link.CallRun, nil, nil); err != nil {
		return l.whyNot(err)
	}
	os.Remove(l.d.files.ramFile(l.id())) // QEMU and the guard have it
	l.mu.Lock()
	l.rec.Run, l.rec.Failed, l.rec.Ended, l.rec.Reason, l.rec.Paused = &l.run, false, vm.EndedNone, "", false
	l.ended, l.replaced = make(chan struct{}), nil
	err := l.save(ctx)
	l.mu.Unlock()
	if err != nil {
		return err
	}
	l.d.giveClock(ctx, l.machine, l.run.QEMU.PID)
	l.d.watchRun(l.machine)
	l.sockets.close()
	return nil
}

// whyNot tells of a QEMU that did not come up in its own words, where it left some.
func (l *launch) whyNot(err error) error {
	select {
	case <-l.qemu.Done():
	case <-time.After(time.Second):
		return fmt.Errorf("QEMU did not come up: %w", err)
	}
	if tail := l.d.qemuLogTail(l.id()); tail != "" {
		return fmt.Errorf("QEMU ended at once (%s): %s", l.qemu.Exit(), tail)
	}
	return fmt.Errorf("QEMU ended at once: %s", l.qemu.Exit())
}

// spawnGuard starts a guard and gives it all of its machine. running: QEMU is there, this guard replaces another.
func (d *Daemon) spawnGuard(ctx context.Context, m *machine, img image.Image, running bool) (*worker, error) {
	w, err := d.spawnWorker(ctx, m, "guard", jail.Guard)
	if err != nil {
		return nil, err
	}
	cfg := link.GuardConfig{ID: m.id(), Name: m.name(), Memory: m.rec.Spec.Memory, CPUs: m.rec.Spec.CPUs,
		Watch: d.watched(), Running: running}
	files, err := d.guardFiles(m, img, &cfg)
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
func (d *Daemon) guardFiles(m *machine, img image.Image, cfg *link.GuardConfig) (files []*os.File, err error) {
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
	for i, f := range layers {
		add(link.FileLayer+strconv.Itoa(i), f, nil)
	}
	profile, perr := img.OpenProfile()
	if !errors.Is(perr, fs.ErrNotExist) {
		add(link.FileProfile, profile, perr)
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
	if ram, rerr := d.openRAM(m); rerr == nil {
		add(link.FileRAM, ram, nil)
	} else if running := m.qemu != nil; running {
		d.log.Warn("the new guard can't see its machine's memory", "machine", m.name(), "error", rerr)
	} else {
		add(link.FileRAM, nil, rerr)
	}
	nbd, nerr := d.listenNBD(m)
	add(link.FileNBD, nbd, nerr)
	for _, name := range []string{link.FileQMP, link.FileConsole, link.FileAgent} {
		if name == link.FileAgent && !m.rec.Spec.Has(vm.AdditionExec) {
			continue
		}
		f, ferr := d.dialQEMU(m, name)
		add(name, f, ferr)
	}
	return files, err
}

// openRAM opens the guest's memory for reading: by its name while the machine starts. Afterwards the name is gone, and
// the daemon hands on the descriptor that it has kept, or got from the guard when it found the machine running.
func (d *Daemon) openRAM(m *machine) (*os.File, error) {
	if m.ram == nil {
		f, err := os.Open(d.files.ramFile(m.id()))
		m.mu.Lock()
		qemu := m.qemu
		m.mu.Unlock()
		if errors.Is(err, fs.ErrNotExist) && qemu != nil {
			f, err = openMapped(qemu.PID, d.files.ramFile(m.id()))
		}
		if err != nil {
			return nil, err
		}
		m.ram = f
	}
	fd, err := syscall.Dup(int(m.ram.Fd()))
	if err != nil {
		return nil, err
	}
	syscall.CloseOnExec(fd)
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
	w, err := d.spawnWorker(ctx, m, "gate", jail.Gate)
	if err != nil {
		return nil, err
	}
	cfg := link.GateConfig{ID: m.id(), Name: m.name(), MAC: qemu.MAC(m.id()).String(), Rules: m.rec.Spec.Net.Rules,
		Publish: publish, Resolvers: hostResolvers("/etc/resolv.conf"), MTU: qemu.MTU, Quarantined: m.rec.Quarantined}
	_, err = w.conn.Call(ctx, link.CallConfigure, cfg, nil, listeners...)
	if err == nil {
		var card *os.File
		if card, err = d.dialQEMU(m, "net"); err == nil {
			_, err = w.conn.Call(ctx, link.CallFrames, nil, nil, card)
			card.Close()
		}
	}
	if err != nil {
		w.end()
		return nil, fmt.Errorf("gate: %w", err)
	}
	return w, nil
}

// giveClock hands the guard the descriptors from which it reads the virtual CPUs' time.
func (d *Daemon) giveClock(ctx context.Context, m *machine, pid int) {
	files := vcpuSchedstat(pid)
	defer closeFiles(files)
	if len(files) == 0 {
		d.log.Warn("no thread of a virtual CPU was found: no cpu.usage events", "machine", m.name())
		return
	}
	if _, err := m.callGuard(ctx, link.CallCPU, nil, nil, files...); err != nil {
		d.log.Warn("the guard does not take the CPU clock", "machine", m.name(), "error", err)
	}
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
		if err != nil || !strings.HasPrefix(string(comm), "CPU ") || len(files) >= link.MaxFiles {
			continue
		}
		if f, err := os.Open(filepath.Join(tasks, e.Name(), "schedstat")); err == nil {
			files = append(files, f)
		}
	}
	return files
}

// openMapped opens a file that a process has mapped and whose name may be gone.
func openMapped(pid int, path string) (*os.File, error) {
	dir := fmt.Sprintf("/proc/%d/map_files", pid)
	entries, err := os.ReadDir(dir)
	if err != nil {
		return nil, fmt.Errorf("memory of QEMU: %w", err)
	}
	for _, e := range entries {
		name := filepath.Join(dir, e.Name())
		if target, err := os.Readlink(name); err == nil && strings.TrimSuffix(target, " (deleted)") == path {
			return os.Open(name)
		}
	}
	return nil, fmt.Errorf("memory of QEMU: %s is not mapped: %w", path, fs.ErrNotExist)
}

// qemuLogTail is the last line that QEMU wrote to its standard error, in printable characters.
func (d *Daemon) qemuLogTail(id vm.ID) string {
	f, err := os.Open(d.files.workerLog(id, "qemu"))
	if err != nil {
		return ""
	}
	defer f.Close()
	if info, err := f.Stat(); err == nil && info.Size() > 4096 {
		f.Seek(-4096, io.SeekEnd)
	}
	b, _ := io.ReadAll(io.LimitReader(f, 4096))
	lines := strings.Split(strings.TrimSpace(string(b)), "\n")
	return event.Text([]byte(strings.TrimPrefix(lines[len(lines)-1], "qemu-system-x86_64: ")))
}

func closeFiles(files []*os.File) {
	for _, f := range files {
		if f != nil {
			f.Close()
		}
	}
}
