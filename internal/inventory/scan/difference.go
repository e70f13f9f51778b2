package scan

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"slices"
	"time"

	"vigia/internal/volume/ext4"
)

// Bounds of a comparison of two trees.
const (
	MaxChanges  = 2000      // told; the others are counted
	maxCompared = 1 << 30   // bytes of files of which only the content could differ, read of each disk
	compareStep = 256 << 10 // at a time
	maxTree     = 500_000   // files of a tree
)

// Node is what is told of one side's file.
type Node struct {
	Mode     string    `json:"mode"`
	Size     int64     `json:"size"`
	UID      uint32    `json:"uid"`
	GID      uint32    `json:"gid"`
	Modified time.Time `json:"modified"`
}

// Change is one file that is not the same in both trees.
type Change struct {
	Path   string   `json:"path"`
	Change string   `json:"change"`         // added, removed or changed
	What   []string `json:"what,omitempty"` // of a changed one: type, mode, owner, size, content, link, times, inode
	Before *Node    `json:"before,omitempty"`
	After  *Node    `json:"after,omitempty"`
}

// Difference is what two trees differ in.
type Difference struct {
	Files   []Change `json:"files,omitempty"` // by path
	LeftOut int64    `json:"left_out"`        // for which there was no room
	Notes   []string `json:"notes,omitempty"`
}

// Compare lists the files that two trees do not have alike. same says, without reading, that two files hold the same; where it does not
// know, they are read, so that a file that was written and given its old times again is found.
func Compare(then, now *ext4.FS, same func(a, b *ext4.File) bool) (Difference, error) {
	c := comparer{a: side{fs: then, all: map[string]ext4.Info{}}, b: side{fs: now, all: map[string]ext4.Info{}}, same: same}
	for _, t := range []*side{&c.a, &c.b} {
		if _, err := t.fs.ReadDir("/", maxEntries); err != nil {
			return Difference{}, fmt.Errorf("the root directory: %w", err)
		}
		t.walk("/", 0)
		if len(t.all) >= maxTree {
			c.note("more than %d files: the others were not looked at", maxTree)
		}
		for _, n := range t.notes {
			c.note("%s", n)
		}
	}
	paths := make([]string, 0, len(c.b.all))
	for p := range c.b.all {
		paths = append(paths, p)
	}
	for p := range c.a.all {
		if _, ok := c.b.all[p]; !ok {
			paths = append(paths, p)
		}
	}
	slices.Sort(paths)
	for _, p := range paths {
		c.path(p)
	}
	if c.skipped > 0 {
		c.note("%d files whose size and times are the same were not read: their content is not known to be the same", c.skipped)
	}
	return c.Difference, nil
}

// side is all files of one tree.
type side struct {
	fs    *ext4.FS
	all   map[string]ext4.Info
	notes []string
}

func (t *side) walk(dir string, depth int) {
	if depth > maxDepth || len(t.all) >= maxTree {
		return
	}
	list, err := t.fs.ReadDir(dir, maxTree)
	if err != nil && !errors.Is(err, fs.ErrNotExist) && len(t.notes) < maxNotes {
		t.notes = append(t.notes, fmt.Sprintf("%s: %v", dir, err))
	}
	for _, e := range list {
		if e.Name() == "." || e.Name() == ".." || len(t.all) >= maxTree {
			continue
		}
		at := join(dir, e.Name())
		t.all[at] = e
		if e.IsDir() {
			t.walk(at, depth+1)
		}
	}
}

type comparer struct {
	Difference
	a, b    side
	same    func(a, b *ext4.File) bool
	read    int64
	skipped int
}

func (c *comparer) note(format string, args ...any) {
	if len(c.Notes) < maxNotes {
		c.Notes = append(c.Notes, text(fmt.Sprintf(format, args...)))
	}
}

func (c *comparer) path(p string) {
	a, had := c.a.all[p]
	b, has := c.b.all[p]
	switch {
	case !had:
		c.add(Change{Path: text(p), Change: "added", After: node(b)})
	case !has:
		c.add(Change{Path: text(p), Change: "removed", Before: node(a)})
	default:
		if what := c.what(p, a, b); len(what) > 0 {
			c.add(Change{Path: text(p), Change: "changed", What: what, Before: node(a), After: node(b)})
		}
	}
}

func (c *comparer) add(ch Change) {
	if len(c.Files) >= MaxChanges {
		c.LeftOut++
		return
	}
	c.Files = append(c.Files, ch)
}

func node(i ext4.Info) *Node {
	return &Node{Mode: i.Mode().String(), Size: i.Size(), UID: i.UID, GID: i.GID, Modified: i.ModTime().UTC()}
}

// what says in which respects one path's files differ. A directory's own size and times follow from what is in it.
func (c *comparer) what(p string, a, b ext4.Info) (what []string) {
	differs := func(name string, yes bool) {
		if yes {
			what = append(what, name)
		}
	}
	differs("type", a.Mode().Type() != b.Mode().Type())
	differs("mode", a.Mode().Type() == b.Mode().Type() && a.Mode() != b.Mode())
	differs("owner", a.UID != b.UID || a.GID != b.GID)
	if a.Mode().Type() != b.Mode().Type() || a.IsDir() {
		return what
	}
	differs("inode", a.Inode != b.Inode)
	differs("size", a.Size() != b.Size())
	differs("times", !a.ModTime().Equal(b.ModTime()))
	switch {
	case a.Mode().IsRegular():
		differs("content", a.Size() != b.Size() || !c.sameContent(p, len(what) == 0))
	case a.Mode()&fs.ModeSymlink != 0:
		x, err1 := c.a.fs.Readlink(p)
		y, err2 := c.b.fs.Readlink(p)
		differs("link", err1 == nil && err2 == nil && x != y)
	}
	if slices.Equal(what, []string{"inode"}) { // written anew with the same: nothing that a person would call a change
		return nil
	}
	return what
}

// sameContent compares two files of one size. What can't be read is noted, and not called different.
func (c *comparer) sameContent(p string, quiet bool) bool {
	a, err1 := c.a.fs.Open(p)
	b, err2 := c.b.fs.Open(p)
	if err := errors.Join(err1, err2); err != nil {
		c.note("%s: %v", p, err)
		return true
	}
	if c.same(a, b) {
		return true
	}
	if c.read += a.Size(); c.read > maxCompared && quiet {
		c.skipped++
		return true
	}
	x, y := make([]byte, min(compareStep, a.Size())), make([]byte, min(compareStep, a.Size()))
	for off := int64(0); off < a.Size(); off += int64(len(x)) {
		n, err1 := a.ReadAt(x, off)
		m, err2 := b.ReadAt(y, off)
		if err := errors.Join(notEnd(err1), notEnd(err2)); err != nil {
			c.note("%s: %v", p, err)
			return true
		}
		if n != m || !bytes.Equal(x[:n], y[:m]) {
			return false
		}
		if n == 0 {
			break
		}
	}
	return true
}

func notEnd(err error) error {
	if errors.Is(err, io.EOF) {
		return nil
	}
	return err
}

// SamePlace is a same for Compare: two files that lie at the same place of two disks hold the same where shares says so of each piece.
func SamePlace(shares func(off, n int64) bool) func(a, b *ext4.File) bool {
	return func(a, b *ext4.File) bool {
		x, ok1 := a.Pieces()
		y, ok2 := b.Pieces()
		if !ok1 || !ok2 || !slices.Equal(x, y) {
			return false
		}
		for _, p := range x {
			if !shares(p.Disk, p.Length) {
				return false
			}
		}
		return true
	}
}
