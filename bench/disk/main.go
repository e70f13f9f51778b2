// Command disk measures vigia's disk against QEMU's own, side by side in one run: ratios first, then the raw rows.
//
//	go run ./bench/disk [-quick] [-only WORDS] [-dir DIR]
//
// Every case runs in rounds; in each round every target takes its turn, so that what else the machine does
// falls on all of them. A ratio is the median of the rounds' ratios. Targets:
//
//   - QEMU's raw file driver, in qemu-img itself: its default, the page cache (-t writeback) and threads;
//   - vigia's NBD server over layer and overlay, with an observer, in a process of its own;
//   - the socket alone: an NBD server that does nothing. What it does not reach, no server can, so it tells a figure that
//     is missed here from one that cannot be had through a socket on this machine;
//   - qemu-nbd over a raw file, with the page cache too.
//
// All data is in the page cache, as for a guest that reads what was read or written lately: this is the hard case, since
// a disk that is waited for hides whatever the path to it costs. Before each case every file is written back and
// dropped, and before one that reads, read in order; each case but one has a fresh overlay. The first round is not counted: it
// fills overlay and caches.
//
// Where it may (as root), it and all it starts run at the highest priority, raw file and servers alike: other work on the machine then
// falls less on the round trips of a server, which need a processor at once, twice for each request.
//
// It needs qemu-img and qemu-nbd, and 3 GB of room in DIR (1.5 GB with -quick).
package main

import (
	"context"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"runtime"
	"strings"

	"golang.org/x/sys/unix"
)

func main() {
	if len(os.Args) > 3 && os.Args[1] == "serve" {
		exit(serve(os.Args[2], os.Args[3:]))
	}
	if len(os.Args) == 4 && os.Args[1] == "ceiling" {
		exit(serveCeiling(os.Args[2], os.Args[3]))
	}
	quick := flag.Bool("quick", false, "fewer rounds on a smaller disk")
	only := flag.String("only", "", "only the cases whose name has these words")
	dir := flag.String("dir", "", "where the files go (a temporary directory of the system's)")
	flag.Parse()
	runtime.LockOSThread() // priority is the thread's, and that of what is started from it
	first := unix.Setpriority(unix.PRIO_PROCESS, 0, -20) == nil
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	defer stop()
	exit(run(ctx, *dir, *only, *quick, first))
}

func exit(err error) {
	if err != nil {
		fmt.Fprintln(os.Stderr, "bench/disk:", err)
		os.Exit(1)
	}
	os.Exit(0)
}

func run(ctx context.Context, parent, only string, quick, first bool) error {
	dir, err := os.MkdirTemp(parent, "vigia-bench-disk-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	size, rounds, scale := int64(512<<20), 5, 1
	if quick {
		size, rounds, scale = 256<<20, 3, 4
	}
	t, err := setUp(ctx, dir, size)
	if err != nil {
		return err
	}
	defer t.tearDown()
	var rows []row
	for _, c := range cases(scale) {
		if !strings.Contains(c.name, only) {
			continue
		}
		r, err := t.measure(ctx, c, rounds)
		if err != nil {
			return err
		}
		rows = append(rows, r)
	}
	layers, err := t.chain(ctx, rounds, scale)
	if err != nil {
		return err
	}
	clone, err := clones(dir)
	if err != nil {
		return err
	}
	priority := "usual priority"
	if first {
		priority = "highest priority"
	}
	fmt.Printf("vigia's disk beside QEMU's, %d MiB, %d rounds, %d processors, load %s, %s\n\n", size>>20, rounds, runtime.NumCPU(), load(), priority)
	printRatios(rows, layers, clone)
	printRows(rows, layers, clone)
	return nil
}
