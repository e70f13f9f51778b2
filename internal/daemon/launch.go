package daemon

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"strings"
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
	runTime      = time.Minute // for QEMU to come up and let the guest go, whatever a guard says
)

// workerLimits are a guard's or gate's. A guard has a CPU for what each of its guest's asks for, and one to look at the guest's
// memory with; a gate has one for frames and one for flows. One that was taken over takes no more of the host.
func (m *machine) workerLimits(name string) jail.Limits {
	l := jail.Limits{Memory: 512 << 20, PIDs: 256, CPUs: 2}
	if name == "guard" {
		l.CPUs = float64(m.rec.Spec.CPUs) + 1
	}
	return l
}

// logMost is the largest log that QEMU or a worker may write, in bytes; beyond it the process ends.
const logMost = 64 << 20

// launch is one start of a machine: what it has opened so far, and the way back.
type launch struct {
	*machine
	img     image.Image
	state   runState
	qemu    *jail.Process
	guard   *worker
	sockets socketDir
	back    undo
	files   []*os.File   // QEMU's descriptors, from 3 on
	resume  *restoration // a checkpoint that it goes on from
	shared  *shared      // whose memory it maps for itself
	publish []*os.File
	plugin  string // QEMU's, where it gets one
	nbd     *os.File
	stays   bool // its guest had panicked: it is looked at, and does not go on before somebody says so
	pace    pace
}

// start runs a machine. On an error, and when the caller leaves before it runs, everything it did is undone.
func (m *machine) start(ctx context.Context) error {
	unlock, err := m.lock(ctx)
	if err != nil {
		return err
	}
	defer unlock()
	if !m.d.begin() {
		return errEnding
	}
	defer m.d.tasks.Done()
	return m.startLocked(ctx)
}

func newLaunch(m *machine) *launch {
	return &launch{machine: m, pace: newPace(), state: runState{Started: time.Now().UTC(), InForce: map[string][]jail.Measure{}}}
}

// startLocked is start for who has the machine's lock.
func (m *machine) startLocked(ctx context.Context) error {
	l := newLaunch(m)
	return l.start(ctx, l.steps)
}

// start takes steps, and undoes all that this start has done so far where one fails.
func (l *launch) start(ctx context.Context, take func(context.Context) error) error {
	m := l.machine
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	defer context.AfterFunc(m.d.ctx, func() { cancel(errEnding) })()
	m.mu.Lock()
	if m.run != nil {
		m.mu.Unlock()
		return fmt.Errorf("machine %s runs already: %w", m.name(), errState)
	}
	m.cancelStart = cancel
	m.mu.Unlock()
	err := take(ctx)
	if err != nil {
		l.back.unwind()
		if cause := context.Cause(ctx); cause != nil {
			err = cause
		}
		err = fmt.Errorf("start %s: %w", m.name(), err)
	}
	m.mu.Lock()
	m.cancelStart = nil
	m.mu.Unlock()
	return err
}

// steps are taken in order, each pushing its reversal.
func (l *launch) steps(ctx context.Context) error {
	err := l.follow(ctx, append(l.first(), l.last()...))
	if err == nil {
		l.d.log.Debug("a start's way", "machine", l.name(), "ms", l.pace.String())
	}
	return err
}

type step struct {
	name string
	take func(context.Context) error
}

// first is what can be done before anybody has asked for the machine, last the rest.
func (l *launch) first() []step {
	return []step{{"prepare", l.prepare}, {"ports", l.bindPorts}, {"memory", l.makeRAM}, {"page", l.makePage}, {"log", l.makeLog},
		{"listen", l.listen}, {"processes", l.together}, {"loaded", l.load}}
}

func (l *launch) last() []step { return []step{{"going", l.letGo}, {"settled", l.settle}} }

func (l *launch) follow(ctx context.Context, steps []step) error {
	for _, step := range steps {
		if err := ctx.Err(); err != nil {
			return err
		}
		if err := step.take(ctx); err != nil {
			return err
		}
		l.pace.mark(step.name)
	}
	return nil
}

// prepare finds what the machine is made of and makes its run directory.
func (l *launch) prepare(ctx context.Context) error {
	var err error
	if l.img, err = l.d.images.Get(l.rec.Spec.ImageID); err != nil {
		return err
	}
	l.state.Accelerator = l.d.accelerator
	l.d.sweepRun(l.id()) // what a crash may have left
	l.beginInputs()
	if err := l.forgetFalseStart(); err != nil {
		return err
	}
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
	l.publish, l.state.Publish = files, chosen
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
	if err := l.d.files.prepareRAM(); err != nil { // again: whoever tidies /dev/shm up removes an empty directory
		return err
	}
	from, err := l.goesOnFrom()
	if err != nil {
		return err
	}
	path := l.d.files.ramFile(l.id())
	if from != nil {
		l.stays = from.Panicked
		if f, err := l.takeAhead(from.ID, path); f != nil || err != nil {
			return errors.Join(err, l.give(f))
		}
	}
	if free, err := freeBytes(l.d.files.ram); err == nil && free < size {
		return fmt.Errorf("memory %s: only %d MiB are free in /dev/shm: use less, stop another machine, or enlarge it (mount -o remount,size=… /dev/shm)", vm.FormatSize(size), free>>20)
	}
	if from != nil && l.rec.Shares {
		return l.shareRAM(*from)
	}
	f, err := os.OpenFile(path, os.O_CREATE|os.O_EXCL|os.O_RDWR, 0o600)
	if err != nil {
		return fmt.Errorf("memory: %w", err)
	}
	defer f.Close()
	l.back.push(func() { os.Remove(path) })
	if err := f.Truncate(int64(size)); err != nil {
		return fmt.Errorf("memory: %w", err)
	}
	if from != nil {
		out, err := os.OpenFile(path, os.O_RDWR, 0)
		if err != nil {
			return fmt.Errorf("memory: %w", err)
		}
		l.putBack(l.d.restore(l.d.ctx, l.machine, *from, out))
	}
	return l.give(f)
}

