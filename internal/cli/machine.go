package cli

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"connectrpc.com/connect"
	"github.com/spf13/cobra"

	"vigia/internal/api"
	"vigia/internal/api/vigiav1"
)

// machineCall is one of the calls that take a machine and return it.
type machineCall func(vigiaMachines, context.Context, *connect.Request[vigiav1.MachineRequest]) (*connect.Response[vigiav1.Machine], error)

// simple makes the command of a call that takes a machine and returns it.
func (a *app) simple(name, short string, call machineCall) *cobra.Command {
	return &cobra.Command{
		Use:               name + " NAME",
		Short:             short,
		Args:              oneArg("NAME"),
		ValidArgsFunction: a.machineNames,
		RunE: a.remote(func(ctx context.Context, c *api.Client, args []string) error {
			res, err := call(c.Machines, ctx, machine(args[0]))
			if err != nil {
				return err
			}
			return a.printMachine(res.Msg)
		}),
	}
}

func machine(name string) *connect.Request[vigiav1.MachineRequest] {
	return connect.NewRequest(&vigiav1.MachineRequest{Name: name})
}

func (a *app) startCmd() *cobra.Command {
	return a.simple("start", "Start a stopped machine", vigiaMachines.Start)
}

func (a *app) pauseCmd() *cobra.Command {
	return a.simple("pause", "Hold a machine's CPUs", vigiaMachines.Pause)
}

func (a *app) resumeCmd() *cobra.Command {
	return a.simple("resume", "Let a paused machine go on", vigiaMachines.Resume)
}

func (a *app) quarantineCmd() *cobra.Command {
	c := a.simple("quarantine", "Cut a machine off the network, until it is released", vigiaMachines.Quarantine)
	c.Long = "Cut a machine off the network: every open flow and every new frame, at once, also across restarts, until it is released."
	return c
}

func (a *app) releaseCmd() *cobra.Command {
	return a.simple("release", "End a machine's quarantine", vigiaMachines.Release)
}

func (a *app) stopCmd() *cobra.Command {
	req := &vigiav1.StopRequest{}
	var timeout time.Duration
	c := &cobra.Command{
		Use:   "stop NAME",
		Short: "Power a machine off: gracefully, then by force",
		Args:  oneArg("NAME"),
		RunE: a.remote(func(ctx context.Context, c *api.Client, args []string) error {
			if timeout < 0 {
				return usagef("timeout %s: use a time such as 30s", timeout)
			}
			req.Name, req.TimeoutSeconds = args[0], timeout.Seconds()
			res, err := c.Machines.Stop(ctx, connect.NewRequest(req))
			if err != nil {
				return err
			}
			return a.printMachine(res.Msg)
		}),
		ValidArgsFunction: a.machineNames,
	}
	c.Flags().BoolVar(&req.Force, "force", false, "do not ask the guest: end it now")
	c.Flags().DurationVar(&timeout, "timeout", 0, "`time` the guest has before it is forced, as in 30s")
	return c
}

func (a *app) rmCmd() *cobra.Command {
	req := &vigiav1.RemoveRequest{}
	c := &cobra.Command{
		Use:   "rm NAME…",
		Short: "Remove stopped machines and their disks",
		Args:  atLeastOne("NAME"),
		RunE: a.remote(func(ctx context.Context, c *api.Client, args []string) error {
			return a.removeEach("name", args, func(name string) error {
				req.Name = name
				_, err := c.Machines.Remove(ctx, connect.NewRequest(req))
				return err
			})
		}),
		ValidArgsFunction: a.machineNames,
	}
	c.Flags().BoolVar(&req.Force, "force", false, "also when it runs: end it first")
	return c
}

// removeEach removes what is named, and goes on past what can't be. JSON is an object for one name, a list for several.
func (a *app) removeEach(key string, names []string, remove func(string) error) error {
	var failed error
	var gone []map[string]string
	for _, name := range names {
		err := remove(name)
		if err == nil && !a.json() {
			err = a.printf("%s removed\n", plain(name))
		}
		if err != nil {
			if failed != nil {
				a.note("%s", explain(failed))
			}
			failed = err
			continue
		}
		gone = append(gone, map[string]string{key: name, "state": "removed"})
	}
	var err error
	if a.json() && len(names) == 1 && len(gone) == 1 {
		err = a.printValue(gone[0])
	} else if a.json() && len(names) > 1 {
		err = a.printValue(append([]map[string]string{}, gone...))
	}
	return errors.Join(failed, err)
}

// printMachine answers a command that changed a machine.
func (a *app) printMachine(m *vigiav1.Machine) error {
	if a.json() {
		return a.printJSON(m)
	}
	return a.printf("%s %s\n", plain(m.GetName()), plain(m.GetState()))
}

