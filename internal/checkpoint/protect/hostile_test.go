package protect

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// fighter maps descriptor 3 and prints where. Then it does what a QEMU that was taken over may do to who protects its memory: u takes
// the memory away, a puts other memory in its place, w writes a page, d puts a pipe where the device was.
func fighter() {
	mem, err := unix.Mmap(3, 0, testPages*4096, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		panic(err)
	}
	fmt.Printf("%p\n", &mem[0])
	address := uintptr(0)
	fmt.Sscanf(fmt.Sprintf("%p", &mem[0]), "0x%x", &address)
	for in := bufio.NewReader(os.Stdin); ; {
		c, err := in.ReadByte()
		if err != nil {
			os.Exit(0)
		}
		switch c {
		case 'u':
			unix.Syscall(unix.SYS_MUNMAP, address, testPages*4096, 0)
		case 'a':
			unix.Syscall6(unix.SYS_MMAP, address, testPages*4096, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS|unix.MAP_FIXED, ^uintptr(0), 0)
		case 'w':
			mem[0]++
		case 'd':
			var p [2]int
			unix.Pipe(p[:])
			unix.Dup2(p[0], 4)
		}
		fmt.Println("done")
	}
}

// fought is a fighter whose memory is watched.
type fought struct {
	cmd  *exec.Cmd
	in   io.Writer
	out  *bufio.Reader
	base uint64
}

func fight(t *testing.T) *fought {
	t.Helper()
	device, err := os.OpenFile(Device, os.O_RDWR, 0)
	if err != nil {
		t.Skipf("needs the right to open %s: %v", Device, err)
	}
	defer device.Close()
	ram, err := os.CreateTemp("/dev/shm", "vigia-test-")
	if err != nil {
		t.Fatal(err)
	}
	os.Remove(ram.Name())
	defer ram.Close()
	if err := ram.Truncate(testPages * 4096); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = append(os.Environ(), "PROTECT_TEST=fighter")
	cmd.ExtraFiles = []*os.File{ram, device}
	f := &fought{cmd: cmd}
	f.in, _ = cmd.StdinPipe()
	out, _ := cmd.StdoutPipe()
	f.out = bufio.NewReader(out)
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { cmd.Process.Kill(); cmd.Wait() })
	line, _ := f.out.ReadString('\n')
	if f.base, err = strconv.ParseUint(strings.TrimSpace(line), 0, 64); err != nil {
		t.Fatal(err)
	}
	return f
}

func (f *fought) do(t *testing.T, what string) {
	t.Helper()
	io.WriteString(f.in, what)
	for range what {
		if line, err := f.out.ReadString('\n'); err != nil || line != "done\n" {
			t.Fatalf("%q, %v", line, err)
		}
	}
}

// soon fails a test whose call does not come back: whoever makes it holds a guest.
func soon(t *testing.T, what string, f func() error) error {
	t.Helper()
	done := make(chan error, 1)
	go func() { done <- f() }()
	select {
	case err := <-done:
		return err
	case <-time.After(10 * time.Second):
		t.Fatalf("%s hangs", what)
		return nil
	}
}

// TestFighters: memory that is taken away, replaced, or dead with its process is an error at once, and nobody waits for ever.
func TestFighters(t *testing.T) {
	for _, c := range []struct{ name, does string }{{"unmapped", "u"}, {"replaced", "a"}, {"dead", ""}} {
		t.Run(c.name, func(t *testing.T) {
			f := fight(t)
			fd, err := Plant(f.cmd.Process.Pid, 4)
			if err != nil {
				t.Fatal(err)
			}
			m, err := Take(fd, f.base, testPages*4096)
			if err != nil {
				t.Skip(err)
			}
			defer m.Close()
			go m.Serve(func(off uint64) { m.Lift(off, 4096) })
			if err := m.Protect(0, testPages*4096); err != nil {
				t.Fatal(err)
			}
			f.do(t, "w")
			if c.does == "" {
				f.cmd.Process.Kill()
				f.cmd.Wait()
			} else {
				f.do(t, c.does)
			}
			if err := soon(t, "protecting what is not there", func() error { return m.Protect(0, testPages*4096) }); err == nil {
				t.Error("memory that is not there was protected")
			}
			soon(t, "lifting what is not there", func() error { return m.Lift(0, 4096) })
		})
	}
}

// TestForgedDescriptor: what a QEMU passes off as its descriptor is refused, whatever it is.
func TestForgedDescriptor(t *testing.T) {
	t.Run("planted", func(t *testing.T) {
		f := fight(t)
		f.do(t, "d")
		err := soon(t, "planting", func() error { _, err := Plant(f.cmd.Process.Pid, 4); return err })
		if err == nil {
			t.Error("a pipe made a descriptor")
		}
		f.do(t, "w") // it goes on
	})
	var p [2]int
	if err := unix.Pipe(p[:]); err != nil {
		t.Fatal(err)
	}
	defer unix.Close(p[1])
	event, _ := unix.Eventfd(0, 0)
	memory, _ := unix.MemfdCreate("forged", 0)
	for name, fd := range map[string]int{"pipe": p[0], "event": event, "memory": memory} {
		err := soon(t, "taking a "+name, func() error { _, err := Take(os.NewFile(uintptr(fd), name), 1<<20, 4096); return err })
		if !errors.Is(err, ErrUnsupported) {
			t.Errorf("%s: %v", name, err)
		}
		if _, err := unix.FcntlInt(uintptr(fd), unix.F_GETFD, 0); err == nil {
			t.Errorf("the %s that was refused is still held", name)
		}
	}
	for name, at := range map[string][2]uint64{"wraps": {^uint64(4095), 8192}, "is the kernel's": {1 << 47, 4096}, "is crooked": {1, 4096}} {
		device, _ := os.Open(os.DevNull)
		if _, err := Take(device, at[0], at[1]); err == nil || errors.Is(err, ErrUnsupported) {
			t.Errorf("memory that %s: %v", name, err)
		}
	}
}
