package introspect

import (
	"encoding/binary"
	"fmt"
)

// Region is a run of a process's address space: one of the kernel's vm_area_structs.
type Region struct {
	Start       uint64 `json:"start"`
	End         uint64 `json:"end"`
	Permissions string `json:"permissions"` // as /proc/PID/maps has them: rwxp, rwxs
	Offset      uint64 `json:"offset"`      // in the file
	File        string `json:"file"`        // path, with " (deleted)" where it is
	Inode       uint64 `json:"inode"`
	Kind        string `json:"kind"` // file, anonymous, heap, stack, vdso, special

	// Marks say what about a region deserves a look.
	Marks   []string `json:"marks,omitempty"`
	Unknown []string `json:"unknown,omitempty"`
}

// Marks of regions.
const (
	markAnonymousCode = "anonymous-executable" // code that no file holds: written at run time
	markWritableCode  = "writable-executable"
	markDeletedCode   = "deleted-executable" // code of a file that has no name any more
)

// Flags of a vm_area_struct (mm.h).
const (
	vmRead     = 0x1
	vmWrite    = 0x2
	vmExec     = 0x4
	vmMayShare = 0x80
)

const (
	maxRegions    = 1 << 16 // the kernel's default is 65,530
	maxTreeSlots  = 1 << 18 // of a maple tree, that are looked at
	maxTreeLevels = 16
)

type mapsLayout struct {
	tree                                         uint64 // of mm_struct: root of its maple tree
	pivots64, slots64, pivotsArange, slotsArange uint64
	count64, countArange                         uint64 // of slots
	start, end, flags, file, pgoff, mm           uint64
	brk, startBrk, startStack, vdso              uint64 // of mm_struct
	pageShift                                    uint
}

func (g *Guest) mapsLayout() (*mapsLayout, error) {
	if g.maps != nil {
		return g.maps, nil
	}
	r, l := &resolver{p: g.profile}, &mapsLayout{pageShift: 12}
	l.tree = r.field("mm_struct", "mm_mt.ma_root")
	for _, node := range []struct {
		typ                  string
		pivots, slots, count *uint64
	}{{"maple_range_64", &l.pivots64, &l.slots64, &l.count64}, {"maple_arange_64", &l.pivotsArange, &l.slotsArange, &l.countArange}} {
		*node.pivots = r.field(node.typ, "pivot")
		f, err := g.profile.Field(node.typ, "slot")
		if err != nil {
			return nil, err
		}
		*node.slots, *node.count = f.Offset, min(f.Count, 64)
	}
	l.start, l.end = r.field("vm_area_struct", "vm_start"), r.field("vm_area_struct", "vm_end")
	l.flags, l.file = r.field("vm_area_struct", "vm_flags"), r.field("vm_area_struct", "vm_file")
	l.pgoff, l.mm = r.field("vm_area_struct", "vm_pgoff"), r.field("vm_area_struct", "vm_mm")
	l.startBrk, l.brk, l.startStack = r.field("mm_struct", "start_brk"), r.field("mm_struct", "brk"), r.field("mm_struct", "start_stack")
	l.vdso = r.optional("mm_struct", "context.vdso")
	if r.err != nil {
		return nil, r.err
	}
	if _, err := g.fileLayout(); err != nil {
		return nil, err
	}
	g.maps = l
	g.profile.Trim()
	return l, nil
}

// Maps lists the regions of a process's memory, by address. A kernel thread, and a zombie, has none. ErrNoProcess is
// returned where no process has that pid.
func (g *Guest) Maps(pid int64) ([]Region, error) {
	list := []Region{}
	found := false
	err := g.view(func() error {
		list, found = list[:0], false
		l, err := g.mapsLayout()
		if err != nil {
			return err
		}
		return g.leaders(func(task uint64) error {
			r := reader{s: g.space}
			id, mm := int64(int32(r.u32(task+g.layout.task.pid))), r.u64(task+g.layout.task.mm)
			flags := r.u32(task + g.layout.task.flags)
			if r.err != nil {
				return ErrTorn
			}
			if id != pid {
				return nil
			}
			found = true
			if mm == 0 || flags&flagKernelThread != 0 {
				return nil
			}
			list, err = g.regions(l, mm, list)
			return err
		})
	})
	switch {
	case err != nil:
		return nil, err
	case !found:
		return nil, fmt.Errorf("%w: %d", ErrNoProcess, pid)
	}
	return list, nil
}

// regions appends the regions of an mm.
func (g *Guest) regions(l *mapsLayout, mm uint64, list []Region) ([]Region, error) {
	root, err := g.space.U64(mm + l.tree)
	if err != nil {
		return nil, ErrTorn
	}
	t := &mapleTree{g: g, l: l, left: maxTreeSlots, visit: func(vma uint64) error {
		if len(list) == maxRegions {
			return fmt.Errorf("%w: more than %d regions", ErrEndless, maxRegions)
		}
		reg, err := g.region(l, mm, vma)
		if err == nil && len(list) > 0 && reg.Start < list[len(list)-1].End {
			err = g.torn()
		}
		list = append(list, reg)
		return err
	}}
	err = t.walk(root)
	return list, err
}

// A maple tree (include/linux/maple_tree.h, lib/maple_tree.c) is a B-tree of address ranges. Nodes are aligned to 256 bytes; a
// pointer to one has the node's type in its bits 3 to 6, and the root's has 2 in the lowest two. A node's pivots are the last
// addresses of its slots, in order; the last slot in use has none, or one of 0, and reaches to the node's own end. In a leaf
// slots hold vm_area_structs. A node begins with a pointer to the one above it, with its place there in the low bits.
type mapleTree struct {
	g     *Guest
	l     *mapsLayout
	left  int
	visit func(vma uint64) error
}

