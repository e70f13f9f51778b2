package introspect

import (
	"fmt"
	"strings"

	"vigia/internal/event"
)

// CheckHelpers reports programs that the kernel runs by itself, as root, where they are not the usual ones, and mounts that
// cover a process's directory in /proc.
func (g *Guest) CheckHelpers() ([]Finding, error) {
	return g.look(all((*control).helpers, (*control).mounts))
}

// helperPrograms are texts that name a program, and those that a healthy system may have there.
var helperPrograms = []struct {
	symbol, what string
	usual        []string
}{
	{"modprobe_path", "to load a module", []string{"/sbin/modprobe", "/usr/sbin/modprobe", ""}},
	{"poweroff_cmd", "to power off", []string{"/sbin/poweroff", "/usr/sbin/poweroff"}},
	{"uevent_helper", "at each event of a device", []string{"", "/sbin/hotplug", "/sbin/mdev"}},
	{"core_pattern", "when a program crashes", nil},
}

// crashPrograms are the programs to which distributions give core dumps.
var crashPrograms = []string{"|/usr/lib/systemd/systemd-coredump ", "|/lib/systemd/systemd-coredump ", "|/usr/share/apport/apport ",
	"|/usr/libexec/abrt-hook-ccpp ", "|/bin/false", "|/usr/bin/false"}

const maxHelper = 256 // KMOD_PATH_LEN; a core pattern has 128

func (c *control) helpers() error {
	for _, h := range helperPrograms {
		at := c.known(h.symbol)
		if at == 0 {
			continue
		}
		c.looked++
		b, err := c.space.CString(at, maxHelper)
		if err != nil {
			b = b[:min(len(b), 64)] // no text at all
		}
		text := string(b)
		usual := false
		for _, u := range h.usual {
			usual = usual || text == u
		}
		if h.symbol == "core_pattern" {
			usual = err == nil && !strings.HasPrefix(text, "|")
			for _, u := range crashPrograms {
				usual = usual || strings.HasPrefix(text, u)
			}
		}
		if !usual {
			c.found(Finding{Kind: "helper.changed", Subject: h.symbol, Severity: High,
				Detail:   fmt.Sprintf("the program that the kernel runs %s is %q", h.what, event.Text(b)),
				Evidence: []Evidence{{Address: at, Bytes: b[:min(len(b), 64)]}}})
		}
	}
	return nil
}

// mounts looks for mounts on directories of processes, in the namespaces of all processes.
func (c *control) mounts() error {
	r := c.resolver()
	proxy, space, root := r.field("task_struct", "nsproxy"), r.field("nsproxy", "mnt_ns"), r.field("mnt_namespace", "root")
	if r.err != nil {
		return errNotBuilt
	}
	seen, left := map[uint64]bool{}, maxMountsChecked
	return c.leaders(func(task uint64) error {
		read := reader{s: c.space}
		nsproxy := read.u64(task + proxy)
		ns := read.u64(nsproxy + space)
		if nsproxy == 0 || read.err != nil || seen[ns] || len(seen) == maxNamespaces {
			return nil // it is ending
		}
		seen[ns] = true
		top, err := c.space.U64(ns + root)
		if err != nil {
			return nil
		}
		return c.mountsBelow(top, &left)
	})
}

const maxMountsChecked = 1 << 15

func (c *control) mountsBelow(top uint64, left *int) error {
	r := c.resolver()
	children, link := r.field("mount", "mnt_mounts"), r.field("mount", "mnt_child")
	if r.err != nil {
		return errNotBuilt
	}
	pending := []uint64{top}
	for len(pending) > 0 {
		m := pending[len(pending)-1]
		pending = pending[:len(pending)-1]
		err := c.loose(m+children, *left, func(node uint64) {
			*left--
			c.looked++
			c.mountOn(m, node-link)
			pending = append(pending, node-link)
		})
		if err != nil {
			return err
		}
	}
	return nil
}

// mountOn looks at a mount and the one that it is on.
func (c *control) mountOn(parent, m uint64) {
	r := c.resolver()
	mnt, sb := r.field("mount", "mnt"), r.field("vfsmount", "mnt_sb")
	fstype, fsname := r.field("super_block", "s_type"), r.field("file_system_type", "name")
	l := c.layout
	read := reader{s: c.space}
	point := read.u64(m + l.mount.mountpoint)
	name := read.u64(read.u64(read.u64(parent+mnt+sb)+fstype) + fsname)
	up := read.u64(point + l.dentry.parent)
	text, n := read.u64(point+l.dentry.name), read.u32(point+l.dentry.nameLen)
	top := read.u64(parent + l.mount.mnt + l.mount.root)
	if r.err != nil || read.err != nil || up != top || n > 10 {
		return
	}
	if on, err := c.space.CString(name, 16); err != nil || string(on) != "proc" {
		return
	}
	b := make([]byte, n)
	if c.space.Read(text, b) != nil || strings.Trim(string(b), "0123456789") != "" {
		return
	}
	c.found(Finding{Kind: "mount.hides", Subject: "/proc/" + event.Text(b), Severity: High,
		Detail:   fmt.Sprintf("something is mounted on /proc/%s: the process can't be looked at from within", event.Text(b)),
		Evidence: []Evidence{{Address: m, Note: "its struct mount"}}})
}
