package cli

import (
	"context"
	"fmt"
	"slices"
	"strconv"
	"strings"

	"connectrpc.com/connect"
	"github.com/spf13/cobra"

	"vigia/internal/api"
	"vigia/internal/api/vigiav1"
)

func (a *app) psCmd() *cobra.Command {
	tree := false
	c := &cobra.Command{
		Use:   "ps NAME [PID]",
		Short: "The processes of a machine, read from its memory",
		Long: "The processes of a machine, read from its memory: nothing in the guest is asked. With PID all that is known of one:\n" +
			"its ids, groups, capabilities, namespaces, control group and container.",
		Args: argsBetween(1, "NAME", "PID"),
		RunE: a.remote(func(ctx context.Context, c *api.Client, args []string) error {
			res, err := c.Views.Processes(ctx, machine(args[0]))
			if err != nil {
				return err
			}
			list := res.Msg.GetProcesses()
			if len(args) == 2 {
				return a.printProcess(list, args[1])
			}
			if a.json() {
				return printList(a, list)
			}
			depth := make([]int, len(list))
			if tree {
				list, depth = family(list)
			}
			t := newTable(">PID", ">PPID", ">UID", "STATE", ">THREADS", ">CPU", "START", "COMM", "COMMAND")
			for i, p := range list {
				t.add(number(p.GetPid()), number(p.GetPpid()), number(p.GetUid()), p.GetState(), number(p.GetThreads()),
					cpuTime(p.GetCpuSeconds()), a.when(p.GetStart()), p.GetComm(), strings.Repeat("  ", depth[i])+commandLine(p))
			}
			return a.printTable(t)
		}),
		ValidArgsFunction: a.machineNames,
	}
	c.Flags().BoolVar(&tree, "tree", false, "children below their parents, set in")
	return c
}

// family orders processes by descent: each below its parent. One whose parent is not there, or who is his own ancestor,
// stands at the left.
func family(list []*vigiav1.Process) (ordered []*vigiav1.Process, depth []int) {
	const deepest = 40 // beyond it the screen has no room
	children := make(map[int64][]*vigiav1.Process, len(list))
	known := make(map[int64]bool, len(list))
	for _, p := range list {
		known[p.GetPid()] = true
	}
	var first []*vigiav1.Process
	for _, p := range list {
		if known[p.GetPpid()] && p.GetPpid() != p.GetPid() {
			children[p.GetPpid()] = append(children[p.GetPpid()], p)
		} else {
			first = append(first, p)
		}
	}
	seen := make(map[*vigiav1.Process]bool, len(list))
	type entry struct {
		process *vigiav1.Process
		depth   int
	}
	place := func(roots []*vigiav1.Process) {
		var stack []entry
		for _, p := range slices.Backward(roots) {
			stack = append(stack, entry{p, 0})
		}
		for len(stack) > 0 {
			e := stack[len(stack)-1]
			stack = stack[:len(stack)-1]
			if seen[e.process] {
				continue
			}
			seen[e.process] = true
			ordered, depth = append(ordered, e.process), append(depth, min(e.depth, deepest))
			for _, child := range slices.Backward(children[e.process.GetPid()]) {
				stack = append(stack, entry{child, e.depth + 1})
			}
		}
	}
	place(first)
	place(list) // those in a circle
	return ordered, depth
}

