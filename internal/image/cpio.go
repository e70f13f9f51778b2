package image

import (
	"fmt"
	"io"
	"path"
	"slices"
	"strings"
)

// archive collects the files of an initrd and writes them as cpio "newc", the format of
// Documentation/driver-api/early-userspace/buffer-format.rst: per file a header of 13 eight-digit hexadecimal fields,
// the name, the content, each padded to 4 bytes. Equal files give equal bytes: times are zero, owners root,
// inode numbers count from 1, names are sorted.
type archive struct {
	files map[string]archived
}

type archived struct {
	mode uint32
	data []byte
}

// Types of files in a cpio header's mode, as in stat(2).
const (
	modeDir  = 0o040000
	modeFile = 0o100000
	modeLink = 0o120000
	modeChar = 0o020000
)

func (a *archive) add(name string, mode uint32, data []byte) {
	if a.files == nil {
		a.files = map[string]archived{}
	}
	name = strings.Trim(name, "/")
	for dir := path.Dir(name); dir != "."; dir = path.Dir(dir) {
		if _, ok := a.files[dir]; !ok {
			a.files[dir] = archived{mode: modeDir | 0o755}
		}
	}
	a.files[name] = archived{mode, data}
}

func (a *archive) dir(name string)                            { a.add(name, modeDir|0o755, nil) }
func (a *archive) file(name string, perm uint32, data []byte) { a.add(name, modeFile|perm, data) }
func (a *archive) link(name, target string)                   { a.add(name, modeLink|0o777, []byte(target)) }

// writeTo writes the archive with its trailer, padded to 512 bytes as tools expect.
func (a *archive) writeTo(w io.Writer) error {
	names := make([]string, 0, len(a.files))
	for n := range a.files {
		names = append(names, n)
	}
	slices.Sort(names)
	out := &padded{w: w}
	for i, name := range names {
		f := a.files[name]
		out.entry(i+1, name, f)
	}
	out.entry(0, "TRAILER!!!", archived{})
	out.pad(512)
	return out.err
}

type padded struct {
	w   io.Writer
	n   int
	err error
}

func (p *padded) write(b []byte) {
	if p.err == nil {
		var n int
		n, p.err = p.w.Write(b)
		p.n += n
	}
}

func (p *padded) pad(to int) {
	if rest := p.n % to; rest != 0 {
		p.write(make([]byte, to-rest))
	}
}

func (p *padded) entry(inode int, name string, f archived) {
	var major, minor uint32
	data := f.data
	if f.mode&0o170000 == modeChar { // only /dev/console, which the kernel opens before init mounts anything
		major, minor, data = 5, 1, nil
	}
	links := 1
	if f.mode&modeDir != 0 {
		links = 2
	}
	p.write(fmt.Appendf(nil, "070701%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X",
		inode, f.mode, 0, 0, links, 0, len(data), 0, 0, major, minor, len(name)+1, 0))
	p.write(append([]byte(name), 0))
	p.pad(4)
	p.write(data)
	p.pad(4)
}
