package probe

import (
	"encoding/binary"
	"errors"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"vigia/internal/memory"
)

const (
	emulatedKernel = 0xffff888000000000
	emulatedUser   = 0x400000
	emulatedHalf   = 64 << 10
)

// emulator is the plugin as a program, built with all that the compiler has to find mistakes.
func emulator(t *testing.T) string {
	t.Helper()
	if _, err := exec.LookPath("cc"); err != nil {
		t.Skip("no C compiler: the plugin is not built either")
	}
	out := filepath.Join(t.TempDir(), "emulator")
	build := func(more ...string) ([]byte, error) {
		return exec.Command("cc", append([]string{"-std=gnu11", "-O1", "-g", "-Wall", "-Wextra", "-Werror", "-o", out, "testdata/emulator/emulator.c"}, more...)...).CombinedOutput()
	}
	if _, err := build("-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer"); err == nil {
		return out
	}
	if said, err := build(); err != nil { // a compiler without sanitizers
		t.Fatalf("%v: %s", err, said)
	}
	return out
}

// emulated is a page with one point, and memory.
type emulated struct {
	p    *page
	file *os.File
	ram  []byte
}

func newEmulated(t *testing.T, steps []memory.Step) *emulated {
	t.Helper()
	e := &emulated{file: newPage(t, PageSize, unix.F_SEAL_SHRINK), ram: make([]byte, 2*emulatedHalf)}
	var err error
	if e.p, err = openPage(e.file); err != nil {
		t.Fatal(err)
	}
	e.p.prepare([]uint64{0xffffffff81000000}, 0xffffffff82000000)
	e.p.put32(atPatience, 1000)
	e.p.put64(atSlide, 2<<20)
	e.p.put32(atReader, 1)
	for cpu := range 2 {
		e.p.current(cpu, emulatedKernel)
	}
	e.p.recipe(steps, 1)
	e.p.enabled(1)
	return e
}

func (e *emulated) put(va, v uint64) {
	if va >= emulatedKernel {
		va -= emulatedKernel
	} else {
		va -= emulatedUser - emulatedHalf
	}
	binary.LittleEndian.PutUint64(e.ram[va:], v)
}

func (e *emulated) run(t *testing.T, program, times string) string {
	t.Helper()
	var said strings.Builder
	cmd := exec.Command(program, times)
	cmd.Stdout, cmd.Stderr = &said, &said
	if err := e.try(t, cmd); err != nil {
		t.Fatalf("%v: %s", err, &said)
	}
	return said.String()
}

func (e *emulated) try(t *testing.T, cmd *exec.Cmd) error {
	t.Helper()
	ram := newPage(t, int64(len(e.ram)), 0)
	if _, err := ram.WriteAt(e.ram, 0); err != nil {
		t.Fatal(err)
	}
	cmd.ExtraFiles = []*os.File{e.file, ram}
	return cmd.Run()
}

