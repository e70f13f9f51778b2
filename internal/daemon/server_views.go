package daemon

import (
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"time"

	"connectrpc.com/connect"
	"google.golang.org/protobuf/types/known/timestamppb"

	"vigia/internal/api/vigiav1"
	"vigia/internal/link"
	"vigia/internal/vm"
)

// viewsServer passes on what guards see in their guests' memory: typed rows, which it does not interpret.
type viewsServer struct{ d *Daemon }

// viewTime bounds a view: a guard that takes longer is stuck.
const viewTime = 30 * time.Second

// rows asks a machine's guard for a view, and turns each row into a message of the API.
func rows[T, M any](ctx context.Context, s viewsServer, name, method string, in any, message func(*T) M) ([]M, error) {
	m, err := s.d.machine(name)
	if err != nil {
		return nil, err
	}
	r, w, err := os.Pipe()
	if err != nil {
		return nil, err
	}
	defer r.Close()
	ctx, cancel := context.WithTimeout(ctx, viewTime)
	defer cancel()
	var answer link.Rows
	done := make(chan error, 1)
	go func() {
		_, err := m.callGuard(ctx, method, in, &answer, w)
		w.Close()
		if err != nil {
			r.SetReadDeadline(time.Now()) // the guard may still hold the other end
		}
		done <- err
	}()
	list, readErr := link.ReadRows[T](r)
	r.Close() // where reading ended early the guard must not wait
	if err := <-done; err != nil && (readErr == nil || errors.Is(readErr, os.ErrDeadlineExceeded)) {
		return nil, err
	}
	if readErr != nil {
		return nil, fmt.Errorf("machine %s: %s: %w", m.name(), method, readErr)
	}
	if len(list) != answer.Count { // a guard of an older version answers otherwise
		return nil, fmt.Errorf("machine %s: its guard gave %d rows of %d: %w", m.name(), len(list), answer.Count, link.ErrProtocol)
	}
	out := make([]M, len(list))
	for i := range list {
		out[i] = message(&list[i])
	}
	return out, nil
}

// Processes is `ps` from outside: the guard reads the guest's memory.
func (s viewsServer) Processes(ctx context.Context, r *connect.Request[vigiav1.MachineRequest]) (*connect.Response[vigiav1.ProcessesResponse], error) {
	list, err := rows(ctx, s, r.Msg.Name, link.CallProcesses, nil, processMessage)
	if err != nil {
		return nil, err
	}
	return connect.NewResponse(&vigiav1.ProcessesResponse{Processes: list}), nil
}

func processMessage(p *link.Process) *vigiav1.Process {
	return &vigiav1.Process{Pid: p.PID, Ppid: p.PPID, Uid: int64(p.UID), Euid: int64(p.EUID), Suid: int64(p.SUID), Fsuid: int64(p.FSUID),
		Gid: int64(p.GID), Egid: int64(p.EGID), Sgid: int64(p.SGID), Fsgid: int64(p.FSGID),
		Comm: p.Comm, Cmdline: p.Cmdline, Exe: p.Exe, CpuSeconds: p.CPUSeconds, Start: moment(p.Start), StartSeconds: p.Booted,
		State: p.State, Threads: int32(p.Threads), Kernel: p.Kernel, Groups: p.Groups,
		Capabilities: capabilitiesMessage(p), Namespaces: namespacesMessage(p), NamespacePid: p.NamespacePID,
		Cgroup: p.Cgroup, Container: p.Container, ContainerRuntime: p.Runtime, Unit: p.Unit, Unknown: p.Unknown}
}

func capabilitiesMessage(p *link.Process) *vigiav1.Capabilities {
	c := &p.Capabilities
	return &vigiav1.Capabilities{Effective: vm.CapabilityNames(c.Effective), Permitted: vm.CapabilityNames(c.Permitted),
		Inheritable: vm.CapabilityNames(c.Inheritable), Bounding: vm.CapabilityNames(c.Bounding), Ambient: vm.CapabilityNames(c.Ambient)}
}

func namespacesMessage(p *link.Process) *vigiav1.Namespaces {
	n := &p.Namespaces
	return &vigiav1.Namespaces{Pid: n.PID, Mnt: n.Mnt, Net: n.Net, Uts: n.UTS, Ipc: n.IPC, User: n.User, Cgroup: n.Cgroup, Time: n.Time}
}

// moment is nil where the time is not known.
func moment(t time.Time) *timestamppb.Timestamp {
	if t.IsZero() {
		return nil
	}
	return timestamppb.New(t)
}

// Modules lists the guest kernel's modules.
func (s viewsServer) Modules(ctx context.Context, r *connect.Request[vigiav1.MachineRequest]) (*connect.Response[vigiav1.ModulesResponse], error) {
	list, err := rows(ctx, s, r.Msg.Name, link.CallModules, nil, func(m *link.Module) *vigiav1.Module {
		return &vigiav1.Module{Name: m.Name, Address: m.Address, Size: m.Size}
	})
	if err != nil {
		return nil, err
	}
	return connect.NewResponse(&vigiav1.ModulesResponse{Modules: list}), nil
}

