package guard

import (
	"context"
	"errors"
	"fmt"
	"time"

	"vigia/internal/introspect"
	"vigia/internal/link"
)

// look returns the guest, or an error that says why nothing can be seen in it.
func (v *views) look() (*introspect.Guest, error) {
	guest, err := v.attach(time.Now())
	if err != nil {
		return nil, fmt.Errorf("nothing can be seen in this machine's memory: %w", err)
	}
	return guest, nil
}

// view makes a handler of one way to look: list returns the rows, which go into the pipe that came with the call.
func view[T any](list func(*introspect.Guest, link.Request) ([]T, error)) func(*Guard, context.Context, link.Request) (link.Response, error) {
	return func(g *Guard, _ context.Context, r link.Request) (link.Response, error) {
		defer closeFiles(r.Files)
		if len(r.Files) != 1 {
			return link.Response{}, errors.New("a view takes one pipe")
		}
		guest, err := g.views.look()
		if err != nil {
			return link.Response{}, err
		}
		rows, err := list(guest, r)
		g.views.heard(err)
		if err != nil {
			return link.Response{}, err
		}
		if err := link.WriteRows(r.Files[0], rows); err != nil {
			return link.Response{}, err
		}
		return link.Response{Body: link.Rows{Count: len(rows)}}, nil
	}
}

// rowsOf turns what the introspector gives into rows of a view.
func rowsOf[T, R any](list []T, err error, row func(*T) R) ([]R, error) {
	if err != nil {
		return nil, err
	}
	out := make([]R, len(list))
	for i := range list {
		out[i] = row(&list[i])
	}
	return out, nil
}

func processes(guest *introspect.Guest, _ link.Request) ([]link.Process, error) {
	list, err := guest.Processes()
	return rowsOf(list, err, func(p *introspect.Process) link.Process {
		return link.Process{PID: p.PID, PPID: p.PPID, UID: p.UID, EUID: p.EUID, SUID: p.SUID, FSUID: p.FSUID,
			GID: p.GID, EGID: p.EGID, SGID: p.SGID, FSGID: p.FSGID, Comm: p.Comm, Cmdline: p.Cmdline, Exe: p.Exe,
			CPUSeconds: p.CPUSeconds, Start: p.Start, Booted: p.StartSeconds, State: p.State, Threads: p.Threads, Kernel: p.Kernel,
			Groups: p.Groups, Capabilities: link.Capabilities(p.Capabilities), Namespaces: link.Namespaces(p.Namespaces), NamespacePID: p.NamespacePID,
			Cgroup: p.Cgroup, Container: p.Container, Runtime: p.Runtime, Unit: p.Unit, Unknown: p.Unknown}
	})
}

func modules(guest *introspect.Guest, _ link.Request) ([]link.Module, error) {
	list, err := guest.Modules()
	return rowsOf(list, err, func(m *introspect.Module) link.Module {
		return link.Module{Name: m.Name, Address: m.Address, Size: m.Size}
	})
}

func sockets(guest *introspect.Guest, _ link.Request) ([]link.Socket, error) {
	list, err := guest.Sockets()
	return rowsOf(list, err, func(s *introspect.Socket) link.Socket {
		return link.Socket{Protocol: s.Protocol, Local: s.Local, Remote: s.Remote, State: s.State, PID: s.PID, Comm: s.Comm, FD: s.FD,
			Owner: s.Owner, UID: s.UID, Inode: s.Inode, Net: s.Net, Unknown: s.Unknown}
	})
}

func files(guest *introspect.Guest, r link.Request) ([]link.File, error) {
	var of link.OfProcess
	if err := r.Decode(&of); err != nil {
		return nil, err
	}
	list, err := guest.Files(of.PID)
	return rowsOf(list, err, func(f *introspect.File) link.File {
		return link.File{PID: f.PID, Comm: f.Comm, FD: f.FD, Type: f.Type, Path: f.Path, Mode: f.Mode,
			Position: f.Position, Deleted: f.Deleted, Filesystem: f.Filesystem, Inode: f.Inode, Unknown: f.Unknown}
	})
}

func maps(guest *introspect.Guest, r link.Request) ([]link.Region, error) {
	var of link.OfProcess
	if err := r.Decode(&of); err != nil {
		return nil, err
	}
	list, err := guest.Maps(of.PID)
	return rowsOf(list, err, func(m *introspect.Region) link.Region {
		return link.Region{Start: m.Start, End: m.End, Permissions: m.Permissions, Offset: m.Offset, File: m.File, Inode: m.Inode,
			Kind: m.Kind, Marks: m.Marks, Unknown: m.Unknown}
	})
}

// kernel is what the guest's kernel says of itself.
func (g *Guard) kernel(_ context.Context, r link.Request) (link.Response, error) {
	closeFiles(r.Files)
	guest, err := g.views.look()
	if err != nil {
		return link.Response{}, err
	}
	s, err := guest.System()
	g.views.heard(err)
	if err != nil {
		return link.Response{}, err
	}
	return link.Response{Body: link.System{Banner: s.Banner, Version: s.Version, Phys: s.Phys, Slide: s.Slide, Levels: s.Levels,
		Cmdline: s.Cmdline, Taint: s.Taint, Taints: s.Taints, Uptime: s.Uptime, Time: s.Time, Forks: s.Forks, Processes: s.Processes,
		Missing: s.Missing, Unknown: s.Unknown}}, nil
}
