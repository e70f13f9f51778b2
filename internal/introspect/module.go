package introspect

import (
	"vigia/internal/event"
)

// Module is one of the kernel's loaded modules.
type Module struct {
	Name    string `json:"name"`
	Address uint64 `json:"address"` // of its text
	Size    uint64 `json:"size"`    // bytes of all its parts, as /proc/modules counts them
	State   string `json:"state"`   // live, coming, going
}

// moduleLayout is where a module's fields are. Up to 6.3 a module has two areas, core and init; since then one for each
// sort of memory, mem[], the text first.
type moduleLayout struct {
	head              uint64 // link address of the list
	list, name, state uint64
	areas             []area
	nameSize          uint64
}

type area struct{ base, size uint64 }

func (g *Guest) moduleLayout() (*moduleLayout, error) {
	if g.modules != nil {
		return g.modules, nil
	}
	r, l := &resolver{p: g.profile}, &moduleLayout{}
	l.head = r.symbol("modules")
	l.list, l.state = r.field("module", "list"), r.field("module", "state")
	name, err := g.profile.Field("module", "name")
	if err != nil {
		return nil, err
	}
	l.name, l.nameSize = name.Offset, min(name.Count, 64)
	if mem, err := g.profile.Field("module", "mem"); err == nil {
		base, size := r.field("module_memory", "base"), r.field("module_memory", "size")
		for i := range min(mem.Count, 16) {
			at := mem.Offset + i*mem.Size
			l.areas = append(l.areas, area{at + base, at + size})
		}
	} else {
		for _, part := range []string{"core_layout", "init_layout"} {
			l.areas = append(l.areas, area{r.field("module", part+".base"), r.field("module", part+".size")})
		}
	}
	if r.err != nil {
		return nil, r.err
	}
	g.modules = l
	g.profile.Trim()
	return l, nil
}

// unformed modules are on the list before anything of them is loaded.
const moduleUnformed = 3

var moduleStates = [...]string{"live", "coming", "going"}

// Modules lists the kernel's modules, the last loaded first, as the kernel's list has them.
func (g *Guest) Modules() ([]Module, error) {
	list := []Module{}
	err := g.view(func() error {
		list = list[:0]
		l, err := g.moduleLayout()
		if err != nil {
			return err
		}
		return g.walk(l.head+g.boot.Slide, func(node uint64) error {
			m, listed, err := g.module(l, node-l.list)
			if err == nil && listed {
				list = append(list, m)
			}
			return err
		})
	})
	if err != nil {
		return nil, err
	}
	return list, nil
}

func (g *Guest) module(l *moduleLayout, at uint64) (m Module, listed bool, err error) {
	r := reader{s: g.space}
	state := r.u32(at + l.state)
	if state == moduleUnformed {
		return m, false, nil
	}
	name := g.scratch[:l.nameSize]
	r.bytes(at+l.name, name)
	m.Name, m.State = event.Text(untilNUL(name)), "unknown"
	if state < uint32(len(moduleStates)) {
		m.State = moduleStates[state]
	}
	m.Address = r.u64(at + l.areas[0].base)
	for _, a := range l.areas {
		m.Size += uint64(r.u32(at + a.size))
	}
	if r.err != nil {
		return m, false, ErrTorn
	}
	return m, true, nil
}
