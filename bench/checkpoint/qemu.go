package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"vigia/bench/parts"
	"vigia/bench/table"
	"vigia/internal/machine/qmp"
)

// qemu measures what QEMU has for the same: savevm and loadvm on qcow2, and a stopped guest's migration into a file.
func (b *bench) qemu() error {
	dir, err := os.MkdirTemp(b.State, "bare-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	p, err := parts.Take(b.Lab, b.img, dir)
	if err != nil {
		return err
	}
	disk := filepath.Join(dir, "disk.qcow2")
	if out, err := exec.Command("qemu-img", "convert", "-O", "qcow2", p.Disk, disk).CombinedOutput(); err != nil {
		return fmt.Errorf("qemu-img: %w: %s", err, out)
	}
	cmd := exec.CommandContext(b.ctx, "qemu-system-x86_64", "-nodefaults", "-no-user-config", "-display", "none", "-machine", "q35,vmport=off,usb=off,graphics=off",
		"-accel", "tcg,thread=multi,tb-size=256", "-cpu", "max", "-m", "512", "-kernel", p.Kernel, "-initrd", p.Initrd,
		"-append", "console=ttyS0 quiet no_timer_check root=LABEL=root rootfstype=ext4 rw", "-drive", "file="+disk+",format=qcow2,if=virtio",
		"-chardev", "socket,id=c,server=on,wait=off,path="+dir+"/line", "-device", "isa-serial,chardev=c",
		"-chardev", "socket,id=q,server=on,wait=off,path="+dir+"/qmp", "-mon", "chardev=q,mode=control")
	cmd.Stderr = os.Stderr
	if err := cmd.Start(); err != nil {
		return err
	}
	defer func() { cmd.Process.Kill(); cmd.Wait() }()
	line, err := dial(dir + "/line")
	if err != nil {
		return err
	}
	defer line.Close()
	control, err := dial(dir + "/qmp")
	if err != nil {
		return err
	}
	q, err := qmp.New(b.ctx, control)
	if err != nil {
		return err
	}
	defer q.Close()
	go func() {
		for range q.Events() {
		}
	}()
	if err := ask(line, fill(200)); err != nil {
		return err
	}
	rounds := min(b.rounds, 3)
	var save, load, move []float64
	for i := range rounds {
		name := fmt.Sprintf("s%d", i)
		for _, c := range []struct {
			word string
			into *[]float64
		}{{"savevm " + name, &save}, {"loadvm " + name, &load}} {
			began := time.Now()
			var said string
			if err := q.Run(b.ctx, "human-monitor-command", map[string]any{"command-line": c.word}, &said); err != nil {
				return err
			}
			if said != "" {
				return errors.New(strings.TrimSpace(said))
			}
			*c.into = append(*c.into, ms(began))
		}
		took, err := migrate(b.ctx, q, dir+"/state")
		if err != nil {
			return err
		}
		move = append(move, took)
	}
	fmt.Printf("\nQEMU, 512M, 200 MiB touched; the guest stands still for all of it: savevm %.0f ms, loadvm %.0f ms, migration to a file %.0f ms\n",
		table.Quantile(save, .5), table.Quantile(load, .5), table.Quantile(move, .5))
	return nil
}

// migrate moves a stopped guest's state into a file, and lets it go on.
func migrate(ctx context.Context, q *qmp.Client, path string) (float64, error) {
	began := time.Now()
	for _, c := range []struct {
		name string
		args any
	}{{"stop", nil}, {"migrate-set-parameters", map[string]any{"max-bandwidth": int64(1) << 40}}, {"migrate", map[string]any{"uri": "exec:cat > " + path}}} {
		if err := q.Run(ctx, c.name, c.args, nil); err != nil {
			return 0, err
		}
	}
	for {
		var s struct {
			Status string `json:"status"`
		}
		if err := q.Run(ctx, "query-migrate", nil, &s); err != nil {
			return 0, err
		}
		if s.Status == "completed" {
			break
		}
		if s.Status == "failed" {
			return 0, errors.New("the migration failed")
		}
		time.Sleep(2 * time.Millisecond)
	}
	if f, err := os.Open(path); err == nil {
		f.Sync()
		f.Close()
	}
	if err := q.Run(ctx, "cont", nil, nil); err != nil {
		return 0, err
	}
	return ms(began), nil
}

func dial(path string) (net.Conn, error) {
	for range 100 {
		if c, err := net.Dial("unix", path); err == nil {
			return c, nil
		}
		time.Sleep(50 * time.Millisecond)
	}
	return nil, fmt.Errorf("%s: nobody listens", path)
}

// ask runs a command on a bare guest's serial line.
func ask(line net.Conn, command string) error {
	var text strings.Builder
	buf := make([]byte, 4096)
	deadline := time.Now().Add(5 * time.Minute)
	for time.Now().Before(deadline) {
		fmt.Fprintf(line, "echo beg$((40+2)); %s; echo end$((40+2))\n", command)
		for again := time.Now().Add(10 * time.Second); time.Now().Before(again); {
			line.SetReadDeadline(time.Now().Add(time.Second))
			n, _ := line.Read(buf)
			text.Write(buf[:n])
			if strings.Contains(text.String(), "end42") {
				return nil
			}
			if strings.Contains(text.String(), "beg42") {
				again = time.Now().Add(10 * time.Second)
			}
		}
	}
	return errors.New("the bare guest does not answer")
}
