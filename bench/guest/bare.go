package main

import (
	"context"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"strings"
	"time"

	"vigia/bench/parts"
	"vigia/internal/api/vigiav1"
	"vigia/internal/lab"
)

// bare is a QEMU with nothing around it.
type bare struct {
	cmd  *exec.Cmd
	line net.Conn
	dir  string
	text strings.Builder
}

// startBare boots the image's parts without vigia, on a raw copy of its disk.
func startBare(ctx context.Context, l *lab.Lab, img *vigiav1.Image) (*bare, error) {
	dir, err := os.MkdirTemp(l.State, "bare-")
	if err != nil {
		return nil, err
	}
	b := &bare{dir: dir}
	p, err := parts.Take(l, img, dir)
	if err != nil {
		b.end()
		return nil, err
	}
	accel, cpu := "tcg,thread=multi,tb-size=256", "max"
	if m, err := l.Show(ctx, name); err == nil && m.Accelerator == "kvm" {
		accel, cpu = "kvm", "host"
	}
	b.cmd = exec.Command("qemu-system-x86_64", "-nodefaults", "-no-user-config", "-display", "none", "-machine", "q35,vmport=off,usb=off,graphics=off",
		"-accel", accel, "-cpu", cpu, "-m", "256", "-kernel", p.Kernel, "-initrd", p.Initrd,
		"-append", "console=ttyS0 quiet no_timer_check root=LABEL=root rootfstype=ext4 rw", "-drive", "file="+p.Disk+",format=raw,if=virtio",
		"-netdev", "user,id=n", "-device", "virtio-net-pci,netdev=n,romfile=", "-device", "virtio-rng-pci",
		"-chardev", "socket,id=c,server=on,wait=off,path="+dir+"/line", "-device", "isa-serial,chardev=c")
	b.cmd.Stderr = os.Stderr
	if err := b.cmd.Start(); err != nil {
		b.end()
		return nil, err
	}
	for range 100 {
		if b.line, err = net.Dial("unix", dir+"/line"); err == nil {
			_, err = b.console(ctx, "true")
			break
		}
		time.Sleep(50 * time.Millisecond)
	}
	if err != nil {
		b.end()
		return nil, err
	}
	return b, nil
}

// console is lab's Console on a socket.
func (b *bare) console(ctx context.Context, command string) (string, error) {
	deadline := time.Now().Add(5 * time.Minute)
	buf := make([]byte, 4096)
	b.text.Reset()
	for time.Now().Before(deadline) && ctx.Err() == nil {
		fmt.Fprintf(b.line, "echo beg$((40+2)); %s; echo end$((40+2))\n", command)
		for again := time.Now().Add(10 * time.Second); time.Now().Before(again); {
			b.line.SetReadDeadline(time.Now().Add(time.Second))
			n, err := b.line.Read(buf)
			b.text.Write(buf[:n])
			if err == io.EOF {
				return "", fmt.Errorf("serial line closed: %q", b.text.String())
			}
			_, after, heard := strings.Cut(b.text.String(), "beg42")
			if answer, _, ended := strings.Cut(after, "end42"); heard && ended {
				return strings.TrimSpace(answer), nil
			}
			if heard {
				again = time.Now().Add(10 * time.Second)
			}
		}
	}
	return "", fmt.Errorf("no answer on the serial line: %q", b.text.String())
}

func (b *bare) end() {
	if b.cmd != nil && b.cmd.Process != nil {
		b.cmd.Process.Kill()
		b.cmd.Wait()
	}
	os.RemoveAll(b.dir)
}
