package introspect

import (
	"errors"
	"fmt"
	"strings"

	"vigia/internal/event"
)

var errPath = errors.New("path in guest memory leads nowhere")

// filePath returns where a struct file lies: from its dentry up to the root of its file system, across the mount to
// the file system it is mounted on, and so on to the root of its mount namespace (fs/d_path.c: prepend_path).
func (g *Guest) filePath(file uint64) (string, error) {
	r := &reader{s: g.space}
	mnt, dentry := r.u64(file+g.layout.file.mnt), r.u64(file+g.layout.file.dentry)
	if r.err != nil || mnt == 0 || dentry == 0 {
		return "", errPath
	}
	path, err := g.climb(g.scratch[:maxPath], mnt, dentry)
	if err != nil {
		return "", err
	}
	text := event.Text(path)
	// An unlinked dentry is on no hash chain. The root of a file system is on none either.
	if hashed, err := g.space.U64(dentry + g.layout.dentry.pprev); err == nil && hashed == 0 && len(path) > 1 {
		text += deletedSuffix
	}
	return text, nil
}

// climb writes the path into the end of buf.
func (g *Guest) climb(buf []byte, mnt, dentry uint64) ([]byte, error) {
	d, m := &g.layout.dentry, &g.layout.mount
	r := &reader{s: g.space}
	at := len(buf)
	mounts := 0
	for range maxDepth {
		if dentry == r.u64(mnt+m.root) {
			mount := mnt - m.mnt
			parent := r.u64(mount + m.parent)
			if r.err != nil {
				return nil, errPath
			}
			if parent == mount || parent == 0 {
				return rooted(buf, at), nil
			}
			if mounts++; mounts > maxMounts {
				return nil, fmt.Errorf("%w: more than %d mounts", errPath, maxMounts)
			}
			dentry, mnt = r.u64(mount+m.mountpoint), parent+m.mnt
			continue
		}
		parent := r.u64(dentry + d.parent)
		if r.err != nil || parent == 0 {
			return nil, errPath
		}
		var err error
		if at, err = g.prepend(buf, at, dentry); err != nil {
			return nil, err
		}
		if parent == dentry { // the root of something never mounted: a memfd
			return rooted(buf, at), nil
		}
		dentry = parent
	}
	return nil, fmt.Errorf("%w: more than %d names", errPath, maxDepth)
}

func rooted(buf []byte, at int) []byte {
	if at == len(buf) {
		return []byte("/")
	}
	return buf[at:]
}

// prepend writes "/" and a dentry's name before buf[at:].
func (g *Guest) prepend(buf []byte, at int, dentry uint64) (int, error) {
	r := &reader{s: g.space}
	n := int(r.u32(dentry + g.layout.dentry.nameLen))
	name := r.u64(dentry + g.layout.dentry.name)
	if r.err != nil || n > 255 || n+1 > at {
		return 0, errPath
	}
	at -= n
	if err := g.space.Read(name, buf[at:at+n]); err != nil {
		return 0, errPath
	}
	at--
	buf[at] = '/'
	return at, nil
}

const deletedSuffix = " (deleted)"

// deleted reports whether a path as filePath returns it is of a file without a name. A file may be called so, too: it is then
// taken for one.
func deleted(path string) bool { return strings.HasSuffix(path, deletedSuffix) }
