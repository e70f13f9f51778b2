// Guest measures what being guarded costs a guest that computes: the same work under vigia and under the same QEMU with
// nothing around it.
//
//	go run ./bench/guest [-rounds 5]
//
// Two guests of one image are up at a time: one is vigia's; the other runs on the same kernel, initrd, CPU and
// accelerator, on a raw copy of the disk, with no jail, guard or gate. They work in turns, so that they share whatever
// else the host does. It needs bin/vigia, openssl in the image, and room for the raw copy.
package main

import (
	"context"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"strconv"
	"strings"

	"vigia/bench/parts"
	"vigia/bench/table"
	"vigia/internal/lab"
)

// work is OpenSSL hashing for three seconds; the third column of the answer is thousands of bytes a second.
const work = "openssl speed -seconds 3 -bytes 8192 sha256 2>/dev/null | tail -n 1"

const name = "guarded"

func main() {
	rounds := flag.Int("rounds", 5, "turns of each")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	defer stop()
	if err := run(ctx, *rounds); err != nil {
		fmt.Fprintln(os.Stderr, "bench/guest:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, rounds int) error {
	l, err := lab.Start(ctx, ".cache/bench")
	if err != nil {
		return err
	}
	defer l.End()
	img, err := parts.Image(ctx, l)
	if err != nil {
		return err
	}
	l.Command(ctx, "rm", "--force", name)
	if err := l.Must(ctx, "run", "bench", name, "--memory", "256M"); err != nil {
		return err
	}
	defer l.Command(context.WithoutCancel(ctx), "rm", "--force", name)
	accelerator := parts.TCG
	if m, err := l.Show(ctx, name); err == nil && m.Accelerator == "kvm" {
		accelerator = parts.KVM
	}
	bare, err := parts.Start(ctx, l, img, accelerator)
	if err != nil {
		return err
	}
	defer bare.End()
	under := func() (string, error) { return l.Console(ctx, name, work) }
	alone := func() (string, error) { return bare.Console(ctx, work) }
	var guarded, plain []float64
	for range rounds {
		a, err := speed(under())
		if err != nil {
			return fmt.Errorf("guarded: %w", err)
		}
		b, err := speed(alone())
		if err != nil {
			return fmt.Errorf("unguarded: %w", err)
		}
		guarded, plain = append(guarded, a), append(plain, b)
	}
	table.Print(os.Stdout, []table.Verdict{{Claim: "guest CPU work, guarded of unguarded", Measured: table.Quantile(guarded, 0.5) / table.Quantile(plain, 0.5), Target: 0.98}})
	fmt.Printf("\nsha256, 8 KiB blocks, MB/s a round\nguarded   %s\nunguarded %s\n", row(guarded), row(plain))
	return nil
}

func speed(line string, err error) (float64, error) {
	if err != nil {
		return 0, err
	}
	words := strings.Fields(line)
	if len(words) < 2 {
		return 0, fmt.Errorf("openssl says %q", line)
	}
	k, err := strconv.ParseFloat(strings.TrimSuffix(words[len(words)-1], "k"), 64)
	return k / 1000, err
}

func row(mbs []float64) string {
	var out []string
	for _, v := range mbs {
		out = append(out, fmt.Sprintf("%7.1f", v))
	}
	return strings.Join(out, " ")
}
