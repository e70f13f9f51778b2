package introspect

import (
	"encoding/binary"
	"fmt"

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

	Unknown []string `json:"unknown,omitempty"`
}

type fileLayout struct {
	files, table, maxFDs, fds, inode, number, mode, private uint64
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

// eachFile visits the open files of all processes, or of one.
func (g *Guest) eachFile(pid int64, visit func(openFile) error) error {
	l, err := g.fileLayout()
	if err != nil {
		return err
	}
	return g.leaders(func(task uint64) error {
		r := reader{s: g.space}
		f := openFile{pid: int64(int32(r.u32(task + g.layout.task.pid)))}
		if r.err == nil && pid != 0 && f.pid != pid {
			return nil
		}
		comm := g.scratch[:16]
		r.bytes(task+g.layout.task.comm, comm)
		files := r.u64(task + l.files)
		if r.err != nil {
			return ErrTorn
		}
		if files == 0 { // a zombie
			return nil
		}
		f.comm = event.Text(untilNUL(comm))
		return g.filesOf(l, files, f, visit)
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
	if f.Type == "pipe" || f.Type == "socket" || f.Type == "other" {
		if name, ok := g.nameless(o.file); ok {
			f.Path = fmt.Sprintf("%s:[%d]", f.Type, f.Inode)
			if f.Type == "other" {
				f.Path = "anon_inode:" + name
			}
			return f
		}
	}
	path, err := g.filePath(o.file)
	if err != nil {
		f.Unknown = []string{"path"}
	}
	f.Path = path
	return f
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