const (
	mapleDense  = 0
	mapleLeaf   = 1
	mapleRange  = 2
	mapleArange = 3
	mapleMask   = 255
)

func (t *mapleTree) walk(root uint64) error {
	switch {
	case root&3 == xaInternal && root >= xaMarksEnd:
		return t.node(root, 0, ^uint64(0), 0)
	case root != 0 && root&3 == 0: // the whole tree is one entry
		return t.visit(root)
	}
	return nil
}

// node visits what lies below one node, which reaches up to end and hangs on the one above.
func (t *mapleTree) node(entry, above, end uint64, depth int) error {
	node, typ := entry&^mapleMask, entry>>3&15
	pivots, slots, count := t.l.pivots64, t.l.slots64, t.l.count64
	switch {
	case typ == mapleArange:
		pivots, slots, count = t.l.pivotsArange, t.l.slotsArange, t.l.countArange
	case typ == mapleDense || typ > mapleArange || depth == maxTreeLevels:
		return ErrTorn
	}
	var buf [2][64 * 8]byte
	r := reader{s: t.g.space}
	parent := r.u64(node)
	r.bytes(node+pivots, buf[0][:8*(count-1)])
	r.bytes(node+slots, buf[1][:8*count])
	parent &^= mapleMask
	if r.err != nil || parent == node || above != 0 && parent != above { // one that was replaced points at itself
		return t.g.torn()
	}
	for i := uint64(0); i < count; i++ {
		last := end
		if i < count-1 {
			if p := binary.LittleEndian.Uint64(buf[0][8*i:]); p != 0 || i == 0 {
				last = p
			}
		}
		if t.left--; t.left < 0 || last > end {
			return ErrTorn
		}
		slot := binary.LittleEndian.Uint64(buf[1][8*i:])
		var err error
		switch {
		case slot == 0:
		case typ != mapleLeaf:
			err = t.node(slot, node, last, depth+1)
		case slot&3 == 0:
			err = t.visit(slot)
		}
		if err != nil || last == end {
			return err
		}
	}
	return nil
}

// region reads one vm_area_struct, which must belong to the mm.
func (g *Guest) region(l *mapsLayout, mm, vma uint64) (Region, error) {
	r := reader{s: g.space}
	reg := Region{Start: r.u64(vma + l.start), End: r.u64(vma + l.end)}
	flags, file := r.u64(vma+l.flags), r.u64(vma+l.file)
	pgoff, owner := r.u64(vma+l.pgoff), r.u64(vma+l.mm)
	if r.err != nil || owner != mm || reg.End <= reg.Start {
		return Region{}, g.torn()
	}
	perm := []byte("---p")
	for i, f := range []uint64{vmRead, vmWrite, vmExec} {
		if flags&f != 0 {
			perm[i] = "rwx"[i]
		}
	}
	if flags&vmMayShare != 0 {
		perm[3] = 's'
	}
	reg.Permissions = string(perm)
	if file != 0 {
		reg.Kind, reg.Offset = "file", pgoff<<l.pageShift
		g.mappedFile(&reg, file)
	} else {
		reg.Kind = g.anonymous(l, mm, vma, &reg)
	}
	reg.mark(flags)
	return reg, nil
}

func (g *Guest) mappedFile(reg *Region, file uint64) {
	var err error
	if reg.File, err = g.filePath(file); err != nil {
		reg.Unknown = append(reg.Unknown, "file")
	}
	r := reader{s: g.space}
	inode := r.u64(file + g.files.inode)
	reg.Inode = r.u64(inode + g.files.number)
	if r.err != nil {
		reg.Unknown = append(reg.Unknown, "inode")
	}
}

// anonymous names a region without a file, as fs/proc/task_mmu.c does.
func (g *Guest) anonymous(l *mapsLayout, mm, vma uint64, reg *Region) string {
	r := reader{s: g.space}
	startBrk, brk, stack := r.u64(mm+l.startBrk), r.u64(mm+l.brk), r.u64(mm+l.startStack)
	vdso := uint64(0)
	if l.vdso != noField {
		vdso = r.u64(mm + l.vdso)
	}
	switch {
	case r.err != nil:
		reg.Unknown = append(reg.Unknown, "kind")
		return "anonymous"
	case vdso != 0 && reg.Start == vdso:
		return "vdso"
	case reg.Start <= brk && reg.End >= startBrk:
		return "heap"
	case reg.Start <= stack && stack <= reg.End:
		return "stack"
	case vdso != 0 && reg.End <= vdso && vdso-reg.End < maxVvarGap && reg.Permissions == "r--p":
		return "special" // the pages of data before the vdso's code
	}
	return "anonymous"
}

const maxVvarGap = 64 << 10

// mark says what about a region deserves a look. The vdso is the kernel's own code.
func (reg *Region) mark(flags uint64) {
	if flags&vmExec == 0 || reg.Kind == "vdso" {
		return
	}
	if reg.Kind != "file" {
		reg.Marks = append(reg.Marks, markAnonymousCode)
	} else if deleted(reg.File) {
		reg.Marks = append(reg.Marks, markDeletedCode)
	}
	if flags&vmWrite != 0 {
		reg.Marks = append(reg.Marks, markWritableCode)
	}
}
