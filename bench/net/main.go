// Net measures the machine's network against QEMU's own and against passt, in one guest at one time.
//
//	go run ./bench/net [-rounds 3] [-seconds 4] [-kernel vmlinuz -disk disk.ext4 -append 'init=…']
//
// It boots one guest with three network cards: QEMU's user network (slirp), vigia's (in a process of its own, as the
// gate has it) and passt, if it is installed. iperf3 in the guest then sends to, and receives from, an iperf3 server on
// the host's loopback through each, in turns, for some rounds. Ratios of the medians are printed first, each measurement after.
//
// Without -kernel it boots vigia's own bench image, which it builds if need be (bin/vigia). Another guest's disk needs a shell on the serial console, ip and iperf3; the host needs iperf3 and QEMU. CPU seconds per Gbit
// are those of QEMU and of the network's own process. slirp runs inside QEMU: compare sums.
package main

import (
	"context"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"time"

	"vigia/bench/parts"
	"vigia/internal/lab"
)

type options struct {
	kernel, disk, add, ready string
	memory, cpus             int
	rounds, seconds, mtu     int
	boot                     time.Duration
	keep                     bool
	profile                  string
}

func main() {
	if len(os.Args) > 1 && os.Args[1] == "gate" {
		serveGate(os.Args[2:])
		return
	}
	var o options
	flag.StringVar(&o.kernel, "kernel", "", "guest kernel (default: the bench image's)")
	flag.StringVar(&o.disk, "disk", "", "guest root disk, raw ext4; not written to")
	flag.StringVar(&o.add, "append", "init=/usr/sbin/bench-init", "more of the kernel's command line")
	flag.StringVar(&o.ready, "ready", "GUEST-READY", "what the console says before its shell reads")
	flag.IntVar(&o.memory, "memory", 256, "guest memory, MiB")
	flag.IntVar(&o.cpus, "cpus", 1, "guest CPUs")
	flag.IntVar(&o.rounds, "rounds", 3, "measurements of each kind")
	flag.IntVar(&o.seconds, "seconds", 4, "length of each")
	flag.IntVar(&o.mtu, "mtu", 65520, "MTU of the vigia and passt cards; slirp has 1500")
	flag.DurationVar(&o.boot, "boot", 3*time.Minute, "how long the guest may take to boot")
	flag.StringVar(&o.profile, "profile", "", "write a CPU profile of vigia's network process here")
	flag.BoolVar(&o.keep, "keep", false, "also measure a gate that keeps what enters")
	flag.Parse()
	if (o.kernel == "") != (o.disk == "") || flag.NArg() > 0 {
		flag.Usage()
		os.Exit(2)
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	defer stop()
	if err := prepared(ctx, &o); err != nil {
		fmt.Fprintln(os.Stderr, "bench/net:", err)
		os.Exit(1)
	}
}

// prepared runs with what was given, or with the parts of the bench image.
func prepared(ctx context.Context, o *options) error {
	if o.kernel != "" {
		return run(ctx, o)
	}
	l, err := lab.Start(ctx, ".cache/bench")
	if err != nil {
		return err
	}
	img, err := parts.Image(ctx, l)
	l.End()
	if err != nil {
		return err
	}
	dir, err := os.MkdirTemp(".cache", "bench-net-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	p, err := parts.Take(l, img, dir)
	if err != nil {
		return err
	}
	o.kernel, o.disk = p.Kernel, p.Disk
	return run(ctx, o)
}

func run(ctx context.Context, o *options) error {
	dir, err := os.MkdirTemp("", "bench-net-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	os.Chmod(dir, 0o777) // passt gives up root before it binds
	paths, err := openPaths(o, filepath.Clean(dir))
	defer paths.close()
	if err != nil {
		return err
	}
	g, err := boot(ctx, o, paths)
	if err != nil {
		return err
	}
	defer g.close()
	var rows []row
	for round := range o.rounds {
		for _, p := range paths {
			for _, reverse := range []bool{false, true} {
				r, err := measure(ctx, g, p, reverse, o.seconds)
				if err != nil {
					return fmt.Errorf("%s: %w", p.name, err)
				}
				r.round = round
				rows = append(rows, r)
				fmt.Fprintf(os.Stderr, "\rround %d of %d: %s %s        ", round+1, o.rounds, p.name, r.direction())
			}
		}
	}
	fmt.Fprintf(os.Stderr, "\r%60s\r", "")
	print(os.Stdout, rows)
	return nil
}