// Sockets lists the guest's sockets, those of no process too.
func (s viewsServer) Sockets(ctx context.Context, r *connect.Request[vigiav1.MachineRequest]) (*connect.Response[vigiav1.SocketsResponse], error) {
	list, err := rows(ctx, s, r.Msg.Name, link.CallSockets, nil, func(k *link.Socket) *vigiav1.Socket {
		return &vigiav1.Socket{Protocol: k.Protocol, Local: k.Local, Remote: k.Remote, State: k.State, Pid: k.PID, Comm: k.Comm,
			Fd: int32(k.FD), Owner: k.Owner, Uid: int64(k.UID), Inode: k.Inode, NetNamespace: k.Net, Unknown: k.Unknown}
	})
	if err != nil {
		return nil, err
	}
	return connect.NewResponse(&vigiav1.SocketsResponse{Sockets: list}), nil
}

// Files lists the open files of the guest's processes, or of one.
func (s viewsServer) Files(ctx context.Context, r *connect.Request[vigiav1.ProcessRequest]) (*connect.Response[vigiav1.FilesResponse], error) {
	list, err := rows(ctx, s, r.Msg.Name, link.CallFiles, link.OfProcess{PID: r.Msg.Pid}, func(f *link.File) *vigiav1.File {
		return &vigiav1.File{Pid: f.PID, Comm: f.Comm, Fd: int32(f.FD), Type: f.Type, Path: f.Path, Mode: f.Mode, Position: f.Position,
			Deleted: f.Deleted, Filesystem: f.Filesystem, Inode: f.Inode, Unknown: f.Unknown}
	})
	if err != nil {
		return nil, err
	}
	return connect.NewResponse(&vigiav1.FilesResponse{Files: list}), nil
}

// Maps lists the regions of one process's memory.
func (s viewsServer) Maps(ctx context.Context, r *connect.Request[vigiav1.ProcessRequest]) (*connect.Response[vigiav1.MapsResponse], error) {
	list, err := rows(ctx, s, r.Msg.Name, link.CallMaps, link.OfProcess{PID: r.Msg.Pid}, func(g *link.Region) *vigiav1.Region {
		return &vigiav1.Region{Start: g.Start, End: g.End, Permissions: g.Permissions, Offset: g.Offset, File: g.File, Inode: g.Inode,
			Kind: g.Kind, Marks: g.Marks, Unknown: g.Unknown}
	})
	if err != nil {
		return nil, err
	}
	return connect.NewResponse(&vigiav1.MapsResponse{Regions: list}), nil
}

// Kernel says what the guest's kernel is.
func (s viewsServer) Kernel(ctx context.Context, r *connect.Request[vigiav1.MachineRequest]) (*connect.Response[vigiav1.KernelResponse], error) {
	m, err := s.d.machine(r.Msg.Name)
	if err != nil {
		return nil, err
	}
	var k link.System
	if _, err := m.callGuard(ctx, link.CallKernel, nil, &k); err != nil {
		return nil, err
	}
	return connect.NewResponse(&vigiav1.KernelResponse{Banner: k.Banner, Version: k.Version, PhysicalBase: k.Phys, VirtualSlide: k.Slide,
		PagingLevels: int32(k.Levels), CommandLine: k.Cmdline, Taint: k.Taint, Taints: k.Taints, UptimeSeconds: k.Uptime, Time: moment(k.Time),
		TotalForks: k.Forks, Processes: int64(k.Processes), Missing: k.Missing, Unknown: k.Unknown}), nil
}

// Check has the guard make all checks at once.
func (s viewsServer) Check(ctx context.Context, r *connect.Request[vigiav1.MachineRequest]) (*connect.Response[vigiav1.CheckResponse], error) {
	m, err := s.d.machine(r.Msg.Name)
	if err != nil {
		return nil, err
	}
	var report link.CheckReport
	if _, err := m.callGuard(ctx, link.CallCheck, nil, &report); err != nil {
		return nil, err
	}
	out := &vigiav1.CheckResponse{TookMs: report.TookMS, Dropped: int32(report.Dropped)}
	for _, f := range report.Findings {
		row := &vigiav1.Finding{Kind: f.Kind, Subject: f.Subject, Detail: f.Detail, Severity: f.Severity, Listed: f.Listed, Missing: f.Missing,
			Pid: f.PID, Comm: f.Comm, Exe: f.Exe}
		for _, e := range f.Evidence {
			row.Evidence = append(row.Evidence, &vigiav1.Evidence{Address: e.Address, Bytes: hex.EncodeToString(e.Bytes),
				Expected: hex.EncodeToString(e.Expected), Note: e.Note})
		}
		out.Findings = append(out.Findings, row)
	}
	for _, v := range report.Views {
		out.Views = append(out.Views, &vigiav1.CheckedView{Check: v.Check, Name: v.Name, Count: int64(v.Count), TookMs: v.TookMS, Unknown: v.Unknown})
	}
	return connect.NewResponse(out), nil
}
