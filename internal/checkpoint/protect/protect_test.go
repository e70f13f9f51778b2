package protect

import (
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"strconv"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

const testPages = 512

// TestMain is also the process that is watched: it writes its shared memory, and says when.
func TestMain(m *testing.M) {
	switch os.Getenv("PROTECT_TEST") {
	case "victim":
		victim()
	case "fighter":
		fighter()
	}
	os.Exit(m.Run())
}

// victim maps descriptor 3, prints where, and on each line of its input adds one to every page.
func victim() {
	mem, err := unix.Mmap(3, 0, testPages*4096, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		panic(err)
	}
	fmt.Printf("%p\n", &mem[0])
	var b [1]byte
	for {
		if n, err := unix.Read(0, b[:]); n != 1 || err != nil {
			os.Exit(0)
		}
		for p := range testPages {
			mem[p*4096]++
		}
		// The kernel writes too: what it reads for the process lands in protected memory.
		if _, err := unix.Pread(3, mem[4096+8:4096+16], 0); err != nil {
			fmt.Println("kernel write:", err)
		}
		fmt.Println("done")
	}
}

// TestFreeze protects memory of another process, and sees each page as it was, though the process goes on writing.
func TestFreeze(t *testing.T) {
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
	cmd.Env = append(os.Environ(), "PROTECT_TEST=victim")
	cmd.ExtraFiles = []*os.File{ram, device}
	in, _ := cmd.StdinPipe()
	out, _ := cmd.StdoutPipe()
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() { cmd.Process.Kill(); cmd.Wait() }()
	line := func() string {
		b := make([]byte, 100)
		n, _ := out.Read(b)
		return string(bytes.TrimSpace(b[:n]))
	}
	base, err := strconv.ParseUint(line(), 0, 64)
	if err != nil {
		t.Fatal(err)
	}
	write := func() { in.Write([]byte{'\n'}) }
	write()
	if got := line(); got != "done" {
		t.Fatal(got)
	}
	f, err := Plant(cmd.Process.Pid, 4)
	if err != nil {
		t.Fatal(err)
	}
	m, err := Take(f, base, testPages*4096)
	if err != nil {
		t.Skip(err)
	}
	var faults atomic.Int64
	var wrong atomic.Int64
	want := byte(1)
	go m.Serve(func(off uint64) {
		var b [1]byte
		ram.ReadAt(b[:], int64(off))
		if b[0] != want {
			wrong.Add(1)
		}
		faults.Add(1)
		if err := m.Lift(off, 4096); err != nil {
			t.Error(err)
		}
	})
	for round := range byte(3) {
		faults.Store(0)
		want = round + 1
		if err := m.Protect(0, testPages*4096); err != nil {
			t.Fatal(err)
		}
		write()
		if got := line(); got != "done" {
			t.Fatal(got)
		}
		if faults.Load() != testPages || wrong.Load() != 0 {
			t.Errorf("round %d: %d pages were told of, %d too late", round, faults.Load(), wrong.Load())
		}
		write() // nothing is protected any more: nothing is told
		if got := line(); got != "done" {
			t.Fatal(got)
		}
		if faults.Load() != testPages {
			t.Errorf("round %d: %d faults", round, faults.Load())
		}
		for p := range testPages {
			ram.WriteAt([]byte{round + 2}, int64(p)*4096)
		}
	}
	if fds, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", cmd.Process.Pid)); err == nil {
		for _, e := range fds {
			if to, _ := os.Readlink(fmt.Sprintf("/proc/%d/fd/%s", cmd.Process.Pid, e.Name())); to == "anon_inode:[userfaultfd]" {
				t.Error("the descriptor was left in the process")
			}
		}
	}
	if err := m.Protect(0, (testPages+1)*4096); err == nil {
		t.Error("memory beyond the range was protected")
	}
}

// TestDeadKeeper: a process that waits for a keeper which ends goes on.
func TestDeadKeeper(t *testing.T) {
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
	ram.Truncate(testPages * 4096)
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = append(os.Environ(), "PROTECT_TEST=victim")
	cmd.ExtraFiles = []*os.File{ram, device}
	in, _ := cmd.StdinPipe()
	out, _ := cmd.StdoutPipe()
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() { cmd.Process.Kill(); cmd.Wait() }()
	b := make([]byte, 100)
	n, _ := out.Read(b)
	base, err := strconv.ParseUint(string(bytes.TrimSpace(b[:n])), 0, 64)
	if err != nil {
		t.Fatal(err)
	}
	f, err := Plant(cmd.Process.Pid, 4)
	if err != nil {
		t.Fatal(err)
	}
	m, err := Take(f, base, testPages*4096)
	if err != nil {
		t.Skip(err)
	}
	if err := m.Protect(0, testPages*4096); err != nil {
		t.Fatal(err)
	}
	in.Write([]byte{'\n'})
	done := make(chan string, 1)
	go func() {
		n, _ := out.Read(b)
		done <- string(b[:n])
	}()
	select {
	case <-done:
		t.Fatal("it wrote protected memory")
	case <-time.After(100 * time.Millisecond):
	}
	m.Close()
	select {
	case <-done:
	case <-time.After(10 * time.Second):
		t.Fatal("it hangs, though nobody protects its memory any more")
	}
}