// printProcess prints all of one process.
func (a *app) printProcess(list []*vigiav1.Process, pid string) error {
	id, err := parsePID(pid)
	if err != nil {
		return err
	}
	i := slices.IndexFunc(list, func(p *vigiav1.Process) bool { return p.GetPid() == id })
	if i < 0 {
		return fmt.Errorf("no process %d is on the kernel's list", id)
	}
	p := list[i]
	if a.json() {
		return a.printJSON(p)
	}
	var s sheet
	s.add("pid", number(p.GetPid()))
	s.add("parent", number(p.GetPpid()))
	s.add("command", p.GetComm())
	s.add("command line", p.GetCmdline())
	s.add("executable", p.GetExe())
	s.add("state", p.GetState())
	s.add("kernel thread", map[bool]string{true: "yes"}[p.GetKernel()])
	s.add("threads", number(p.GetThreads()))
	s.add("CPU time", cpuTime(p.GetCpuSeconds()))
	s.add("start", a.when(p.GetStart()))
	s.add("user ids", fmt.Sprintf("real %d, effective %d, saved %d, file system %d", p.GetUid(), p.GetEuid(), p.GetSuid(), p.GetFsuid()))
	s.add("group ids", fmt.Sprintf("real %d, effective %d, saved %d, file system %d", p.GetGid(), p.GetEgid(), p.GetSgid(), p.GetFsgid()))
	s.add("groups", spaced(p.GetGroups()))
	c := p.GetCapabilities()
	for _, set := range []struct {
		name  string
		names []string
	}{{"effective", c.GetEffective()}, {"permitted", c.GetPermitted()}, {"inheritable", c.GetInheritable()}, {"bounding", c.GetBounding()}, {"ambient", c.GetAmbient()}} {
		s.add("capabilities "+set.name, strings.Join(set.names, " "))
	}
	n := p.GetNamespaces()
	s.add("namespaces", fmt.Sprintf("pid %d, mnt %d, net %d, uts %d, ipc %d, user %d, cgroup %d, time %d",
		n.GetPid(), n.GetMnt(), n.GetNet(), n.GetUts(), n.GetIpc(), n.GetUser(), n.GetCgroup(), n.GetTime()))
	s.add("pid in its namespace", number(p.GetNamespacePid()))
	s.add("control group", p.GetCgroup())
	s.add("container", strings.TrimSpace(p.GetContainerRuntime()+" "+p.GetContainer()))
	s.add("systemd unit", p.GetUnit())
	s.add("unknown", joined(p.GetUnknown()))
	return s.write(a.std.Out)
}

func spaced[T any](list []T) string { return strings.Trim(fmt.Sprint(list), "[]") }

func parsePID(text string) (int64, error) {
	id, err := strconv.ParseInt(text, 10, 32)
	if err != nil || id < 0 {
		return 0, usagef("%q is no process id", text)
	}
	return id, nil
}

// commandLine is what a person looks for: the command line, else the executable, else the kernel's name in brackets,
// as ps prints it.
func commandLine(p *vigiav1.Process) string {
	switch {
	case p.GetCmdline() != "":
		return p.GetCmdline()
	case p.GetExe() != "":
		return p.GetExe()
	}
	return "[" + p.GetComm() + "]"
}

// cpuTime is minutes and seconds, as ps prints it, with hundredths: short-lived load is what one looks for here.
func cpuTime(seconds float64) string {
	hundredths := int64(seconds*100 + 0.5)
	return fmt.Sprintf("%d:%02d.%02d", hundredths/6000, hundredths/100%60, hundredths%100)
}

func (a *app) modulesCmd() *cobra.Command {
	return &cobra.Command{
		Use:   "modules NAME",
		Short: "The kernel modules of a machine, read from its memory",
		Args:  oneArg("NAME"),
		RunE: a.remote(func(ctx context.Context, c *api.Client, args []string) error {
			res, err := c.Views.Modules(ctx, machine(args[0]))
			if err != nil {
				return err
			}
			if a.json() {
				return printList(a, res.Msg.GetModules())
			}
			t := newTable("NAME", "ADDRESS", ">SIZE")
			for _, m := range res.Msg.GetModules() {
				t.add(m.GetName(), fmt.Sprintf("0x%016x", m.GetAddress()), number(m.GetSize()))
			}
			return a.printTable(t)
		}),
		ValidArgsFunction: a.machineNames,
	}
}

func (a *app) socketsCmd() *cobra.Command {
	return &cobra.Command{
		Use:   "sockets NAME",
		Short: "The sockets of a machine, those of no process too, read from its memory",
		Args:  oneArg("NAME"),
		RunE: a.remote(func(ctx context.Context, c *api.Client, args []string) error {
			res, err := c.Views.Sockets(ctx, machine(args[0]))
			if err != nil {
				return err
			}
			if a.json() {
				return printList(a, res.Msg.GetSockets())
			}
			t := newTable("PROTOCOL", "STATE", "LOCAL", "REMOTE", ">UID", ">PID", ">FD", "COMM")
			for _, s := range res.Msg.GetSockets() {
				pid, fd, comm := number(s.GetPid()), number(s.GetFd()), s.GetComm()
				if s.GetOwner() != "process" {
					pid, fd, comm = "", "", "("+s.GetOwner()+")"
				}
				t.add(s.GetProtocol(), s.GetState(), s.GetLocal(), s.GetRemote(), unless(s.GetUnknown(), "uid", number(s.GetUid())), pid, fd, comm)
			}
			return a.printTable(t)
		}),
		ValidArgsFunction: a.machineNames,
	}
}

