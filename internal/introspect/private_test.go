package introspect

import (
	"os"
	"reflect"
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"

	"vigia/internal/kernel"
	"vigia/internal/memory"
)

// private puts a recording into memory of this very process, where a clone's RAM would be in its QEMU's, and reads it as that is
// read: through /proc/PID/mem.
func private(t testing.TB, r *recorded) (*memory.Process, *int) {
	t.Helper()
	size := uint64(0)
	for _, reg := range r.regions {
		size = max(size, reg.Offset+reg.Size)
	}
	ram, err := unix.Mmap(-1, 0, int(size), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANON|unix.MAP_NORESERVE)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = unix.Munmap(ram) })
	for at, line := range r.lines {
		for _, reg := range r.regions {
			if at-reg.Phys < reg.Size {
				copy(ram[reg.Offset+at-reg.Phys:], line[:])
			}
		}
	}
	mem, err := os.Open("/proc/self/mem")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { mem.Close() })
	reads := new(int)
	p, err := memory.NewProcess(counting{mem, reads}, uint64(uintptr(unsafe.Pointer(&ram[0]))), r.regions)
	if err != nil {
		t.Fatal(err)
	}
	return p, reads
}

type counting struct {
	*os.File
	reads *int
}

func (c counting) ReadAt(b []byte, off int64) (int, error) {
	*c.reads++
	return c.File.ReadAt(b, off)
}

// TestPrivateMemory: the views of a clone's memory are those of a shared file's, at a call for each page and not for each value.
func TestPrivateMemory(t *testing.T) {
	onScenes(t, func(t *testing.T, r *recorded, p *kernel.Profile) {
		mem, reads := private(t, r)
		shared, own := attach(t, r, p), attach(t, mem, p)
		for name, view := range map[string]func(*Guest) (any, error){
			"processes": func(g *Guest) (any, error) { return g.Processes() },
			"cpu":       func(g *Guest) (any, error) { return g.CPU(nil) },
			"modules":   func(g *Guest) (any, error) { return g.Modules() },
			"sockets":   func(g *Guest) (any, error) { return g.Sockets() },
			"files":     func(g *Guest) (any, error) { return g.Files(0) },
			"system":    func(g *Guest) (any, error) { return g.System() },
		} {
			want, err := view(shared)
			if err != nil {
				t.Fatal(err)
			}
			*reads = 0
			got, err := view(own)
			if err != nil || !reflect.DeepEqual(got, want) {
				t.Errorf("%s: %v differs, %v", name, got, err)
			}
			values := own.limit - own.meter.left
			if *reads > 900 || name == "files" && *reads*5 > values {
				t.Errorf("%s: %d calls for %d values", name, *reads, values)
			}
			t.Logf("%s: %d calls for %d values", name, *reads, values)
		}
	})
}