// TestPluginCopies runs the plugin's own code: it copies what the recipe says, follows names and texts, and stops where the ring is full.
func TestPluginCopies(t *testing.T) {
	program := emulator(t)
	const task, dentry, up, mount, name = emulatedKernel + 0x1000, emulatedKernel + 0x2000, emulatedKernel + 0x3000, emulatedKernel + 0x4000, emulatedKernel + 0x5000
	e := newEmulated(t, []memory.Step{
		{Op: memory.StepCopy, At: 16, Len: 24},
		{Op: memory.StepLoad, Dst: 1, At: 24},
		{Op: memory.StepLoad, Dst: 2, At: 32},
		{Op: memory.StepClimb, Base: 1, Dst: 2},
		{Op: memory.StepLoad, Dst: 3, At: 40},
		{Op: memory.StepLoad, Dst: 4, At: 48},
		{Op: memory.StepLoad, Dst: 5, At: 56},
		{Op: memory.StepText, Base: 3, Dst: 4, At: 5, Len: 4096},
		{Op: memory.StepLoad, Dst: 6, At: 1 << 30}, // absent
		{Op: memory.StepCopy, Base: 6, Len: 8},
		{Op: memory.StepLoad, Dst: 7, When: memory.WhenOpening, At: 64},
	})
	for at, v := range map[int]uint64{atMount: 32, atAbove: 16, atOn: 24, atRoot: 0, atParent: 24, atName: 40, atNameLen: 36} {
		e.p.put32(at, uint32(v))
	}
	for va, v := range map[uint64]uint64{
		emulatedKernel: task, task + 16: 7, task + 24: mount + 32, task + 32: dentry,
		task + 40: emulatedUser + 4090, task + 48: emulatedUser + 4100, task + 56: emulatedUser + 4110,
		dentry + 24: up, dentry + 32: 300 << 32, dentry + 40: name,
		mount + 32: up, mount + 16: mount,
	} {
		e.put(va, v)
	}
	copy(e.ram[emulatedHalf+4090:], "an argument and more")
	e.ram[name-emulatedKernel+254] = 'z'
	e.p.put64(atMagic, 0) // the guard is not there yet
	if cmd := exec.Command(program, "1"); e.try(t, cmd) == nil || e.p.alive() {
		t.Error("points are taken that nobody has written")
	}
	e.p.put64(atMagic, pageMagic)
	said := e.run(t, program, "3")
	if !e.p.alive() {
		t.Error("nobody is told that the points were taken")
	}
	var buf [memory.MaxCopy]byte
	for n := range 3 {
		c, more, err := e.p.next(buf[:])
		if err != nil || !more || c.task != task || c.cpu != n&1 || c.point != 0 {
			t.Fatalf("%+v, %v, %v", c, more, err)
		}
		s := memory.NewSpace(nil, 0, 4)
		s.From(c.what)
		if v, err := s.U64(task + 16); v != 7 || err != nil {
			t.Errorf("copied %d, %v", v, err)
		}
		text := make([]byte, 20)
		if err := s.Read(emulatedUser+4090, text); err != nil || string(text) != "an argument and more" {
			t.Errorf("%q, %v", text, err)
		}
		if v, err := s.U8(name + 254); v != 'z' || err != nil {
			t.Errorf("a name of more than 255 bytes: %c, %v", v, err)
		}
		for _, va := range []uint64{name + 255, task + 64, task + 8, emulatedUser + 4110} {
			if _, err := s.U8(va); !errors.Is(err, memory.ErrAbsent) {
				t.Errorf("%#x was copied: %v", va, err)
			}
		}
		if v, err := s.U64(mount + 16); v != mount || err != nil {
			t.Errorf("the mount: %#x, %v", v, err)
		}
	}
	if _, more, _ := e.p.next(buf[:]); more {
		t.Error("more than was copied")
	}
	t.Logf("a copy: %s", said)

	e.run(t, program, "5000") // nobody reads: the CPUs wait once, and go on
	kept := uint64(0)
	for ; ; kept++ {
		if _, more, err := e.p.next(buf[:]); err != nil {
			t.Fatal(err)
		} else if !more {
			break
		}
	}
	if lost := e.p.lost(0) + e.p.lost(1); kept+lost != 5000 || kept < 500 || lost == 0 {
		t.Errorf("%d kept, %d lost", kept, lost)
	}
}

// TestPluginBounds: whatever the recipe says and memory holds, the plugin copies within its bounds, and what it wrote can be read.
func TestPluginBounds(t *testing.T) {
	program := emulator(t)
	for seed := range uint64(40) {
		r := rand.New(rand.NewPCG(seed, 2))
		steps := make([]memory.Step, 1+r.IntN(memory.MaxSteps))
		for i := range steps {
			steps[i] = memory.Step{Op: uint8(1 + r.IntN(5)), Base: uint8(r.IntN(256)) & uint8(r.IntN(256)), Dst: uint8(r.Uint32()), When: uint8(r.IntN(3)), At: r.Uint32() >> r.IntN(32), Len: r.Uint32() >> r.IntN(32)}
		}
		e := newEmulated(t, steps)
		for _, at := range []int{atMount, atAbove, atOn, atRoot, atParent, atName, atNameLen} {
			e.p.put32(at, r.Uint32()>>(16+r.IntN(16)))
		}
		for at := 0; at < len(e.ram); at += 8 { // pointers, mostly into the same memory
			v := emulatedKernel + r.Uint64N(emulatedHalf)
			switch r.IntN(4) {
			case 0:
				v = emulatedUser + r.Uint64N(emulatedHalf)
			case 1:
				v = r.Uint64() >> r.IntN(64)
			}
			binary.LittleEndian.PutUint64(e.ram[at:], v)
		}
		e.run(t, program, "300")
		var buf [memory.MaxCopy]byte
		for {
			_, more, err := e.p.next(buf[:])
			if err != nil {
				t.Fatalf("seed %d: %v", seed, err)
			}
			if !more {
				break
			}
		}
		_ = unix.Munmap(e.p.b)
	}
}