// unless is the text of a field, or ? where it is not known.
func unless(unknown []string, field, text string) string {
	if slices.Contains(unknown, field) {
		return "?"
	}
	return text
}

func (a *app) filesCmd() *cobra.Command {
	pid := ""
	c := &cobra.Command{
		Use:   "files NAME",
		Short: "The open files of a machine's processes, read from its memory",
		Args:  oneArg("NAME"),
		RunE: a.remote(func(ctx context.Context, c *api.Client, args []string) error {
			of := &vigiav1.ProcessRequest{Name: args[0]}
			var err error
			if pid != "" {
				if of.Pid, err = parsePID(pid); err != nil {
					return err
				}
			}
			res, err := c.Views.Files(ctx, connect.NewRequest(of))
			if err != nil {
				return err
			}
			if a.json() {
				return printList(a, res.Msg.GetFiles())
			}
			t := newTable(">PID", "COMM", ">FD", "MODE", "TYPE", "PATH")
			for _, f := range res.Msg.GetFiles() {
				path := unless(f.GetUnknown(), "path", f.GetPath())
				t.add(number(f.GetPid()), f.GetComm(), number(f.GetFd()), f.GetMode(), unless(f.GetUnknown(), "type", f.GetType()), path)
			}
			return a.printTable(t)
		}),
		ValidArgsFunction: a.machineNames,
	}
	c.Flags().StringVar(&pid, "pid", "", "of this `process` alone")
	return c
}

func (a *app) mapsCmd() *cobra.Command {
	return &cobra.Command{
		Use:   "maps NAME PID",
		Short: "The memory regions of one process of a machine, read from its memory",
		Args:  twoArgs("NAME", "PID"),
		RunE: a.remote(func(ctx context.Context, c *api.Client, args []string) error {
			id, err := parsePID(args[1])
			if err != nil {
				return err
			}
			res, err := c.Views.Maps(ctx, connect.NewRequest(&vigiav1.ProcessRequest{Name: args[0], Pid: id}))
			if err != nil {
				return err
			}
			if a.json() {
				return printList(a, res.Msg.GetRegions())
			}
			t := newTable("START", "END", "PERM", ">OFFSET", "KIND", "FILE", "MARKS")
			for _, r := range res.Msg.GetRegions() {
				t.add(fmt.Sprintf("%012x", r.GetStart()), fmt.Sprintf("%012x", r.GetEnd()), r.GetPermissions(), fmt.Sprintf("%x", r.GetOffset()),
					r.GetKind(), unless(r.GetUnknown(), "file", r.GetFile()), joined(r.GetMarks()))
			}
			return a.printTable(t)
		}),
		ValidArgsFunction: a.machineNames,
	}
}

func (a *app) kernelCmd() *cobra.Command {
	return &cobra.Command{
		Use:   "kernel NAME",
		Short: "The kernel of a machine: what it is and where it lies, read from its memory",
		Args:  oneArg("NAME"),
		RunE: a.remote(func(ctx context.Context, c *api.Client, args []string) error {
			res, err := c.Views.Kernel(ctx, machine(args[0]))
			if err != nil {
				return err
			}
			k := res.Msg
			if a.json() {
				return a.printJSON(k)
			}
			known := func(field, text string) string { return unless(k.GetUnknown(), field, text) }
			var s sheet
			s.add("banner", k.GetBanner())
			s.add("version", k.GetVersion())
			s.add("physical base", fmt.Sprintf("0x%x", k.GetPhysicalBase()))
			s.add("virtual slide", fmt.Sprintf("0x%x", k.GetVirtualSlide()))
			s.add("paging levels", number(k.GetPagingLevels()))
			s.add("command line", known("command_line", k.GetCommandLine()))
			s.add("taint", known("taint", strings.TrimSpace(number(k.GetTaint())+" "+joined(k.GetTaints()))))
			s.add("uptime", known("uptime_seconds", fmt.Sprintf("%.0f s", k.GetUptimeSeconds())))
			s.add("clock", known("time", a.when(k.GetTime())))
			s.add("forks", known("total_forks", number(k.GetTotalForks())))
			s.add("processes", known("processes", number(k.GetProcesses())))
			s.add("not to be had", joined(k.GetMissing()))
			return s.write(a.std.Out)
		}),
		ValidArgsFunction: a.machineNames,
	}
}
