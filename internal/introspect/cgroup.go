package introspect

import (
	"strings"

	"vigia/internal/event"
)

const (
	maxHierarchies = 32 // of control groups, that a task is in
	maxCgroupDepth = 64
)

type cgroupLayout struct {
	set           uint64 // in task_struct
	unified, sets uint64 // of css_set: the second version's group, and the list of all
	link, group   uint64 // of cgrp_cset_link
	node          uint64 // of cgroup
	name, parent  uint64 // of kernfs_node
	err           error
}

func newCgroupLayout(r *resolver) (l cgroupLayout) {
	o := &resolver{p: r.p}
	l.set = o.field("task_struct", "cgroups")
	l.unified, l.sets = o.field("css_set", "dfl_cgrp"), o.field("css_set", "cgrp_links")
	l.link, l.group = o.field("cgrp_cset_link", "cgrp_link"), o.field("cgrp_cset_link", "cgrp")
	l.node = o.field("cgroup", "kn")
	l.name, l.parent = o.field("kernfs_node", "name"), o.field("kernfs_node", "__parent", "parent")
	l.err = o.err
	return l
}

// cgroup fills in a task's control group, and the container or unit that its path names.
func (g *Guest) cgroup(p *Process) {
	l := &g.layout.cgroup
	if l.err != nil {
		p.Unknown = append(p.Unknown, "cgroup")
		return
	}
	set, err := g.space.U64(p.Task + l.set)
	path, known := g.seen.cgroups[set]
	if err == nil && !known {
		if path, err = g.cgroupPath(set); err == nil {
			g.seen.cgroups[set] = path
		}
	}
	if err != nil {
		p.Unknown = append(p.Unknown, "cgroup")
		return
	}
	p.Cgroup = path
	p.Container, p.Runtime, p.Unit = whose(path)
}

// cgroupPath returns the path in the second version's hierarchy. Where that is the root, which is where a host of the first
// version leaves all tasks, it is the longest of the paths in the others.
func (g *Guest) cgroupPath(set uint64) (string, error) {
	l := &g.layout.cgroup
	group, err := g.space.U64(set + l.unified)
	if err != nil {
		return "", err
	}
	path, err := g.kernfsPath(group)
	if err != nil || path != "/" {
		return path, err
	}
	head, left := set+l.sets, maxHierarchies
	err = g.walk(head, func(node uint64) error {
		if left--; left < 0 {
			return ErrTorn
		}
		group, err := g.space.U64(node - l.link + l.group)
		if err != nil {
			return err
		}
		other, err := g.kernfsPath(group)
		if err == nil && len(other) > len(path) {
			path = other
		}
		return err
	})
	return path, err
}

// kernfsPath joins the names from a control group's node up to its hierarchy's root, which has none.
func (g *Guest) kernfsPath(group uint64) (string, error) {
	l := &g.layout.cgroup
	r := &reader{s: g.space}
	node := r.u64(group + l.node)
	buf := g.scratch[:maxPath]
	at := len(buf)
	for range maxCgroupDepth {
		parent := r.u64(node + l.parent)
		name := r.u64(node + l.name)
		if r.err != nil {
			return "", r.err
		}
		if parent == 0 {
			return event.Text(rooted(buf, at)), nil
		}
		text, err := g.space.CString(name, 256)
		if err != nil || at < len(text)+1 {
			return "", errPath
		}
		at -= len(text)
		copy(buf[at:], text)
		at--
		buf[at] = '/'
		node = parent
	}
	return "", errPath
}

// runtimes are how container managers name the control groups of their containers: what stands before the container's id or
// name, and after it.
var runtimes = []struct{ prefix, suffix, runtime string }{
	{"docker-", ".scope", "docker"},
	{"libpod-", ".scope", "podman"},
	{"cri-containerd-", ".scope", "containerd"},
	{"crio-", ".scope", "cri-o"},
	{"lxc.payload.", "", "lxc"},
	{"machine-", ".scope", "systemd-nspawn"},
}

// whose reads from a control group's path which container and which unit of systemd it belongs to. The path is the guest's
// word; the innermost name counts.
func whose(path string) (container, runtime, unit string) {
	names := strings.Split(path, "/")
	for i, name := range names {
		if id, by, ok := containerOf(names, i); ok {
			container, runtime = id, by
		}
		if strings.HasSuffix(name, ".service") || strings.HasSuffix(name, ".scope") {
			unit = name
		}
	}
	return container, runtime, unit
}

func containerOf(names []string, i int) (id, runtime string, ok bool) {
	name := names[i]
	for _, r := range runtimes {
		rest, ok := strings.CutPrefix(name, r.prefix)
		if !ok {
			continue
		}
		if rest, ok = strings.CutSuffix(rest, r.suffix); ok && rest != "" && !strings.HasPrefix(rest, "conmon-") {
			return rest, r.runtime, true
		}
	}
	if i == 0 {
		return "", "", false
	}
	switch above := names[i-1]; {
	case above == "docker" && isID(name):
		return name, "docker", true
	case above == "lxc" && name != "":
		return name, "lxc", true
	case strings.HasPrefix(above, "pod") && isID(name):
		return name, "kubernetes", true
	}
	return "", "", false
}

// isID reports whether a name is a container's id: 64 hexadecimal digits.
func isID(name string) bool {
	return len(name) == 64 && strings.Trim(name, "0123456789abcdef") == ""
}
