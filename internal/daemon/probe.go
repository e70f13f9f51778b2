package daemon

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"

	"golang.org/x/sys/unix"

	"vigia/internal/jail"
	qemu "vigia/internal/machine"
	"vigia/internal/vm"
)

// pageName is how the kernel calls the page's file, which has no name of its own.
const pageName = "vigia-probe"

// makePage makes what QEMU's plugin and the guard share, where the machine gets a plugin. Without one processes are sampled.
func (l *launch) makePage(ctx context.Context) error {
	plugin, err := l.d.plugin(ctx, &l.rec.Spec, l.state.Accelerator)
	if err != nil {
		if l.rec.Spec.Probe == vm.ProbeOn {
			return fmt.Errorf("probe: %w: leave --probe out, or see vigia doctor", err)
		}
		l.state.Probe, l.sampled = err.Error(), err.Error()
		return nil
	}
	fd, err := unix.MemfdCreate(pageName, unix.MFD_CLOEXEC|unix.MFD_ALLOW_SEALING)
	if err != nil {
		return fmt.Errorf("probe: %w", err)
	}
	page := os.NewFile(uintptr(fd), pageName)
	if err = page.Truncate(qemu.ProbePage); err == nil {
		// A page that could be cut short would end the guard that reads it.
		_, err = unix.FcntlInt(page.Fd(), unix.F_ADD_SEALS, unix.F_SEAL_SHRINK|unix.F_SEAL_GROW|unix.F_SEAL_SEAL)
	}
	if err != nil {
		page.Close()
		return fmt.Errorf("probe: %w", err)
	}
	l.plugin, l.sampled = plugin, ""
	l.keepPage(page)
	l.back.push(func() { l.keepPage(nil) })
	return nil
}

// Why a machine has no plugin.
var (
	errProbeOff = errors.New("switched off")
	errProbeKVM = errors.New("the plugin works under software emulation (tcg) only")
)

// plugin finds the one for this machine.
func (d *Daemon) plugin(ctx context.Context, spec *vm.Spec, accelerator string) (string, error) {
	switch {
	case spec.Probe == vm.ProbeOff:
		return "", errProbeOff
	case accelerator != "tcg":
		return "", errProbeKVM
	}
	return d.host.Plugin(ctx)
}

// keepPage keeps the page for a guard to come. It is never looked at here.
func (m *machine) keepPage(f *os.File) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.page != nil {
		m.page.Close()
	}
	m.page = f
}

// whySampled says why QEMU has no plugin.
func (m *machine) whySampled() string {
	if run := m.record().Run; run != nil {
		return run.Probe
	}
	return m.sampled
}

// keptPage is a descriptor more of the page; nil where there is none.
func (m *machine) keptPage() (*os.File, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.page == nil {
		return nil, nil
	}
	fd, err := unix.FcntlInt(m.page.Fd(), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	return os.NewFile(uintptr(fd), pageName), nil
}

// openPage is keptPage, also for a machine that was found running: QEMU has the page open.
func (d *Daemon) openPage(m *machine, proc *jail.Process) (*os.File, error) {
	f, err := m.keptPage()
	if f != nil || err != nil || proc == nil || m.record().Run == nil || m.record().Run.Probe != "" {
		return f, err
	}
	page, err := openMapped(proc.PID, "/memfd:"+pageName, os.O_RDWR)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err == nil {
		m.keepPage(page)
	}
	return m.keptPage()
}
