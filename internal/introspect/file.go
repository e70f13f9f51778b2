package introspect

import (
	"encoding/binary"
	"errors"
	"fmt"
	"slices"

	"vigia/internal/event"
)

// File is an open file of a process.
type File struct {
	PID   int64  `json:"pid"`
	Comm  string `json:"comm"`
	FD    int    `json:"fd"`
	Type  string `json:"type"` // file, directory, socket, pipe, character, block, link, other
	Path  string `json:"path"` // from the root of its mount namespace; socket:[inode] and the like where it has none
	Inode uint64 `json:"inode"`

	Mode       string `json:"mode"`       // r, w, rw; empty: opened as a path alone
	Position   int64  `json:"position"`   // where the next read or write begins
	Deleted    bool   `json:"deleted"`    // it has no name any more
	Filesystem string `json:"filesystem"` // what sort it lies in

	Unknown []string `json:"unknown,omitempty"`
}

type fileLayout struct {
	files, table, maxFDs, fds, inode, number, mode, private uint64
	access, position, super, sort, sortName                 uint64
	owner, ops, opsName                                     uint64
}

const (
	maxFDs   = 1 << 20 // of one process
	maxFiles = 1 << 18 // of one view
	fdChunk  = 64
)

func (g *Guest) fileLayout() (*fileLayout, error) {
	if g.files != nil {
		return g.files, nil
	}
	r, l := &resolver{p: g.profile}, &fileLayout{}
	l.files, l.table = r.field("task_struct", "files"), r.field("files_struct", "fdt")
	l.maxFDs, l.fds = r.field("fdtable", "max_fds"), r.field("fdtable", "fd")
	l.inode, l.private = r.field("file", "f_inode"), r.field("file", "private_data")
	l.number, l.mode = r.field("inode", "i_ino"), r.field("inode", "i_mode")
	l.access, l.position = r.optional("file", "f_mode"), r.optional("file", "f_pos")
	l.super, l.sort, l.sortName = r.optional("inode", "i_sb"), r.optional("super_block", "s_type"), r.optional("file_system_type", "name")
	l.owner, l.ops, l.opsName = r.optional("inode", "i_private"), r.optional("ns_common", "ops"), r.optional("proc_ns_operations", "name")
	if r.err != nil {
		return nil, r.err
	}
	g.files = l
	g.profile.Trim()
	return l, nil
}

// Files lists the open files of all processes, or of one where pid is not 0.
func (g *Guest) Files(pid int64) ([]File, error) {
	list := []File{}
	err := g.view(func() error {
		list = list[:0]
		return g.eachFile(pid, func(f openFile) error {
			if len(list) == maxFiles {
				return fmt.Errorf("%w: more than %d open files", ErrEndless, maxFiles)
			}
			list = append(list, g.file(f))
			return nil
		})
	})
	if err != nil {
		return nil, err
	}
	return list, nil
}

// openFile is an entry of a process's table of files.
type openFile struct {
	pid  int64
	comm string
	fd   int
	file uint64 // address of the struct file
}

// eachFile visits the open files of all processes, or of one. Threads that have unshared their table of files are looked at
// too, and so are those that a leader has left behind.
func (g *Guest) eachFile(pid int64, visit func(openFile) error) error {
	l, err := g.fileLayout()
	if err != nil {
		return err
	}
	var tables []uint64
	return g.leaders(func(task uint64) error {
		r := reader{s: g.space}
		f := openFile{pid: int64(int32(r.u32(task + g.layout.task.pid)))}
		if r.err == nil && pid != 0 && f.pid != pid {
			return nil
		}
		comm := g.scratch[:16]
		r.bytes(task+g.layout.task.comm, comm)
		signal := r.u64(task + g.layout.task.signal)
		if r.err != nil {
			return ErrTorn
		}
		f.comm = event.Text(untilNUL(comm))
		err := steady(func() error {
			tables = tables[:0]
			return g.walk(signal+g.layout.signal.threads, func(node uint64) error {
				files, err := g.space.U64(node - g.layout.task.threadNode + l.files)
				if err == nil && files != 0 && !slices.Contains(tables, files) { // 0: it has ended
					tables = append(tables, files)
				}
				return err
			})
		})
		if err != nil {
			return ErrTorn
		}
		for _, files := range tables {
			if err := g.filesOf(l, files, f, visit); err != nil {
				return err
			}
		}
		return nil
	})
}

