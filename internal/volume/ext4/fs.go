package ext4

import (
	"cmp"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"path"
	"slices"
	"strings"
	"time"
)

const (
	maxLinks     = 40       // symbolic links followed in one path, as in the kernel
	maxDirBlocks = 64 << 20 // bytes of one directory
	maxNameDepth = 256
)

// FS reads one file system. It is safe for concurrent use. Where the guest runs, or may start, use it only on a
// snapshot: FS does not follow what changes (a [Tracker] does).
type FS struct {
	sb       *superblock
	v        *view
	groups   []group
	tables   []table
	log      *journal // nil where there is none, or an external one
	notes    []string
	external bool
	tooMuch  error // the journal could not be replayed whole
	spare    *int  // directory blocks that may still be read; nil for any number
}

// Open finds the file system that fills size bytes from off on. A dirty journal is replayed in memory.
//
// It returns [ErrNotExt4], [ErrCorrupt], [ErrUnsupported] or an error of r.
func Open(r io.ReaderAt, off, size int64) (*FS, error) {
	f, err := open(r, off, size)
	if err != nil {
		return nil, err
	}
	f.replay()
	return f, nil
}

// open leaves a dirty journal as it is.
func open(r io.ReaderAt, off, size int64) (*FS, error) {
	if off < 0 || size < superOffset+superSize {
		return nil, ErrNotExt4
	}
	buf := make([]byte, superSize)
	if n, err := r.ReadAt(buf, off+superOffset); n < len(buf) {
		if errors.Is(err, io.EOF) {
			return nil, ErrNotExt4
		}
		return nil, fmt.Errorf("ext4 superblock: %w", err)
	}
	sb, err := parseSuper(buf, size)
	if err != nil {
		return nil, err
	}
	f := &FS{sb: sb, v: &view{r: r, off: off, bs: sb.blockSize, blocks: sb.blocks, limit: uint64(size / sb.blockSize)}}
	if f.groups, err = sb.readGroups(f.v); err != nil {
		return nil, err
	}
	f.sortTables()
	f.openJournal()
	return f, nil
}

// table is where the inode table of a group lies.
type table struct {
	block uint64
	group uint32
}

func (f *FS) sortTables() {
	f.tables = f.tables[:0]
	for g, gr := range f.groups {
		f.tables = append(f.tables, table{gr.inodeTable, uint32(g)})
	}
	slices.SortFunc(f.tables, func(a, b table) int { return cmp.Compare(a.block, b.block) })
}

// firstInode is the number of the first inode in a block of an inode table.
func (f *FS) firstInode(block uint64) (uint32, bool) {
	n, found := slices.BinarySearchFunc(f.tables, block, func(t table, b uint64) int { return cmp.Compare(t.block, b) })
	if !found {
		n--
	}
	if n < 0 || block-f.tables[n].block >= f.sb.tableBlocks() {
		return 0, false
	}
	t := f.tables[n]
	return t.group*f.sb.inodesPerGroup + uint32(block-t.block)*uint32(f.sb.blockSize/f.sb.inodeSize) + 1, true
}

// openJournal finds the journal. A broken one does not keep the files from being read: it is noted.
func (f *FS) openJournal() {
	if f.sb.compat&compatHasJournal == 0 {
		return
	}
	if f.sb.journalInode == 0 {
		f.external = true
		f.note("its journal lies on another device: recent changes may be missing")
		return
	}
	i, err := f.inode(f.sb.journalInode)
	if err == nil {
		var j *journal
		if j, err = newJournal(f.v, i); err == nil {
			f.log, f.v.log = j, j
			return
		}
	}
	f.note("journal: " + err.Error())
}

// replay lays what the journal's complete transactions hold over the disk.
func (f *FS) replay() {
	if f.log == nil {
		return
	}
	layer := map[uint64]logged{}
	for {
		tx, err := f.log.next()
		if err != nil {
			f.note("journal: " + err.Error())
		}
		if tx == nil {
			break
		}
		tx.merge(layer)
		f.log.advance(tx)
		if len(layer) > maxOverlay {
			f.tooMuch = fmt.Errorf("more than %d blocks wait in the journal: %w", maxOverlay, ErrTooLarge)
			f.note(f.tooMuch.Error())
			break
		}
	}
	f.v.layers = []map[uint64]logged{layer}
	if len(layer) > 0 {
		if err := f.reread(); err != nil {
			f.note("journal: " + err.Error())
		}
	}
}

