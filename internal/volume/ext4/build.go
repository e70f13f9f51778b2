package ext4

import "fmt"

// built is what a pass over a whole file system finds.
type built struct {
	index   *index
	parents *parents
	inodes  int
	skipped int // inodes whose map or names are broken
}

// limits bound what an index may take.
type limits struct {
	runs    int
	parents int // chunks of 1024 inodes
}

// build reads all inode tables and directories through v.
func (f *FS) build(v *view, l limits) (*built, error) {
	b := &built{index: newIndex(f.sb.blocks, l.runs), parents: newParents(f.sb.inodes, l.parents)}
	f.fixed(b.index)
	w := &builder{f: f, v: v, buf: make([]byte, f.sb.blockSize), built: b, left: int(min(f.sb.blocks, 1<<40)) + 1024}
	if err := w.tables(); err != nil {
		return nil, err
	}
	f.fixed(b.index) // again: no file may claim these
	b.index.building = false
	return b, nil
}

// fixed marks the blocks that the layout fixes.
func (f *FS) fixed(x *index) {
	sb := f.sb
	x.set(uint64(superOffset/sb.blockSize), 1, specialSuper, true)
	per := uint32(sb.blockSize / sb.descSize)
	for n := uint32(0); n < (sb.groups+per-1)/per; n++ {
		x.set(sb.descBlock(n), 1, specialGroups, true)
	}
	for _, g := range f.groups {
		x.set(g.blockBitmap, 1, specialBitmap, true)
		x.set(g.inodeBitmap, 1, specialBitmap, true)
		x.set(g.inodeTable, sb.tableBlocks(), specialInodes, true)
	}
}

type builder struct {
	f    *FS
	v    *view
	left int    // every extent owns a block of its own: more of them than blocks is a lie
	buf  []byte // of one block
	*built
}

// tables reads the inode tables, 64 KiB a time.
func (w *builder) tables() error {
	sb := w.f.sb
	step := int(max(1, (64<<10)/sb.blockSize))
	buf := make([]byte, int64(step)*sb.blockSize)
	perBlock := uint32(sb.blockSize / sb.inodeSize)
	for g, gr := range w.f.groups {
		blocks := int((gr.used + perBlock - 1) / perBlock)
		for at := 0; at < blocks; at += step {
			n := min(step, blocks-at)
			if err := w.v.run(gr.inodeTable+uint64(at), n, buf); err != nil {
				return err
			}
			first := uint32(g)*sb.inodesPerGroup + uint32(at)*perBlock + 1
			for i := range uint32(n) * perBlock {
				if uint32(at)*perBlock+i >= sb.inodesPerGroup {
					break
				}
				w.inode(first+i, buf[int64(i)*sb.inodeSize:int64(i+1)*sb.inodeSize])
			}
		}
	}
	return nil
}

const resizeInode = 7

func (w *builder) inode(number uint32, raw []byte) {
	if le.Uint16(raw) == 0 || number == resizeInode {
		return
	}
	i := parseInode(number, raw)
	if !i.inUse(w.f.sb.inodes) {
		return
	}
	w.inodes++
	err := w.claim(i)
	if err == nil && i.isDir() {
		err = w.f.entriesBy(w.v, i, w.buf, func(e entry) bool {
			if e.inode <= w.f.sb.inodes {
				w.parents.add(e.inode, number)
			}
			return true
		})
	}
	if err != nil {
		w.skipped++
	}
}

// claim enters i's blocks in the index.
func (w *builder) claim(i *inode) error {
	m := mapper{v: w.v, budget: w.left,
		visit: func(s span) error {
			o := ownerOf(i, s)
			if s.tree {
				if got, _ := w.index.at(s.start); got.kind() == ownTree {
					return corrupt("block %d is in two maps", s.start)
				}
			}
			w.index.set(s.start, s.n, o, false)
			return nil
		}}
	err := m.inode(i)
	w.left = m.budget
	return err
}

func ownerOf(i *inode, s span) owner {
	switch {
	case s.tree:
		return owner(i.number) | ownTree
	case i.isDir():
		return owner(i.number) | ownDir
	}
	return owner(i.number) | ownData
}

// path makes the paths of an inode from the directories above it. A file that nothing names has none.
func (f *FS) paths(v *view, p *parents, number uint32) []string {
	var out []string
	seen := map[uint32]bool{}
	for _, dir := range p.of(number) {
		if seen[dir] || len(out) > 16 {
			continue
		}
		seen[dir] = true
		above, err := f.dirPath(v, p, dir)
		if err != nil {
			continue
		}
		for _, name := range f.names(v, dir, number) {
			out = append(out, above+"/"+name)
		}
	}
	return out
}

// dirPath is the path of a directory without the slash at its end: "" for the root.
func (f *FS) dirPath(v *view, p *parents, dir uint32) (string, error) {
	path := ""
	for depth := 0; dir != rootInode; depth++ {
		above := p.one(dir)
		if above == 0 || depth > maxNameDepth {
			return "", fmt.Errorf("inode %d has no path", dir)
		}
		names := f.names(v, above, dir)
		if len(names) == 0 {
			return "", fmt.Errorf("inode %d has no name", dir)
		}
		path = "/" + names[0] + path
		if len(path) > 1<<16 {
			return "", ErrTooLarge
		}
		dir = above
	}
	return path, nil
}

// names are those that a directory gives to an inode.
func (f *FS) names(v *view, dir, number uint32) []string {
	i, err := f.inodeIn(v, dir)
	if err != nil {
		return nil
	}
	var out []string
	_ = f.entries(v, i, func(e entry) bool {
		if e.inode == number {
			out = append(out, string(e.name))
		}
		return len(out) < 16
	})
	return out
}
