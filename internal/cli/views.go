package cli

import (
	"context"
	"fmt"

	"github.com/spf13/cobra"

	"vigia/internal/api"
	"vigia/internal/api/vigiav1"
)

func (a *app) psCmd() *cobra.Command {
	return &cobra.Command{
		Use:   "ps NAME",
		Short: "The processes of a machine, read from its memory",
		Args:  oneArg("NAME"),
		RunE: a.remote(func(ctx context.Context, c *api.Client, args []string) error {
			res, err := c.Views.Processes(ctx, machine(args[0]))
			if err != nil {
				return err
			}
			list := res.Msg.GetProcesses()
			if a.json() {
				return printList(a, list)
			}
			t := newTable(">PID", ">PPID", ">UID", "STATE", ">THREADS", ">CPU", "START", "COMM", "COMMAND")
			for _, p := range list {
				t.add(number(p.GetPid()), number(p.GetPpid()), number(p.GetUid()), p.GetState(), number(p.GetThreads()),
					cpuTime(p.GetCpuSeconds()), a.when(p.GetStart()), p.GetComm(), commandLine(p))
			}
			return a.printTable(t)
		}),
		ValidArgsFunction: a.machineNames,
	}
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
