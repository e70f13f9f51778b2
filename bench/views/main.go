// Views measures what it costs to look into a guest: each view, the profile of the kernel, and finding it in memory.
//
//	go run ./bench/views [-rounds 25] [-ram FILE -kernel FILE]
//
// It builds the image debian (systemd), runs a machine of it, and opens its QEMU's memory as the daemon does for a guard: the
// shared file, and, for what a clone's costs, /proc/PID/mem. That takes root. With -ram and -kernel it looks at the saved
// memory of a guest instead. Times are CPU time of the thread that looks, the median of rounds of 20, so that they hold on
// a machine that does other things too; the last rows are of the kernel files named on the command line.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"runtime"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"vigia/bench/table"
	"vigia/internal/introspect"
	"vigia/internal/kernel"
	"vigia/internal/lab"
	"vigia/internal/memory"
)

const name = "views"

func main() {
	rounds := flag.Int("rounds", 25, "rounds of 20 looks each")
	ram := flag.String("ram", "", "the saved RAM file of a q35 guest, in place of one that runs")
	image := flag.String("kernel", "", "its kernel file")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	defer stop()
	runtime.LockOSThread() // CPU time is counted by thread
	var err error
	if *ram != "" {
		err = saved(*ram, *image, *rounds)
	} else {
		err = running(ctx, *rounds)
	}
	if err == nil {
		err = profiles(flag.Args())
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "bench/views:", err)
		os.Exit(1)
	}
}

// guest is what is looked at: its memory in one or both of its forms.
type guest struct {
	kernel  string
	shared  *memory.RAM
	private *memory.Process // nil where there is none
}

// running boots a machine and looks at it when its processes have settled.
func running(ctx context.Context, rounds int) error {
	l, err := lab.Start(ctx, ".cache/bench")
	if err != nil {
		return err
	}
	defer l.End()
	if err := l.Must(ctx, "image", "build", "debian", "--reuse"); err != nil {
		return err
	}
	l.Command(ctx, "rm", "--force", name)
	if err := l.Must(ctx, "run", "debian", name, "--memory", "512M", "--cpus", "2"); err != nil {
		return err
	}
	defer l.Command(context.WithoutCancel(ctx), "rm", "--force", name)
	m, err := l.Show(ctx, name)
	if err != nil {
		return err
	}
	id, err := os.ReadFile(filepath.Join(l.State, "images", "names", "debian"))
	if err != nil {
		return err
	}
	g, err := open(int(m.Pid))
	if err != nil {
		return err
	}
	defer g.shared.Close()
	g.kernel = filepath.Join(l.State, "images", strings.TrimSpace(string(id)), "vmlinuz")
	if err := settled(ctx, g); err != nil {
		return err
	}
	return look(g, rounds)
}

// open finds the file behind a QEMU's memory, and where QEMU has it mapped.
func open(pid int) (*guest, error) {
	entries, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", pid))
	if err != nil {
		return nil, err
	}
	for _, e := range entries {
		file := fmt.Sprintf("/proc/%d/fd/%s", pid, e.Name())
		target, err := os.Readlink(file)
		if err != nil || !strings.Contains(target, ".ram") {
			continue
		}
		f, err := os.Open(file)
		if err != nil {
			return nil, err
		}
		st, err := f.Stat()
		if err != nil {
			return nil, err
		}
		layout := memory.Q35Layout(uint64(st.Size()))
		g := &guest{}
		if g.shared, err = memory.Map(f, layout); err != nil {
			return nil, err
		}
		base, err := mappedAt(pid, st.Size())
		if err != nil {
			return nil, err
		}
		mem, err := os.Open(fmt.Sprintf("/proc/%d/mem", pid))
		if err != nil {
			return nil, err
		}
		g.private, err = memory.NewProcess(mem, base, layout)
		return g, err
	}
	return nil, fmt.Errorf("QEMU %d has no memory file open", pid)
}

func mappedAt(pid int, size int64) (uint64, error) {
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/maps", pid))
	if err != nil {
		return 0, err
	}
	for line := range strings.Lines(string(text)) {
		var from, to uint64
		if _, err := fmt.Sscanf(line, "%x-%x", &from, &to); err == nil && strings.Contains(line, ".ram") && to-from == uint64(size) {
			return from, nil
		}
	}
	return 0, errors.New("QEMU has its memory nowhere in one piece")
}

// settled waits until the guest has a login prompt and its number of processes has not changed for ten seconds.
func settled(ctx context.Context, g *guest) error {
	p, err := build(g.kernel)
	if err != nil {
		return err
	}
	last, since := 0, time.Now()
	for end := time.Now().Add(5 * time.Minute); time.Now().Before(end) && ctx.Err() == nil; time.Sleep(time.Second) {
		seen, err := introspect.Attach(g.shared, p)
		if err != nil {
			continue
		}
		list, err := seen.CPU(nil)
		prompt := false
		for i := range list {
			prompt = prompt || string(list[i].Comm()) == "agetty" || string(list[i].Comm()) == "login"
		}
		if err != nil || len(list) != last {
			last, since = len(list), time.Now()
		}
		if prompt && time.Since(since) > 10*time.Second {
			return nil
		}
	}
	return errors.Join(errors.New("the guest did not come to rest"), ctx.Err())
}

func saved(ram, image string, rounds int) error {
	f, err := os.Open(ram)
	if err != nil {
		return err
	}
	st, err := f.Stat()
	if err != nil {
		return err
	}
	g := &guest{kernel: image}
	if g.shared, err = memory.Map(f, memory.Q35Layout(uint64(st.Size()))); err != nil {
		return err
	}
	defer g.shared.Close()
	mem, err := os.Open("/proc/self/mem")
	if err != nil {
		return err
	}
	base, err := mappedAt(os.Getpid(), st.Size())
	if err == nil {
		g.private, err = memory.NewProcess(mem, base, memory.Q35Layout(uint64(st.Size())))
	}
	if err != nil {
		return err
	}
	return look(g, rounds)
}

func build(image string) (*kernel.Profile, error) {
	f, err := os.Open(image)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	st, err := f.Stat()
	if err != nil {
		return nil, err
	}
	return kernel.Build(f, st.Size())
}

// spent is this thread's CPU time. (What getrusage says of it moves at the scheduler's ticks alone.)
func spent() time.Duration {
	var t unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_THREAD_CPUTIME_ID, &t); err != nil {
		return 0
	}
	return time.Duration(t.Nano())
}

const each = 20

// measure returns the median of what one call costs, in microseconds.
func measure(rounds int, f func() error) (float64, error) {
	var us []float64
	for range rounds {
		began := spent()
		for range each {
			if err := f(); err != nil {
				return 0, err
			}
		}
		us = append(us, float64((spent()-began).Nanoseconds())/1e3/each)
	}
	return table.Quantile(us, 0.5), nil
}
