package main

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// guest is a running machine and the shell on its serial console.
type guest struct {
	cmd   *exec.Cmd
	in    io.WriteCloser
	lines chan string
	count int
}

func boot(ctx context.Context, o *options, ps paths) (*guest, error) {
	args := []string{"-machine", "q35,accel=tcg", "-nodefaults", "-no-user-config", "-cpu", "max", "-display", "none", "-serial", "stdio",
		"-smp", strconv.Itoa(o.cpus), "-m", strconv.Itoa(o.memory), "-no-reboot",
		"-drive", "file=" + o.disk + ",format=raw,if=none,id=root,snapshot=on", "-device", "nvme,drive=root,serial=root",
		"-kernel", o.kernel, "-append", "console=ttyS0 quiet no_timer_check root=/dev/nvme0n1 ro " + o.add}
	for _, p := range ps {
		args = append(args, "-netdev", p.netdev, "-device", "virtio-net-pci,netdev="+p.name+",mac="+p.mac)
	}
	g := &guest{cmd: exec.CommandContext(ctx, "qemu-system-x86_64", args...), lines: make(chan string, 1024)}
	g.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	var errs strings.Builder
	g.cmd.Stderr = &errs
	out, err := g.cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	if g.in, err = g.cmd.StdinPipe(); err != nil {
		return nil, err
	}
	if err := g.cmd.Start(); err != nil {
		return nil, err
	}
	go g.read(out)
	ctx, cancel := context.WithTimeout(ctx, o.boot)
	defer cancel()
	if _, err := g.until(ctx, o.ready); err != nil {
		g.close()
		return nil, fmt.Errorf("guest did not boot: %w: %s", err, errs.String())
	}
	if err := g.configure(ctx, ps); err != nil {
		g.close()
		return nil, err
	}
	return g, nil
}

func (g *guest) read(out io.Reader) {
	defer close(g.lines)
	s := bufio.NewScanner(out)
	for s.Scan() {
		g.lines <- strings.TrimRight(s.Text(), "\r")
	}
}

// until reads lines up to one that holds mark, and returns those before it.
func (g *guest) until(ctx context.Context, mark string) ([]string, error) {
	var seen []string
	for {
		select {
		case line, ok := <-g.lines:
			if !ok {
				return seen, fmt.Errorf("QEMU ended before %q: %s", mark, strings.Join(seen, "\n"))
			}
			if strings.Contains(line, mark) {
				return seen, nil
			}
			seen = append(seen, line)
		case <-ctx.Done():
			return seen, fmt.Errorf("no %q on the console: %w", mark, ctx.Err())
		}
	}
}

// run runs a command in the guest's shell and returns what it printed.
func (g *guest) run(ctx context.Context, command string) (string, error) {
	g.count++
	// The mark is written in two halves, so that the console's echo of the command does not hold it.
	fmt.Fprintf(g.in, "%s; echo BENCH''-%d\n", command, g.count)
	seen, err := g.until(ctx, fmt.Sprintf("BENCH-%d", g.count))
	return strings.Join(seen, "\n"), err
}

// configure gives each card its address, found by its MAC.
func (g *guest) configure(ctx context.Context, ps paths) error {
	for _, p := range ps {
		script := fmt.Sprintf(`for i in /sys/class/net/e*; do if [ $(cat $i/address) = %s ]; then n=${i##*/}; ip addr flush dev $n; ip link set $n mtu %d up; ip addr add %s dev $n; fi; done`, p.mac, p.mtu, p.address)
		if _, err := g.run(ctx, script); err != nil {
			return err
		}
	}
	_, err := g.run(ctx, "sleep 1; ip addr")
	return err
}

func (g *guest) close() {
	g.cmd.Process.Kill()
	for range g.lines {
	}
	g.cmd.Wait()
}

// cpu returns the CPU seconds that a process has used.
func cpu(pid int) float64 {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return 0
	}
	f := strings.Fields(string(b[strings.LastIndexByte(string(b), ')')+1:]))
	if len(f) < 13 {
		return 0
	}
	user, _ := strconv.ParseFloat(f[11], 64)
	system, _ := strconv.ParseFloat(f[12], 64)
	return (user + system) / 100
}

// measure runs iperf3 once.
func measure(ctx context.Context, g *guest, p *path, reverse bool, seconds int) (row, error) {
	r := row{path: p.name, reverse: reverse}
	flags := ""
	if reverse {
		flags = "-R"
	}
	own := 0
	if p.own != nil {
		own = p.own.Process.Pid
	}
	ctx, cancel := context.WithTimeout(ctx, time.Duration(seconds+60)*time.Second)
	defer cancel()
	qemu0, own0 := cpu(g.cmd.Process.Pid), cpu(own)
	out, err := g.run(ctx, fmt.Sprintf("iperf3 -J -c %s -p %d -t %d %s | grep -A6 -e sum_received -e error | grep -e bits_per -e error", p.gateway, p.port, seconds, flags))
	if err != nil {
		return r, err
	}
	r.qemu, r.own = cpu(g.cmd.Process.Pid)-qemu0, cpu(own)-own0
	_, value, ok := strings.Cut(out, `"bits_per_second":`)
	if !ok {
		return r, fmt.Errorf("iperf3 in the guest said %q", out)
	}
	bits, err := strconv.ParseFloat(strings.Trim(strings.Fields(value)[0], ","), 64)
	if err != nil {
		return r, fmt.Errorf("iperf3 in the guest said %q", out)
	}
	r.mbit = bits / 1e6
	r.gbit = bits / 1e9 * float64(seconds)
	return r, nil
}
