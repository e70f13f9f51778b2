package introspect

import (
	"encoding/binary"
	"errors"

	"vigia/internal/kernel"
	"vigia/internal/memory"
)

// The ways in which a kernel keeps its modules.
const (
	viewModules = "module list"              // modules: what /proc/modules and rmmod look in
	viewSysfs   = "sysfs"                    // the objects of module_kset: /sys/module
	viewAddress = "address tree"             // mod_tree: how an address is told to be a module's, in traps and back traces
	viewBugs    = "bug tables"               // module_bug_list: where BUG and WARN look
	viewMemory  = "module memory"            // areas of the modules' address range that hold a struct module of their own
	modulesFrom = uint64(0xffffffffc0000000) // MODULES_VADDR
	modulesTo   = uint64(0xffffffffff000000) // MODULES_END
)

// moduleViewLayout is where the fields lie that only these views read.
type moduleViewLayout struct {
	kset, entry, object, owner, embedded, ksetList uint64
	tree, treeNode, treeMod, seq, roots            uint64
	nodes                                          []uint64 // of the tree, in struct module
	bugs, bugList                                  uint64
	size                                           uint64 // of struct module
	errSysfs, errTree, errBugs                     error
}

func (g *Guest) moduleViewLayout() *moduleViewLayout {
	if g.moduleViews != nil {
		return g.moduleViews
	}
	l := &moduleViewLayout{}
	in := func(err *error, f func(r *resolver)) {
		r := &resolver{p: g.profile}
		f(r)
		*err = r.err
	}
	in(&l.errSysfs, func(r *resolver) {
		l.kset, l.ksetList, l.entry = r.symbol("module_kset"), r.field("kset", "list"), r.field("kobject", "entry")
		l.object, l.owner = r.field("module_kobject", "kobj"), r.field("module_kobject", "mod")
		l.embedded = r.field("module", "mkobj")
	})
	in(&l.errTree, func(r *resolver) {
		l.tree, l.treeMod, l.treeNode = r.symbol("mod_tree"), r.field("mod_tree_node", "mod"), r.field("mod_tree_node", "node")
		l.seq, l.roots = r.optional("latch_tree_root", "seq"), r.field("latch_tree_root", "tree")
	})
	in(&l.errBugs, func(r *resolver) {
		l.bugs, l.bugList = r.symbol("module_bug_list"), r.field("module", "bug_list")
	})
	l.size, _ = g.profile.Size("module")
	g.moduleViews = l
	g.profile.Trim()
	return l
}

// modulesListed is the list of modules, the unformed ones too.
func (g *Guest) modulesListed(m *moduleLayout) *listing {
	l := newListing(viewModules)
	g.follow(l, m.head+g.boot.Slide, func(node uint64) { l.at[node-m.list] = true })
	return l
}

// moduleObjects is what sysfs shows: the kernel's own built-in parts are there too, without a module.
func (g *Guest) moduleObjects() *listing {
	l, v := newListing(viewSysfs), g.moduleViewLayout()
	if v.errSysfs != nil {
		return l.unknown(v.errSysfs)
	}
	kset, err := g.space.U64(v.kset + g.boot.Slide)
	if err != nil || kset == 0 {
		return l.unknown(errors.Join(ErrTorn, err))
	}
	g.follow(l, kset+v.ksetList, func(node uint64) {
		if mod, err := g.space.U64(node - v.entry - v.object + v.owner); err == nil && mod != 0 {
			l.at[mod] = true
		}
	})
	return l
}

const maxTreeDepth = 64

// moduleTree is the tree of modules by address. It is kept twice, so that it can be read while it changes: the one that
// is not being changed is read (include/linux/rbtree_latch.h).
func (g *Guest) moduleTree() *listing {
	l, v := newListing(viewAddress), g.moduleViewLayout()
	if v.errTree != nil {
		return l.unknown(v.errTree)
	}
	var seq uint32
	if v.seq != noField {
		seq, _ = g.space.U32(v.tree + g.boot.Slide + v.seq)
	}
	index := uint64(seq & 1)
	root, err := g.space.U64(v.tree + g.boot.Slide + v.roots + 8*index)
	if err != nil {
		return l.unknown(err)
	}
	seen := map[uint64]bool{}
	// latch_tree_node is rb_node[2], of 24 bytes: parent and colour, right, left.
	g.rbtree(root, 0, seen, func(node uint64) {
		at := node - 24*index - v.treeNode
		if mod, err := g.space.U64(at + v.treeMod); err == nil && mod != 0 {
			l.at[mod] = true
		}
	})
	return l
}

// rbtree visits the nodes of a red-black tree.
func (g *Guest) rbtree(node uint64, depth int, seen map[uint64]bool, visit func(node uint64)) {
	if node == 0 || depth == maxTreeDepth || len(seen) == maxNodes || seen[node] {
		return
	}
	seen[node] = true
	var b [24]byte
	if g.space.Read(node, b[:]) != nil {
		return
	}
	g.rbtree(binary.LittleEndian.Uint64(b[16:]), depth+1, seen, visit)
	visit(node)
	g.rbtree(binary.LittleEndian.Uint64(b[8:]), depth+1, seen, visit)
}

func (g *Guest) moduleBugs() *listing {
	l, v := newListing(viewBugs), g.moduleViewLayout()
	if v.errBugs != nil {
		return l.unknown(v.errBugs)
	}
	g.follow(l, v.bugs+g.boot.Slide, func(node uint64) { l.at[node-v.bugList] = true })
	return l
}

// moduleMemory searches the modules' address range for what is a struct module by its looks: it lies in its own module's
// memory, its text is in the range, and it has a name. It needs no list that an intruder could take it off.
func (g *Guest) moduleMemory(m *moduleLayout) *listing {
	l, v := newListing(viewMemory), g.moduleViewLayout()
	if v.errSysfs != nil {
		return l.unknown(v.errSysfs)
	}
	if v.size == 0 || v.size > 1<<14 {
		return l.unknown(&kernel.MissingError{What: "type", Name: "module"})
	}
	g.eachModulePage(func(va uint64, page []byte) {
		for at := uint64(0); at < uint64(len(page)); at += 64 {
			// It points at itself: from its kobject, which most of its lines do not.
			if at+v.embedded+v.owner+8 <= uint64(len(page)) {
				if binary.LittleEndian.Uint64(page[at+v.embedded+v.owner:]) == va+at && g.isModule(m, va+at) {
					l.at[va+at] = true
				}
			} else if own, err := g.space.U64(va + at + v.embedded + v.owner); err == nil && own == va+at && g.isModule(m, va+at) {
				l.at[va+at] = true
			}
		}
	})
	return l
}

// eachModulePage visits the pages that are mapped in the modules' range.
func (g *Guest) eachModulePage(visit func(va uint64, page []byte)) {
	var buf [1 << pageShift]byte
	_ = g.space.Range(modulesFrom, modulesTo, func(va uint64, p memory.Page) bool {
		if p.Size == 1<<pageShift && g.meter.ReadPhys(p.Phys, buf[:]) == nil {
			visit(va, buf[:])
		}
		return g.meter.left > 0
	})
}

// isModule judges what may be a struct module.
func (g *Guest) isModule(m *moduleLayout, at uint64) bool {
	r := reader{s: g.space}
	state := r.u32(at + m.state)
	text := r.u64(at + m.areas[0].base)
	var name [64]byte
	r.bytes(at+m.name, name[:m.nameSize])
	return r.err == nil && state <= moduleUnformed && text >= modulesFrom && text < modulesTo && name[0] > ' ' && name[0] < 0x7f
}
