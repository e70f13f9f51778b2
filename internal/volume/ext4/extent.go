package ext4

const (
	extentMagic    = 0xF30A
	extentMaxDepth = 5
	extentMaxLen   = 32768
)

// span is a run of blocks of one inode.
type span struct {
	logical   uint64 // block in the file; meaningless where tree is set
	start     uint64 // block on the disk
	n         uint64
	tree      bool // the blocks hold part of the map itself
	unwritten bool // allocated, reads as zero
}

// mapper walks the block map of inodes. It may be told to pass by a tree block, and stops at its budget: a hostile map
// may point at itself or at half the disk.
type mapper struct {
	v      *view
	enter  func(block uint64) bool // whether to read a tree block; nil for always
	visit  func(span) error
	budget int // spans and tree blocks
}

func (m *mapper) spend() error {
	if m.budget--; m.budget < 0 {
		return corrupt("block map larger than the disk allows")
	}
	return nil
}

func (m *mapper) emit(s span) error {
	if s.n == 0 {
		return nil
	}
	if s.start == 0 || s.start >= m.v.blocks || s.n > m.v.blocks-s.start {
		return corrupt("extent %d+%d of %d blocks", s.start, s.n, m.v.blocks)
	}
	if err := m.spend(); err != nil {
		return err
	}
	return m.visit(s)
}

// inode visits all spans of i, tree blocks included.
func (m *mapper) inode(i *inode) error {
	if !i.mapped() {
		return nil
	}
	if i.flags&flagExtents != 0 {
		return m.extents(i.root(), -1)
	}
	return m.indirect(i)
}

// extents visits what a node of an extent tree maps. depth is what the node must have, or -1 at the root.
func (m *mapper) extents(node []byte, depth int) error {
	entries, d, err := extentHeader(node)
	if err != nil {
		return err
	}
	if depth >= 0 && d != depth {
		return corrupt("extent node of depth %d, not %d", d, depth)
	}
	for i := range entries {
		e := node[12+12*i:]
		if d == 0 {
			if err := m.emit(leaf(e)); err != nil {
				return err
			}
			continue
		}
		if err := m.child(extentChild(e), d-1); err != nil {
			return err
		}
	}
	return nil
}

func (m *mapper) child(block uint64, depth int) error {
	if err := m.emit(span{start: block, n: 1, tree: true}); err != nil {
		return err
	}
	if m.enter != nil && !m.enter(block) {
		return nil
	}
	buf := make([]byte, m.v.bs)
	if err := m.v.block(block, buf); err != nil {
		return err
	}
	return m.extents(buf, depth)
}

func extentHeader(node []byte) (entries, depth int, err error) {
	if len(node) < 12 || le.Uint16(node) != extentMagic {
		return 0, 0, corrupt("extent node without its magic")
	}
	entries, depth = int(le.Uint16(node[2:])), int(le.Uint16(node[6:]))
	if 12+12*entries > len(node) || depth > extentMaxDepth {
		return 0, 0, corrupt("extent node of %d entries, depth %d", entries, depth)
	}
	return entries, depth, nil
}

func leaf(e []byte) span {
	s := span{logical: uint64(le.Uint32(e)), n: uint64(le.Uint16(e[4:])),
		start: uint64(le.Uint32(e[8:])) | uint64(le.Uint16(e[6:]))<<32}
	if s.n > extentMaxLen {
		s.n, s.unwritten = s.n-extentMaxLen, true
	}
	return s
}

func extentChild(e []byte) uint64 { return uint64(le.Uint32(e[4:])) | uint64(le.Uint16(e[8:]))<<32 }

// indirect visits the twelve direct and three indirect block pointers of ext2 and ext3.
func (m *mapper) indirect(i *inode) error {
	g := &gather{m: m}
	root := i.root()
	for n := range 12 {
		if err := g.add(uint64(n), uint64(le.Uint32(root[4*n:]))); err != nil {
			return err
		}
	}
	logical, each := uint64(12), uint64(m.v.bs/4)
	reach := each
	for level := 1; level <= 3; level++ {
		if err := m.pointers(g, uint64(le.Uint32(root[44+4*level:])), level, logical); err != nil {
			return err
		}
		logical += reach
		reach *= each
	}
	return g.flush()
}

func (m *mapper) pointers(g *gather, block uint64, level int, logical uint64) error {
	if block == 0 {
		return nil
	}
	if err := m.emit(span{start: block, n: 1, tree: true}); err != nil {
		return err
	}
	if m.enter != nil && !m.enter(block) {
		return nil
	}
	buf := make([]byte, m.v.bs)
	if err := m.v.block(block, buf); err != nil {
		return err
	}
	reach := uint64(1)
	for range level - 1 {
		reach *= uint64(m.v.bs / 4)
	}
	for n := range int(m.v.bs / 4) {
		at, p := logical+uint64(n)*reach, uint64(le.Uint32(buf[4*n:]))
		var err error
		if level == 1 {
			err = g.add(at, p)
		} else {
			err = m.pointers(g, p, level-1, at)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// gather joins single block pointers to runs.
type gather struct {
	m *mapper
	s span
}

func (g *gather) add(logical, block uint64) error {
	if block == 0 {
		return nil
	}
	if g.s.n > 0 && g.s.start+g.s.n == block && g.s.logical+g.s.n == logical {
		g.s.n++
		return nil
	}
	err := g.flush()
	g.s = span{logical: logical, start: block, n: 1}
	return err
}

func (g *gather) flush() error {
	s := g.s
	g.s = span{}
	return g.m.emit(s)
}