// reread takes the superblock and the group descriptors from the journal: it may hold newer ones, of a larger file system.
func (f *FS) reread() error {
	buf := make([]byte, f.sb.blockSize)
	if err := f.v.block(uint64(superOffset/f.sb.blockSize), buf); err != nil {
		return err
	}
	sb, err := parseSuper(buf[superOffset%f.sb.blockSize:], int64(f.v.limit)*f.sb.blockSize)
	if err != nil {
		return err
	}
	if sb.blockSize != f.sb.blockSize {
		return corrupt("the journal changes the block size")
	}
	v := *f.v
	v.blocks = sb.blocks
	groups, err := sb.readGroups(&v)
	if err != nil {
		return err
	}
	f.sb, f.v, f.groups = sb, &v, groups
	f.sortTables()
	return nil
}

func (f *FS) note(s string) { f.notes = append(f.notes, s) }

// Notes says what a reader of the files should know: an external journal, a broken one.
func (f *FS) Notes() []string { return append([]string(nil), f.notes...) }

// Label and UUID identify the file system; Kind is ext2, ext3 or ext4.
func (f *FS) Label() string { return f.sb.label }

// UUID is in the usual notation.
func (f *FS) UUID() string { return formatUUID(f.sb.uuid[:]) }

// Kind is ext2, ext3 or ext4.
func (f *FS) Kind() string { return f.sb.kind() }

// place is the byte of the disk where an inode lies.
func (f *FS) place(number uint32) (block uint64, at int64, err error) {
	if number == 0 || number > f.sb.inodes {
		return 0, 0, corrupt("inode %d of %d", number, f.sb.inodes)
	}
	g, n := (number-1)/f.sb.inodesPerGroup, (number-1)%f.sb.inodesPerGroup
	byteAt := int64(n) * f.sb.inodeSize
	return f.groups[g].inodeTable + uint64(byteAt/f.sb.blockSize), byteAt % f.sb.blockSize, nil
}

func (f *FS) inode(number uint32) (*inode, error) { return f.inodeIn(f.v, number) }

func (f *FS) inodeIn(v *view, number uint32) (*inode, error) {
	block, at, err := f.place(number)
	if err != nil {
		return nil, err
	}
	buf := make([]byte, f.sb.blockSize)
	if err := v.block(block, buf); err != nil {
		return nil, fmt.Errorf("inode %d: %w", number, err)
	}
	return parseInode(number, buf[at:at+f.sb.inodeSize]), nil
}

func (f *FS) filetype() bool { return f.sb.incompat&incompatFiletype != 0 }

// entries visits the names in a directory.
func (f *FS) entries(v *view, dir *inode, visit func(entry) bool) error {
	return f.entriesBy(v, dir, make([]byte, v.bs), visit)
}

func (f *FS) entriesBy(v *view, dir *inode, buf []byte, visit func(entry) bool) error {
	if !dir.isDir() {
		return fmt.Errorf("inode %d: not a directory", dir.number)
	}
	if dir.inline() {
		return inlineEntries(dir, f.filetype(), visit)
	}
	done, left := false, maxDirBlocks/v.bs
	m := mapper{v: v, budget: int(left), visit: func(s span) error {
		for n := uint64(0); n < s.n && !s.tree && !done; n++ {
			if f.spare != nil {
				if *f.spare--; *f.spare < 0 {
					return ErrTooLarge
				}
			}
			if left--; left < 0 {
				return fmt.Errorf("directory inode %d: %w", dir.number, ErrTooLarge)
			}
			if err := v.block(s.start+n, buf); err != nil {
				return err
			}
			err := eachEntry(buf, f.filetype(), func(e entry) bool {
				done = !visit(e)
				return !done
			})
			if err != nil {
				return fmt.Errorf("directory inode %d: %w", dir.number, err)
			}
		}
		return nil
	}}
	return m.inode(dir)
}

func (f *FS) child(v *view, dir *inode, name string) (uint32, error) {
	found := uint32(0)
	err := f.entries(v, dir, func(e entry) bool {
		if string(e.name) == name {
			found = e.inode
		}
		return found == 0
	})
	if err == nil && found == 0 {
		err = fs.ErrNotExist
	}
	return found, err
}