// give makes a file QEMU's own user's.
func (l *launch) give(f *os.File) error {
	if u := l.user("qemu"); u != nil && f != nil {
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
	if l.rec.showsFrames() {
		names = append(names, "frames")
		if l.rec.replayMode() == "record" {
			names = append(names, "netin")
		}
	}
	if l.rec.Replays != nil && l.rec.Replays.GDB {
		names = append(names, "gdb")
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
	if l.plugin != "" {
		page, err := l.keptPage()
		if err != nil {
			return err
		}
		l.files = append(l.files, page)
		l.back.push(func() { page.Close() })
	}
	nbd, err := l.d.listenNBD(l.machine) // QEMU comes to it while the guard is still on its way
	if err != nil {
		return err
	}
	l.nbd = nbd
	l.back.push(func() { nbd.Close() })
	return nil
}

// descriptors says where startQEMU puts the sockets.
func (l *launch) descriptors() qemu.Descriptors {
	at := map[string]int{}
	for i, name := range l.qemuSockets() {
		at[name] = 3 + i
	}
	fds := qemu.Descriptors{QMP: at["qmp"], Console: at["console"], Net: at["net"], Agent: at["agent"], Frames: at["frames"], NetIn: at["netin"], GDB: at["gdb"]}
	if l.plugin != "" {
		fds.Probe = 3 + len(l.qemuSockets())
	}
	return fds
}

// whileQEMU bounds what is asked of a QEMU that may end over it.
func (l *launch) whileQEMU(ctx context.Context) (context.Context, context.CancelFunc) {
	ctx, cancel := context.WithTimeoutCause(ctx, runTime, errors.New("QEMU did not come up in a minute"))
	go func() {
		select {
		case <-l.qemu.Done():
			cancel()
		case <-ctx.Done():
		}
	}()
	return ctx, cancel
}

// letGo waits for QEMU's monitor, hands the guard what only the daemon can open, and lets the guest run.
func (l *launch) letGo(ctx context.Context) error {
	ctx, cancel := l.whileQEMU(ctx)
	defer cancel()
	if l.shared != nil {
		if err := l.showMemory(ctx, l.guard, l.qemu.PID); err != nil {
			l.d.log.Warn("the guard can't see its machine's memory", "machine", l.name(), "error", err)
		}
	}
	if _, err := l.guard.conn.Call(ctx, link.CallRun, link.Run{Stays: l.stays}, nil); err != nil {
		return l.whyNot(err)
	}
	os.Remove(l.d.files.ramFile(l.id())) // QEMU and the guard have it
	l.d.giveClock(ctx, l.machine, l.guard, l.qemu.PID)
	return nil
}

// settle makes the run known: from here on it is overseen, and lives on whatever becomes of this daemon.
func (l *launch) settle(ctx context.Context) error {
	l.mu.Lock()
	before := l.rec
	if !l.stays { // else there is nobody to be helped
		l.state.Arriving = l.rec.Resume
	}
	l.rec.Run, l.rec.Failed, l.rec.Ended, l.rec.Reason, l.rec.Paused = &l.state, false, vm.EndedNone, "", l.stays
	l.rec.Resume = ""
	err := l.save(ctx)
	if err != nil {
		l.rec = before
		l.mu.Unlock()
		return err
	}
	r := &run{qemu: l.qemu, ended: make(chan struct{})}
	l.machine.run, l.cancelStart = r, nil
	l.mu.Unlock()
	l.back.forget()
	l.sockets.close()
	l.d.bus.emit(l.name(), event.MachineStarted, event.Fields{"accelerator": l.state.Accelerator, "pid": int64(l.qemu.PID)})
	l.d.spawn(func() { l.d.oversee(l.machine, r) })
	l.d.watchReplay(l.machine, r)
	l.arrive(r)
	l.d.watchRecording(l.machine, r)
	return nil
}

// whyNot tells of a QEMU that did not come up in its own words, where it left some.
func (l *launch) whyNot(err error) error {
	select {
	case <-l.qemu.Done():
	case <-time.After(time.Second):
		said := "and has said nothing in its log"
		if tail := l.d.qemuLogTail(l.id()); tail != "" {
			said = "and last said in its log: " + tail
		}
		return fmt.Errorf("QEMU did not come up: %w, %s", err, said)
	}
	if tail := l.d.qemuLogTail(l.id()); tail != "" {
		return fmt.Errorf("QEMU ended at once (%s): %s", l.qemu.Exit(), tail)
	}
	return fmt.Errorf("QEMU ended at once: %s", l.qemu.Exit())
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
