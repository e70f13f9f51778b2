package introspect

import (
	"encoding/binary"
	"maps"
	"slices"
	"strings"
	"testing"

	"vigia/internal/kernel"
	"vigia/internal/memory"
)

// edited is memory with changes of the test's own over it; what is below stays as it is.
type edited struct {
	base  Physical
	lines map[uint64]*[lineSize]byte
	reads int
}

func (e *edited) Regions() []memory.Region { return e.base.(memory.Sized).Regions() }

func (e *edited) ReadPhys(pa uint64, b []byte) error {
	e.reads++
	if err := e.base.ReadPhys(pa, b); err != nil || len(e.lines) == 0 {
		return err
	}
	for at := pa &^ (lineSize - 1); at < pa+uint64(len(b)); at += lineSize {
		if line := e.lines[at]; line != nil {
			lo, hi := max(at, pa), min(at+lineSize, pa+uint64(len(b)))
			copy(b[lo-pa:hi-pa], line[lo-at:hi-at])
		}
	}
	return nil
}

func (e *edited) write(pa uint64, b []byte) {
	for i, c := range b {
		at := (pa + uint64(i)) &^ (lineSize - 1)
		if e.lines[at] == nil {
			e.lines[at] = new([lineSize]byte)
			_ = e.base.ReadPhys(at, e.lines[at][:])
		}
		e.lines[at][pa+uint64(i)-at] = c
	}
}

// intruder is somebody in the guest's kernel: it reads and writes by the kernel's addresses.
type intruder struct {
	*Guest
	t   *testing.T
	mem *edited
}

func (i *intruder) get(va uint64) uint64 {
	i.t.Helper()
	v, err := i.space.U64(va)
	if err != nil {
		i.t.Fatalf("read %#x: %v", va, err)
	}
	return v
}

func (i *intruder) write(va uint64, b []byte) {
	i.t.Helper()
	pa, err := i.space.Translate(va)
	if err != nil {
		i.t.Fatalf("write %#x: %v", va, err)
	}
	i.mem.write(pa, b)
}

func (i *intruder) put(va, v uint64) {
	i.t.Helper()
	i.write(va, binary.LittleEndian.AppendUint64(nil, v))
}

func (i *intruder) put32(va uint64, v uint32) {
	i.t.Helper()
	i.write(va, binary.LittleEndian.AppendUint32(nil, v))
}

// unlink is list_del.
func (i *intruder) unlink(node uint64) {
	i.t.Helper()
	next, prev := i.get(node), i.get(node+8)
	i.put(prev, next)
	i.put(next+8, prev)
	i.put(node, node)
	i.put(node+8, node)
}

// task returns the one process with this comm and uid. Some saved guests run none of those that the recordings have.
func (i *intruder) task(comm string, uid uint32) Process {
	i.t.Helper()
	list := processes(i.t, i.Guest)
	fits := func(p Process) bool { return p.Comm == comm && p.UID == uid }
	if !slices.ContainsFunc(list, fits) {
		i.t.Skipf("this guest runs no %s", comm)
	}
	return pick(i.t, list, comm, func(p *Process) bool { return fits(*p) })
}

// slot returns the place in the table of pids that holds a pid.
func (i *intruder) slot(pid uint64) uint64 {
	i.t.Helper()
	v := i.taskViewLayout()
	var find func(entry uint64, depth int) uint64
	find = func(entry uint64, depth int) uint64 {
		if entry&3 != xaInternal || depth > xaMaxLevels {
			return 0
		}
		for n := range v.slotCount {
			at := entry - xaInternal + v.slots + 8*n
			e := i.get(at)
			if e == pid {
				return at
			}
			if e >= xaMarksEnd {
				if found := find(e, depth+1); found != 0 {
					return found
				}
			}
		}
		return 0
	}
	at := find(i.get(v.idr+i.boot.Slide), 0)
	if at == 0 {
		i.t.Fatalf("pid %#x is in no slot", pid)
	}
	return at
}

var checkRecordings = []string{"check-6.1.ram.gz", "check-6.12.ram.gz"}

// onGuests calls test on the recordings for the checks, and on saved memory where there is some.
func onGuests(t *testing.T, test func(t *testing.T, mem Physical, p *kernel.Profile)) {
	for _, name := range checkRecordings {
		t.Run(strings.TrimSuffix(name, ".ram.gz"), func(t *testing.T) {
			r, p := load(t, name)
			test(t, r, p)
		})
	}
	t.Run("saved", func(t *testing.T) {
		saved(t, func(t *testing.T, g *Guest) { test(t, g.mem, g.profile) })
	})
}

func enter(t *testing.T, mem Physical, p *kernel.Profile) *intruder {
	t.Helper()
	e := &edited{base: mem, lines: map[uint64]*[lineSize]byte{}}
	return &intruder{Guest: attach(t, e, p), t: t, mem: e}
}

// round makes one round of checks and returns what is serious.
func round(t *testing.T, c *Checker, full bool) []Finding {
	t.Helper()
	r, err := c.Run(full)
	if err != nil {
		t.Fatal(err)
	}
	return slices.DeleteFunc(r.Findings, func(f Finding) bool { return !f.Serious() })
}

// change makes a change, and undoes it at the end.
func (i *intruder) change(f func()) (undo func()) {
	before := maps.Clone(i.mem.lines)
	for at, line := range before {
		copied := *line
		before[at] = &copied
	}
	i.space.Flush()
	f()
	i.space.Flush()
	return func() { i.mem.lines = before; i.space.Flush() }
}