func (a *app) lsCmd() *cobra.Command {
	return &cobra.Command{
		Use:   "ls",
		Short: "List machines",
		Args:  cobra.NoArgs,
		RunE: a.remote(func(ctx context.Context, c *api.Client, _ []string) error {
			res, err := c.Machines.List(ctx, connect.NewRequest(&vigiav1.ListMachinesRequest{}))
			if err != nil {
				return err
			}
			machines := res.Msg.GetMachines()
			if a.json() {
				return printList(a, machines)
			}
			t := newTable("NAME", "STATE", "ACCEL", "IMAGE", ">MEMORY", ">CPUS", "PUBLISH", "OWNER", "EXPIRES", "CREATED")
			for _, m := range machines {
				t.add(m.GetName(), m.GetState(), m.GetAccelerator(), m.GetImage(), formatSize(m.GetMemoryBytes()), number(m.GetCpus()),
					joined(m.GetPublish()), m.GetOwner(), a.when(m.GetExpires()), a.when(m.GetCreated()))
			}
			return a.printTable(t)
		}),
	}
}

func (a *app) showCmd() *cobra.Command {
	return &cobra.Command{
		Use:   "show NAME",
		Short: "All that is known of a machine, and what confines it",
		Args:  oneArg("NAME"),
		RunE: a.remote(func(ctx context.Context, c *api.Client, args []string) error {
			res, err := c.Machines.Show(ctx, machine(args[0]))
			if err != nil {
				return err
			}
			if a.json() {
				return a.printJSON(res.Msg)
			}
			return a.describe(res.Msg)
		}),
		ValidArgsFunction: a.machineNames,
	}
}

func (a *app) describe(m *vigiav1.Machine) error {
	var s sheet
	s.add("name", m.GetName())
	s.add("id", m.GetId())
	s.add("state", m.GetState())
	s.add("ended", strings.TrimSuffix(m.GetEnded()+": "+m.GetReason(), ": "))
	s.add("accelerator", accelerator(m.GetAccelerator()))
	s.add("image", fmt.Sprintf("%s (%s)", m.GetImage(), m.GetImageId()))
	s.add("memory", formatSize(m.GetMemoryBytes()))
	s.add("cpus", number(m.GetCpus()))
	s.add("network", network(m))
	s.add("publish", joined(m.GetPublish()))
	for _, r := range m.GetRules() {
		s.add("rule", r)
	}
	s.add("disk", disk(m.GetDisk()))
	s.add("stalled", m.GetDisk().GetStalled())
	s.add("files", m.GetDisk().GetFiles())
	s.add("introspection", m.GetIntrospection())
	s.add("host name", m.GetHostname())
	s.add("mac", m.GetMac())
	s.add("address", m.GetAddress())
	s.add("clock", m.GetClock())
	s.add("random numbers", m.GetRandom())
	if every := m.GetCheckpointEverySeconds(); every > 0 {
		s.add("checkpoints", fmt.Sprintf("every %s, the last %d are kept, the next at %s", time.Duration(every*float64(time.Second)), m.GetKeep(), a.when(m.GetNextCheckpoint())))
	}
	s.add("recording", m.GetRecording())
	s.add("debugger", m.GetReplay().GetGdb())
	s.add("inputs", m.GetInputs())
	s.add("processes seen", m.GetProbe())
	s.add("additions", joined(m.GetAdditions()))
	s.add("owner", m.GetOwner())
	s.add("purpose", m.GetPurpose())
	for _, key := range sortedKeys(m.GetLabels()) {
		s.add("label", key+"="+m.GetLabels()[key])
	}
	s.add("expires", a.when(m.GetExpires()))
	s.add("created", a.when(m.GetCreated()))
	s.add("started", a.when(m.GetStarted()))
	s.add("processes", processes(m))
	if err := s.write(a.std.Out); err != nil || len(m.GetIsolation()) == 0 {
		return err
	}
	t := newTable("CONFINED", "BY", "IN FORCE", "DETAIL")
	for _, i := range m.GetIsolation() {
		t.add(i.GetSubject(), i.GetMeasure(), yesNo(i.GetInForce()), i.GetDetail())
	}
	if err := a.printf("\n"); err != nil {
		return err
	}
	return a.printTable(t)
}

// accelerator never names tcg without what follows from it.
func accelerator(name string) string {
	if name == "tcg" {
		return "tcg (software emulation: slow, and no isolation boundary)"
	}
	return name
}

func network(m *vigiav1.Machine) string {
	text := m.GetNet()
	if m.GetQuarantined() {
		text += ", quarantined: cut off"
	}
	if n := m.GetNetwork(); n != nil {
		text += fmt.Sprintf(", %d frames in, %d out, %d dropped, %d flows open", n.GetFramesIn(), n.GetFramesOut(), n.GetDropped(), n.GetFlows())
	}
	return text
}

func disk(d *vigiav1.Disk) string {
	if d == nil {
		return ""
	}
	return fmt.Sprintf("%s, %s of its own, %d layers, %d reads, %d writes, %d flushes", formatSize(d.GetSizeBytes()),
		formatSize(d.GetUsedBytes()), d.GetLayers(), d.GetReads(), d.GetWrites(), d.GetFlushes())
}

func processes(m *vigiav1.Machine) string {
	var list []string
	for _, p := range []struct {
		name string
		pid  int64
	}{{"qemu", m.GetPid()}, {"guard", m.GetGuardPid()}, {"gate", m.GetGatePid()}} {
		if p.pid != 0 {
			list = append(list, fmt.Sprintf("%s %d", p.name, p.pid))
		}
	}
	return joined(list)
}
