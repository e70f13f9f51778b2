package parts

import (
	"context"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"strings"
	"time"

	"vigia/internal/api/vigiav1"
	"vigia/internal/lab"
)

// Accelerators of a bare QEMU, as vigia has them.
var (
	TCG    = []string{"-accel", "tcg,thread=multi,tb-size=256", "-cpu", "max"}
	ICount = []string{"-accel", "tcg,thread=single,tb-size=256", "-cpu", "max", "-icount", "shift=auto"} // its instructions counted, and no more
	KVM    = []string{"-accel", "kvm", "-cpu", "host"}
)

// Bare is a QEMU with nothing around it.
type Bare struct {
	Line net.Conn // its serial line

	cmd  *exec.Cmd
	dir  string
	text strings.Builder
}

// Start boots the image's parts without vigia, on a raw copy of its disk.
func Start(ctx context.Context, l *lab.Lab, img *vigiav1.Image, accelerator []string) (*Bare, error) {
	dir, err := os.MkdirTemp(l.State, "bare-")
	if err != nil {
		return nil, err
	}
	b := &Bare{dir: dir}
	p, err := Take(l, img, dir)
	if err != nil {
		b.End()
		return nil, err
	}
	b.cmd = exec.Command("qemu-system-x86_64", append(accelerator, "-nodefaults", "-no-user-config", "-display", "none", "-machine", "q35,vmport=off,usb=off,graphics=off",
		"-m", "256", "-kernel", p.Kernel, "-initrd", p.Initrd,
		"-append", "console=ttyS0 quiet no_timer_check root=LABEL=root rootfstype=ext4 rw", "-drive", "file="+p.Disk+",format=raw,if=virtio",
		"-netdev", "user,id=n", "-device", "virtio-net-pci,netdev=n,romfile=", "-device", "virtio-rng-pci",
		"-chardev", "socket,id=c,server=on,wait=off,path="+dir+"/line", "-device", "isa-serial,chardev=c")...)
	b.cmd.Stderr = os.Stderr
	if err := b.cmd.Start(); err != nil {
		b.End()
		return nil, err
	}
	for range 100 {
		if b.Line, err = net.Dial("unix", dir+"/line"); err == nil {
			_, err = b.Console(ctx, "true")
			break
		}
		time.Sleep(50 * time.Millisecond)
	}
	if err != nil {
		b.End()
		return nil, err
	}
	return b, nil
}

// Console is lab's Console on a socket.
func (b *Bare) Console(ctx context.Context, command string) (string, error) {
	deadline := time.Now().Add(5 * time.Minute)
	buf := make([]byte, 4096)
	b.text.Reset()
	for time.Now().Before(deadline) && ctx.Err() == nil {
		fmt.Fprintf(b.Line, "echo beg$((40+2)); %s; echo end$((40+2))\n", command)
		for again := time.Now().Add(10 * time.Second); time.Now().Before(again); {
			b.Line.SetReadDeadline(time.Now().Add(time.Second))
			n, err := b.Line.Read(buf)
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

// End ends it, and removes its disk.
func (b *Bare) End() {
	if b.cmd != nil && b.cmd.Process != nil {
		b.cmd.Process.Kill()
		b.cmd.Wait()
	}
	os.RemoveAll(b.dir)
}
