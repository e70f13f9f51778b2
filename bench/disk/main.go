// Command disk measures vigia's disk against QEMU's own, side by side in one run: ratios first, then the raw rows.
//
//	go run ./bench/disk [-quick] [-dir DIR]
//
// Every case runs in rounds; in each round every target takes its turn, so that what else the machine does
// falls on all of them. A ratio is the median of the rounds' ratios. Targets: QEMU's raw file driver in qemu-img itself; vigia's
// NBD server over layer and overlay, with an observer, in a process of its own; qemu-nbd over the same raw file. CPU is
// the server's (for raw: all of qemu-img's) per request.
//
// It needs qemu-img and qemu-nbd, and 4 GB of room in DIR (1 GB with -quick).
package main

import (
	"context"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"runtime"
)

func main() {
	if len(os.Args) > 2 && os.Args[1] == "serve" {
		exit(serve(os.Args[2], os.Args[3:]))
	}
	quick := flag.Bool("quick", false, "fewer rounds on a smaller disk")
	dir := flag.String("dir", "", "where the files go (a temporary directory of the system's)")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	defer stop()
	exit(run(ctx, *dir, *quick))
}

func exit(err error) {
	if err != nil {
		fmt.Fprintln(os.Stderr, "bench/disk:", err)
		os.Exit(1)
	}
	os.Exit(0)
}

func run(ctx context.Context, parent string, quick bool) error {
	dir, err := os.MkdirTemp(parent, "vigia-bench-disk-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	size, rounds, scale := int64(1<<30), 5, 1
	if quick {
		size, rounds, scale = 256<<20, 3, 4
	}
	t, err := setUp(ctx, dir, size)
	if err != nil {
		return err
	}
	defer t.tearDown()
	rows, err := t.measure(ctx, cases(scale), rounds)
	if err != nil {
		return err
	}
	deep, err := chain(dir, rounds, scale)
	if err != nil {
		return err
	}
	clone, err := clones(dir)
	if err != nil {
		return err
	}
	fmt.Printf("vigia's disk beside QEMU's, %d MiB, %d rounds, %d processors, load %s\n\n", size>>20, rounds, runtime.NumCPU(), load())
	printRatios(rows, deep, clone)
	printRows(rows, deep, clone)
	return nil
}
