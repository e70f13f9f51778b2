package introspect

import (
	"fmt"

	"vigia/internal/event"
)

// modulesHidden compares the lists of modules.
func (c *Checker) modulesHidden() (Result, error) { return c.compareModules(nil) }

// moduleMemory compares them with what lies in the memory for modules, too, and with what the guest says.
func (c *Checker) moduleMemory() (Result, error) {
	said := c.ask()
	more := []func(*Guest, *moduleLayout) *listing{(*Guest).moduleMemory}
	if said != nil {
		more = append(more, said.listModules)
	}
	return c.compareModules(said, more...)
}

func (c *Checker) compareModules(said *claims, more ...func(*Guest, *moduleLayout) *listing) (res Result, err error) {
	g := c.guest
	err = g.view(func() error {
		m, err := g.moduleLayout()
		if err != nil {
			return err
		}
		all := []*listing{g.modulesListed(m), g.moduleObjects(), g.moduleTree(), g.moduleBugs()}
		for _, f := range more {
			all = append(all, f(g, m))
		}
		res = Result{}
		for _, l := range all {
			res.Views = append(res.Views, l.view())
			res.Findings = append(res.Findings, l.brokenLists()...)
		}
		for _, at := range union(all) {
			if f, hidden := g.hiddenModule(m, at, all, said); hidden {
				res.Findings = append(res.Findings, f)
			}
		}
		return nil
	})
	return res, err
}

// States of a module (include/linux/module.h).
const moduleLive = 0

// hiddenModule reports whether a module that is loaded is missing from a view. One that says it is being loaded or
// unloaded is where a module in that state is: an unformed one has nothing in sysfs, so one that has pretends to be.
func (g *Guest) hiddenModule(m *moduleLayout, at uint64, all []*listing, said *claims) (Finding, bool) {
	r := reader{s: g.space}
	state := r.u32(at + m.state)
	var name [64]byte
	r.bytes(at+m.name, name[:m.nameSize])
	text := r.u64(at + m.areas[0].base)
	if r.err != nil {
		return Finding{}, false
	}
	listed, missing := compare(at, all, func(name string) bool {
		return state == moduleLive && (name != viewGuest || said.loaded[at])
	})
	posing := state == moduleUnformed && contains(all, viewSysfs, at)
	if state != moduleLive && !posing || len(missing) == 0 && !posing || !g.isModule(m, at) {
		return Finding{}, false
	}
	subject := event.Text(untilNUL(name[:m.nameSize]))
	f := Finding{Kind: KindModuleHidden, Severity: Critical, Subject: subject, Listed: listed, Missing: missing, Key: fmt.Sprintf("%x", at),
		Detail:   fmt.Sprintf("the module is missing from %s; found by %s", words(missing), words(listed)),
		Evidence: []Evidence{{Address: at, Note: "struct module"}, {Address: text, Note: "its text"}}}
	if posing {
		f.Missing = []string{viewModules}
		f.Detail = fmt.Sprintf("the module says that it is not formed yet, by which the kernel passes over it; it is found by %s", words(listed))
	}
	return f, true
}

// contains reports whether the view of a name lists a thing.
func contains(all []*listing, name string, at uint64) bool {
	for _, l := range all {
		if l.name == name {
			return l.at[at]
		}
	}
	return false
}
