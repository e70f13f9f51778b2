package guard

import (
	"errors"
	"os"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"vigia/internal/event"
	"vigia/internal/introspect"
	"vigia/internal/kernel"
	"vigia/internal/link"
	"vigia/internal/memory"
)

// attachRetry is how long the guard waits before it looks for the guest's kernel again: it appears some seconds after
// the start, and a search through memory costs tens of milliseconds.
const attachRetry = 2 * time.Second

// views are what is seen in the guest's memory, or why nothing is.
type views struct {
	mem     physical // set before anything is asked, or by look
	profile *kernel.Profile
	why     error // memory or profile can't be used at all

	reference   *kernel.Reference // of the kernel's code
	noReference error             // why there is none
	modules     introspect.ModuleFiles

	mu       sync.Mutex
	guest    *introspect.Guest
	attached error // why guest is nil
	tried    time.Time
	quiet    time.Time // not before: the guest reboots

	last, spare []introspect.TaskTime // the sampler's own
}

func newViews(cfg link.GuardConfig, ram, profile, reference, modules *os.File) *views {
	v := &views{attached: introspect.ErrNotReady}
	if ram == nil && !cfg.PrivateRAM || profile == nil {
		v.why = errors.New("this machine's image has no kernel profile: import it with its kernel")
		return v
	}
	var err error
	v.profile, err = kernel.Open(profile)
	if err == nil && reference != nil {
		// Without it all but the check of the kernel's code works, which then says what it lacks.
		v.reference, v.noReference = kernel.OpenReference(reference)
	}
	if err == nil && modules != nil {
		v.modules = openModules(modules)
	}
	if err == nil && cfg.PrivateRAM {
		return v
	}
	if err == nil {
		v.mem, err = memory.Map(ram, memory.Q35Layout(cfg.Memory))
	}
	v.why = err
	return v
}

// openModules reads the index of the kernel's modules; nil where it is damaged.
func openModules(f *os.File) introspect.ModuleFiles {
	st, err := f.Stat()
	if err != nil {
		return nil
	}
	pack, err := kernel.OpenModulePack(f, st.Size())
	if err != nil {
		return nil
	}
	return pack
}

// physical is what an introspector reads.
type physical interface {
	memory.Physical
	memory.Sized
}

// memory is the guest's, as it is now; nil while nobody knows.
func (v *views) memory() physical {
	v.mu.Lock()
	defer v.mu.Unlock()
	return v.mem
}

// use is told of the memory of a QEMU that has it for itself.
func (v *views) use(mem physical) {
	v.mu.Lock()
	defer v.mu.Unlock()
	v.mem, v.guest, v.attached, v.tried = mem, nil, introspect.ErrNotReady, time.Time{}
}

// trim gives back what was looked at. Memory that is another process's takes no room here.
func (v *views) trim() {
	v.mu.Lock()
	defer v.mu.Unlock()
	if m, ok := v.mem.(interface{ Trim() }); ok {
		m.Trim()
	}
	if v.profile != nil {
		v.profile.Trim()
	}
	if v.reference != nil {
		v.reference.Trim()
	}
}

// attach finds the guest's kernel, if it is due to look again.
func (v *views) attach(now time.Time) (*introspect.Guest, error) {
	if v.why != nil {
		return nil, v.why
	}
	v.mu.Lock()
	defer v.mu.Unlock()
	if now.Before(v.quiet) || v.mem == nil {
		return nil, introspect.ErrNotReady
	}
	if v.guest != nil || now.Sub(v.tried) < attachRetry {
		return v.guest, v.attached
	}
	v.tried = now
	v.guest, v.attached = introspect.Attach(v.mem, v.profile)
	if v.attached != nil {
		v.guest = nil
	} else {
		v.guest.UseReference(v.reference, v.noReference, v.modules)
	}
	return v.guest, v.attached
}

// rebooted is told by the monitor: the kernel that was there is over.
func (v *views) rebooted() {
	v.mu.Lock()
	defer v.mu.Unlock()
	if v.guest != nil {
		v.guest.Rebooted()
	}
}

func (v *views) state() string {
	if _, err := v.attach(time.Now()); err != nil {
		return err.Error()
	}
	return "attached: " + v.profile.Version()
}

// panicked reports whether the guest's kernel has panicked.
func (v *views) panicked() bool {
	guest, err := v.attach(time.Now())
	if err != nil {
		return false
	}
	yes, err := guest.Panicked()
	v.heard(err)
	return err == nil && yes
}

// heard lets go of a guest whose kernel is not found any more, so that it is looked for at attach's pace: a search
// reads all of its memory.
func (v *views) heard(err error) {
	if !errors.Is(err, introspect.ErrNotReady) {
		return
	}
	v.mu.Lock()
	defer v.mu.Unlock()
	v.quiet = time.Now().Add(attachRetry)
}

// busiest compares two samples of CPU time and names the process that used the most.
func (v *views) busiest(period time.Duration) (busiest, bool) {
	guest, err := v.attach(time.Now())
	if err != nil {
		return busiest{}, false
	}
	now, err := guest.CPU(v.spare[:0])
	v.heard(err)
	if err != nil {
		return busiest{}, false
	}
	before := v.last
	v.last, v.spare = now, before
	if len(before) == 0 {
		return busiest{}, false
	}
	type key struct{ task, start uint64 }
	used := make(map[key]uint64, len(before))
	for i := range before {
		used[key{before[i].Task, before[i].StartTime}] = before[i].CPU
	}
	var most uint64
	top := -1
	for i := range now {
		was, known := used[key{now[i].Task, now[i].StartTime}]
		if now[i].CPU >= was && (known || now[i].CPU < uint64(2*period)) && now[i].CPU-was > most {
			most, top = now[i].CPU-was, i
		}
	}
	if top < 0 {
		return busiest{}, false
	}
	b := busiest{pid: now[top].PID, comm: event.Text(now[top].Comm()), percent: float64(1000*most/uint64(period)) / 10}
	if p, err := guest.Detail(now[top]); err == nil {
		b.exe, b.cmdline = p.Exe, p.Cmdline
	}
	return b, true
}

func dup(f *os.File) (*os.File, error) {
	if f == nil {
		return nil, errors.New("no memory was given")
	}
	fd, err := unix.FcntlInt(f.Fd(), unix.F_DUPFD_CLOEXEC, 0) // dup(2) is not allowed here
	if err != nil {
		return nil, err
	}
	return os.NewFile(uintptr(fd), f.Name()), nil
}