// filesOf visits the entries of one table. A table that can't be read is one that its process has just let go.
func (g *Guest) filesOf(l *fileLayout, files uint64, f openFile, visit func(openFile) error) error {
	r := reader{s: g.space}
	table := r.u64(files + l.table)
	count := r.u32(table + l.maxFDs)
	array := r.u64(table + l.fds)
	if r.err != nil || count > maxFDs {
		return nil
	}
	var chunk [fdChunk * 8]byte
	for fd := 0; fd < int(count); fd += fdChunk {
		part := chunk[:8*min(fdChunk, int(count)-fd)]
		if g.space.Read(array+uint64(fd)*8, part) != nil {
			return nil
		}
		for i := range len(part) / 8 {
			if f.file = binary.LittleEndian.Uint64(part[8*i:]); f.file == 0 {
				continue
			}
			f.fd = fd + i
			if err := visit(f); err != nil {
				return err
			}
		}
	}
	return nil
}

var fileTypes = map[uint32]string{0x1: "pipe", 0x2: "character", 0x4: "directory", 0x6: "block", 0x8: "file", 0xa: "link", 0xc: "socket"}

func (g *Guest) file(o openFile) File {
	l := g.files
	f := File{PID: o.pid, Comm: o.comm, FD: o.fd, Type: "other"}
	r := reader{s: g.space}
	inode := r.u64(o.file + l.inode)
	f.Inode = r.u64(inode + l.number)
	mode := uint32(r.u16(inode + l.mode))
	if r.err != nil {
		f.Type, f.Unknown = "", []string{"type", "path", "inode"}
		return f
	}
	if t, ok := fileTypes[mode>>12]; ok {
		f.Type = t
	}
	g.access(&f, o.file, inode)
	if f.Type == "pipe" || f.Type == "socket" || f.Type == "other" {
		if name, ok := g.nameless(o.file); ok {
			f.Path = fmt.Sprintf("%s:[%d]", f.Type, f.Inode)
			if f.Type == "other" {
				f.Path = "anon_inode:" + name
			}
			return f
		}
	}
	if name, ok := g.pseudo(&f, inode); ok {
		f.Path = name
		return f
	}
	path, err := g.filePath(o.file)
	if err != nil {
		f.Unknown = append(f.Unknown, "path")
	}
	f.Path, f.Deleted = path, deleted(path)
	return f
}

// pseudo names the files of file systems that make names up when they are asked for one: a namespace's, and since 6.9 a
// pidfd.
func (g *Guest) pseudo(f *File, inode uint64) (string, bool) {
	switch f.Filesystem {
	case "pidfs":
		return "anon_inode:[pidfd]", true
	case "nsfs":
		space, err1 := g.field64(inode, g.files.owner)
		ops, err2 := g.field64(space, g.files.ops)
		name, err3 := g.field64(ops, g.files.opsName)
		if errors.Join(err1, err2, err3) != nil {
			return "", false
		}
		text, err := g.space.CString(name, 32)
		return fmt.Sprintf("%s:[%d]", event.Text(text), f.Inode), err == nil
	}
	return "", false
}

// access fills in how a file was opened, how far it was read or written, and in what sort of file system it lies.
func (g *Guest) access(f *File, file, inode uint64) {
	l := g.files
	unknown := func(name string) { f.Unknown = append(f.Unknown, name) }
	if mode, err := g.field32(file, l.access); err != nil {
		unknown("mode")
	} else {
		f.Mode = [...]string{"", "r", "w", "rw"}[mode&3]
	}
	if at, err := g.field64(file, l.position); err != nil {
		unknown("position")
	} else {
		f.Position = int64(at)
	}
	super, err := g.field64(inode, l.super)
	if err != nil {
		unknown("filesystem")
		return
	}
	name, known := g.seen.filesystems[super]
	if !known {
		if name, err = g.filesystem(super); err != nil {
			unknown("filesystem")
			return
		}
		g.seen.filesystems[super] = name
	}
	f.Filesystem = name
}

func (g *Guest) filesystem(super uint64) (string, error) {
	sort, err := g.field64(super, g.files.sort)
	if err != nil {
		return "", err
	}
	name, err := g.field64(sort, g.files.sortName)
	if err != nil {
		return "", err
	}
	text, err := g.space.CString(name, 64)
	return event.Text(text), err
}

// nameless reports whether a file is one of pipefs, sockfs or anon_inodefs: its dentry stands alone, its own parent,
// outside any tree. The dentry's name is what sort of thing it is.
func (g *Guest) nameless(file uint64) (name string, ok bool) {
	r := reader{s: g.space}
	dentry := r.u64(file + g.layout.file.dentry)
	mnt := r.u64(file + g.layout.file.mnt)
	parent := r.u64(dentry + g.layout.dentry.parent)
	root := r.u64(mnt + g.layout.mount.root)
	if r.err != nil || parent != dentry || root == dentry {
		return "", false
	}
	at, err := g.prepend(g.scratch[:], len(g.scratch), dentry)
	if err != nil {
		return "", true
	}
	return event.Text(g.scratch[at+1:]), true
}
