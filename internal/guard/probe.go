package guard

import (
	"time"

	"vigia/internal/introspect"
	"vigia/internal/probe"
)

// eyes lend a probe the introspector: they turn what the one sees into the other's words.
type eyes struct {
	*introspect.Guest
	lives *lives
	seen  []introspect.Glance // memory that is used again
}

// lives numbers the lives of a guest's kernel.
type lives struct {
	boot   introspect.Boot
	number uint64
}

// of returns the number of a life: the next one for a boot that is not the last.
func (l *lives) of(b introspect.Boot) uint64 {
	if l.boot != b {
		l.boot, l.number = b, l.number+1
	}
	return l.number
}

func (e *eyes) Pulse() (probe.Pulse, error) {
	p, err := e.Guest.Pulse()
	if err != nil {
		return probe.Pulse{}, err
	}
	return probe.Pulse{Life: e.lives.of(p.Boot), Forks: p.Forks, Tasks: p.Tasks, Module: p.Module, Counted: p.Counted}, nil
}

func (e *eyes) Glances(list []probe.Glance) ([]probe.Glance, error) {
	var err error
	e.seen, err = e.Guest.Glances(e.seen[:0])
	for _, g := range e.seen {
		list = append(list, probe.Glance(g))
	}
	return list, err
}

func (e *eyes) Describe(g probe.Glance) (probe.Process, error) {
	p, err := e.Guest.Describe(introspect.Glance(g))
	if err != nil {
		return probe.Process{}, err
	}
	return probed(p), nil
}

func probed(p introspect.Process) probe.Process {
	return probe.Process{PID: p.PID, PPID: p.PPID, UID: int64(p.UID), EUID: int64(p.EUID), Comm: p.Comm, Exe: p.Exe, Cmdline: p.Cmdline}
}

func (e *eyes) Modules() ([]probe.Module, error) {
	list, err := e.Guest.Modules()
	out := make([]probe.Module, len(list))
	for i, m := range list {
		out[i] = probe.Module{Name: m.Name, Address: m.Address, Size: m.Size}
	}
	return out, err
}

// eyes give a sampler the guest that is attached, if one is.
func (v *views) eyes() func() (probe.Guest, error) {
	e := &eyes{lives: &lives{}}
	return func() (probe.Guest, error) {
		guest, err := v.attach(time.Now())
		if err != nil {
			return nil, err
		}
		e.Guest = guest
		return e, nil
	}
}