// resolve walks a path from the root. It follows symbolic links, the last one only if follow is set.
func (f *FS) resolve(name string, follow bool) (*inode, error) {
	todo, links := parts(name), 0
	at, err := f.inode(rootInode)
	stack := []*inode{at}
	for err == nil && len(todo) > 0 {
		part := todo[0]
		todo = todo[1:]
		if part == ".." {
			if len(stack) > 1 {
				stack = stack[:len(stack)-1]
			}
			at = stack[len(stack)-1]
			continue
		}
		if len(stack) > maxNameDepth {
			return nil, ErrTooLarge
		}
		var number uint32
		if number, err = f.child(f.v, stack[len(stack)-1], part); err != nil {
			break
		}
		if at, err = f.inode(number); err != nil {
			break
		}
		if at.isSymlink() && (follow || len(todo) > 0) {
			if links++; links > maxLinks {
				return nil, errors.New("too many symbolic links")
			}
			var target string
			if target, err = f.target(f.v, at); err != nil {
				break
			}
			if strings.HasPrefix(target, "/") {
				stack = stack[:1]
			}
			todo = append(parts(target), todo...)
			at = stack[len(stack)-1]
			continue
		}
		if at.isDir() {
			stack = append(stack, at)
		} else if len(todo) > 0 {
			err = errors.New("not a directory")
		}
	}
	if err != nil {
		return nil, err
	}
	return at, nil
}

func parts(name string) []string {
	var out []string
	for p := range strings.SplitSeq(name, "/") {
		if p != "" && p != "." {
			out = append(out, p)
		}
	}
	return out
}

// target reads what a symbolic link points to.
func (f *FS) target(v *view, i *inode) (string, error) {
	switch {
	case i.size > 4096:
		return "", fmt.Errorf("symbolic link of %d bytes: %w", i.size, ErrTooLarge)
	case i.inline():
		return string(i.inlineData()), nil
	case !i.mapped():
		return string(i.root()[:min(i.size, iBlockSize)]), nil
	}
	buf := make([]byte, i.size)
	file, err := f.newFile(v, i)
	if err == nil {
		_, err = io.ReadFull(io.NewSectionReader(file, 0, i.size), buf)
	}
	return string(buf), err
}

// Info describes a file. It is an [fs.FileInfo].
type Info struct {
	name     string
	Inode    uint32
	UID, GID uint32
	Links    int
	size     int64
	mode     fs.FileMode
	mtime    time.Time
}

// Name is the last part of the path.
func (i Info) Name() string { return i.name }

// Size is in bytes.
func (i Info) Size() int64 { return i.size }

// Mode holds type and permissions.
func (i Info) Mode() fs.FileMode { return i.mode }

// ModTime is by the guest's clock.
func (i Info) ModTime() time.Time { return i.mtime }

// IsDir reports whether it is a directory.
func (i Info) IsDir() bool { return i.mode.IsDir() }

// Sys is nil.
func (i Info) Sys() any { return nil }

func info(name string, i *inode) Info {
	return Info{name: name, Inode: i.number, UID: i.uid, GID: i.gid, Links: int(i.links), size: i.size, mode: i.fileMode(), mtime: i.mtime}
}

// Stat describes the file at a path, following symbolic links. Errors are [*fs.PathError].
func (f *FS) Stat(name string) (Info, error) { return f.stat("stat", name, true) }

// Lstat does not follow the last link.
func (f *FS) Lstat(name string) (Info, error) { return f.stat("lstat", name, false) }

func (f *FS) stat(op, name string, follow bool) (Info, error) {
	i, err := f.resolve(name, follow)
	if err != nil {
		return Info{}, &fs.PathError{Op: op, Path: name, Err: err}
	}
	return info(path.Base("/"+name), i), nil
}

// Readlink returns what the symbolic link at a path points to.
func (f *FS) Readlink(name string) (string, error) {
	i, err := f.resolve(name, false)
	if err == nil && !i.isSymlink() {
		err = fs.ErrInvalid
	}
	var s string
	if err == nil {
		s, err = f.target(f.v, i)
	}
	if err != nil {
		return "", &fs.PathError{Op: "readlink", Path: name, Err: err}
	}
	return s, nil
}

// ReadDir lists a directory in its own order, at most limit entries: more are [ErrTooLarge].
func (f *FS) ReadDir(name string, limit int) ([]Info, error) {
	dir, err := f.resolve(name, true)
	var found []Info
	if err == nil {
		found, err = f.list(dir, limit)
	}
	if err != nil {
		return nil, &fs.PathError{Op: "readdir", Path: name, Err: err}
	}
	return found, nil
}

func (f *FS) list(dir *inode, limit int) ([]Info, error) {
	var found []Info
	err := f.entries(f.v, dir, func(e entry) bool {
		found = append(found, Info{name: string(e.name), Inode: e.inode})
		return len(found) <= limit
	})
	if err != nil {
		return nil, err
	}
	if len(found) > limit {
		return nil, fmt.Errorf("more than %d entries: %w", limit, ErrTooLarge)
	}
	for n, e := range found {
		i, err := f.inode(e.Inode)
		if err != nil {
			return nil, err
		}
		found[n] = info(e.name, i)
	}
	return found, nil
}
