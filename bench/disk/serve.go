package main

import (
	"context"
	"fmt"
	"net"
	"os"
	"os/signal"
	"runtime/pprof"
	"sync/atomic"
	"syscall"

	"vigia/internal/volume"
)

// counting is an observer that does what the cheapest real one does: it looks at every request.
type counting struct{ reads, writes, bytes atomic.Int64 }

func (c *counting) Read(off, n int64) { c.reads.Add(1); c.bytes.Add(n) }
func (c *counting) Written(off int64, data []byte) {
	c.writes.Add(1)
	c.bytes.Add(int64(len(data)))
}
func (c *counting) Trimmed(off, n int64) {}
func (c *counting) Zeroed(off, n int64)  {}

// serve is the child: it serves the chain of the files given, the last of them the overlay, on a unix socket.
func serve(socket string, files []string) error {
	if p := os.Getenv("BENCH_CPUPROFILE"); p != "" {
		f, err := os.Create(p)
		if err != nil {
			return err
		}
		pprof.StartCPUProfile(f)
		defer pprof.StopCPUProfile()
	}
	var open []*os.File
	for _, name := range files {
		f, err := os.OpenFile(name, os.O_RDWR, 0)
		if err != nil {
			return err
		}
		open = append(open, f)
	}
	k := len(open) - 1
	v, err := volume.Open(open[:k], open[k], volume.Options{Observer: new(counting)})
	if err != nil {
		return err
	}
	defer v.Close()
	l, err := net.Listen("unix", socket)
	if err != nil {
		return err
	}
	fmt.Println("ready")
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, os.Interrupt)
	defer stop()
	return volume.Serve(ctx, l, v, volume.ServeOptions{Simple: true, OnError: func(err error) { fmt.Fprintln(os.Stderr, err) }})
}
