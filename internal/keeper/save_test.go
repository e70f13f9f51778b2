package keeper

import (
	"bytes"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strconv"
	"sync"
	"sync/atomic"
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"

	"vigia/internal/checkpoint/page"
	"vigia/internal/checkpoint/protect"
)

// guest is memory in a file that a test writes as QEMU would: through a shared mapping of its own.
type guest struct {
	t    *testing.T
	mem  []byte
	s    *saver
	dir  string
	last page.ID
	n    byte
	path []string
}

func newGuest(t *testing.T, pages int, protected bool) *guest {
	f, err := os.CreateTemp("/dev/shm", "vigia-test-")
	if err != nil {
		t.Skip(err)
	}
	os.Remove(f.Name())
	t.Cleanup(func() { f.Close() })
	f.Truncate(int64(pages) * page.Size)
	mem, err := unix.Mmap(int(f.Fd()), 0, pages*page.Size, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		t.Fatal(err)
	}
	g := &guest{t: t, mem: mem, dir: t.TempDir()}
	var prot *protect.Memory
	if protected {
		device, err := os.OpenFile(protect.Device, os.O_RDWR, 0)
		if err != nil {
			t.Skipf("needs the right to open %s: %v", protect.Device, err)
		}
		defer device.Close()
		fd, _, errno := unix.Syscall(unix.SYS_IOCTL, device.Fd(), 0xaa00, unix.O_CLOEXEC) // in its own name
		if errno != 0 {
			t.Skip(errno)
		}
		if prot, err = protect.Take(os.NewFile(fd, "uffd"), uint64(uintptr(unsafe.Pointer(&mem[0]))), uint64(len(mem))); err != nil {
			t.Skip(err)
		}
	}
	g.s = newSaver(memory{r: f, file: f, pages: uint64(pages)}, prot)
	return g
}

// save takes a checkpoint; running goes on while it is written.
func (g *guest) save(running func()) []byte {
	g.t.Helper()
	g.n++
	path := filepath.Join(g.dir, strconv.Itoa(int(g.n)))
	out, err := os.Create(path)
	if err != nil {
		g.t.Fatal(err)
	}
	id := page.ID{g.n}
	if err := g.s.begin(out, id, g.last); err != nil {
		g.t.Fatal(err)
	}
	j := g.s.current()
	if err := g.s.arm(); err != nil {
		g.t.Fatal(err)
	}
	want := bytes.Clone(g.mem)
	done := make(chan struct{})
	go func() { running(); close(done) }()
	if _, err := j.finish(); err != nil {
		g.t.Fatal(err)
	}
	<-done
	g.last, g.path = id, append(g.path, path)
	return want
}

func (g *guest) restore() []byte {
	g.t.Helper()
	var c page.Chain
	for _, p := range g.path {
		f, err := os.Open(p)
		if err != nil {
			g.t.Fatal(err)
		}
		defer f.Close()
		file, err := page.Open(f, page.Sum{})
		if err != nil {
			g.t.Fatal(err)
		}
		c = append(c, file)
	}
	out := make([]byte, len(g.mem))
	var mu sync.Mutex
	if err := c.Restore(2, func(b []byte, off int64) error { mu.Lock(); defer mu.Unlock(); copy(out[off:], b); return nil }); err != nil {
		g.t.Fatal(err)
	}
	return out
}

// TestInstant: a checkpoint holds one instant, whatever is written while it is copied, and the next ones hold theirs.
func TestInstant(t *testing.T) {
	for name, protected := range map[string]bool{"protected": true, "copied": false} {
		t.Run(name, func(t *testing.T) {
			const pages = 8192
			g := newGuest(t, pages, protected)
			r := rand.New(rand.NewPCG(3, 4))
			for p := range pages / 2 {
				g.mem[p*page.Size+r.IntN(page.Size)] = byte(p)
			}
			scribble := func(stop *atomic.Bool) {
				for i := 0; !stop.Load() && i < 20000; i++ {
					g.mem[r.IntN(len(g.mem))]++
					if i%10 == 0 { // and in order
						p := r.IntN(pages - 20)
						for q := p; q < p+20; q++ {
							g.mem[q*page.Size] ^= 0x55
						}
					}
				}
			}
			for round := range 6 {
				var stop atomic.Bool
				want := g.save(func() { scribble(&stop) })
				if got := g.restore(); !bytes.Equal(got, want) {
					for p := range pages {
						if !bytes.Equal(got[p*page.Size:(p+1)*page.Size], want[p*page.Size:(p+1)*page.Size]) {
							t.Fatalf("round %d: page %d is not as it was", round, p)
						}
					}
				}
				scribble(&stop)
				if round == 3 { // another keeper takes over: it knows the last checkpoint, and not what was written since
					c := page.Chain{}
					for _, p := range g.path {
						f, _ := os.Open(p)
						defer f.Close()
						file, err := page.Open(f, page.Sum{})
						if err != nil {
							t.Fatal(err)
						}
						c = append(c, file)
					}
					g.s.mu.Lock()
					g.s.lost()
					g.s.mu.Unlock()
					if err := g.s.adopt(c); err != nil {
						t.Fatal(err)
					}
				}
			}
		})
	}
}

// TestGivenUp: after a checkpoint that came to nothing the next one is whole and right.
func TestGivenUp(t *testing.T) {
	g := newGuest(t, 1024, true)
	g.mem[5] = 1
	g.save(func() {})
	g.mem[page.Size*7] = 9
	for _, armed := range []bool{false, true} {
		out, _ := os.Create(filepath.Join(g.dir, "lost"))
		if err := g.s.begin(out, page.ID{99}, g.s.last); err != nil {
			t.Fatal(err)
		}
		if armed {
			if err := g.s.arm(); err != nil {
				t.Fatal(err)
			}
		}
		g.s.abort()
		out, _ = os.Create(filepath.Join(g.dir, "lost"))
		if err := g.s.begin(out, page.ID{98}, g.last); err == nil {
			t.Fatal("a keeper that has lost track goes on as if it had not")
		}
		g.last, g.path = page.ID{}, nil
		want := g.save(func() { g.mem[page.Size*8]++ })
		if got := g.restore(); !bytes.Equal(got, want) {
			t.Fatal("the next checkpoint is not right")
		}
	}
}
