package ext4

import (
	"bytes"
	"cmp"
	"fmt"
	"maps"
	"path"
	"slices"
	"strings"
	"time"
)

const (
	maxWatched     = 4096
	maxWatchWalk   = 1 << 18 // directory entries looked at to find what is watched
	maxPatternLink = 8       // symbolic links followed for one pattern
)

type glob byte

const (
	globNone glob = iota
	globStar      // dir/*
	globDeep      // dir/**
)

// pattern is one entry of Options.Watch, or one with a symbolic link on its way resolved.
type pattern struct {
	text  string
	comps []string
	glob  glob
	// The first `from` components stand for a symbolic link that was watched by the name `show`.
	from  int
	show  string
	links int
}

func parsePattern(text string) (*pattern, error) {
	p := &pattern{text: text}
	dir, last := path.Split(text)
	switch last {
	case "*":
		p.glob, text = globStar, dir
	case "**":
		p.glob, text = globDeep, dir
	}
	if !strings.HasPrefix(text, "/") || strings.Contains(text, "*") || slices.Contains(strings.Split(text, "/"), "..") {
		return nil, fmt.Errorf("watched path %q: use an absolute path, dir/* or dir/**", p.text)
	}
	p.comps = parts(text)
	if p.glob == globNone && len(p.comps) == 0 {
		return nil, fmt.Errorf("watched path %q: use /* or /** for what is in the root", p.text)
	}
	return p, nil
}

// want says that a directory is the place where component i of a pattern is looked for.
type want struct {
	p    *pattern
	i    int
	show string // the directory by the name that it is watched under
	real string // by its own
}

// watcher knows which directories lie on the way to a watched path, and which inodes the watched paths are now.
type watcher struct {
	patterns []*pattern
	dirs     map[uint32][]want
	bound    map[string]uint32 // path → inode
	touched  map[string]uint32 // path → what it was bound to before
	redo     bool              // a directory or a link on the way changed
	full     bool
	left     int
}

func newWatcher(list []string) (*watcher, error) {
	w := &watcher{dirs: map[uint32][]want{}, bound: map[string]uint32{}, touched: map[string]uint32{}}
	for _, text := range list {
		p, err := parsePattern(text)
		if err != nil {
			return nil, err
		}
		w.patterns = append(w.patterns, p)
	}
	return w, nil
}

// watchedFile is a watched inode. It is never changed: it is replaced.
type watchedFile struct {
	number     uint32
	paths      []string
	size       int64
	mtime      time.Time
	mode       uint16
	uid, gid   uint32
	generation uint32
	block      uint64 // of the inode table, where the file's data lie in the inode; else 0
}

// watchSet is what the hot path sees.
type watchSet struct {
	files  map[uint32]*watchedFile
	inline map[uint64][]uint32 // blocks of the inode table that hold the data of watched files
}

func (w *watcher) bind(path string, inode uint32) {
	was := w.bound[path]
	if was == inode {
		return
	}
	if _, known := w.touched[path]; !known {
		w.touched[path] = was
	}
	switch {
	case inode == 0:
		delete(w.bound, path)
	case len(w.bound) >= maxWatched && was == 0:
		w.full = true
	default:
		w.bound[path] = inode
	}
}

// resolve finds all watched paths from the root.
func (w *watcher) resolve(f *FS) {
	was := w.bound
	w.bound, w.dirs, w.redo, w.full, w.left = map[string]uint32{}, map[uint32][]want{}, false, false, maxWatchWalk
	kept := w.touched
	w.touched = map[string]uint32{}
	for _, p := range w.patterns {
		w.descend(f, rootInode, want{p: p})
	}
	w.touched = kept
	for path, inode := range was {
		if _, known := kept[path]; !known && w.bound[path] != inode {
			kept[path] = inode
		}
	}
	for path := range w.bound {
		if _, known := kept[path]; !known && was[path] == 0 {
			kept[path] = 0
		}
	}
}

func (w *watcher) descend(f *FS, dir uint32, at want) {
	for _, have := range w.dirs[dir] {
		if have.p == at.p && have.i == at.i && have.show == at.show {
			return
		}
	}
	if len(w.dirs) >= maxWatched || len(w.dirs[dir]) >= 64 || len(at.real) > 1<<14 {
		w.full = true
		return
	}
	w.dirs[dir] = append(w.dirs[dir], at)
	i, err := f.inode(dir)
	if err != nil || !i.isDir() {
		return
	}
	var found []named
	_ = f.entries(f.v, i, func(e entry) bool { // what is broken in a directory makes the rest of it unwatched
		if w.left--; w.left < 0 {
			w.full = true
			return false
		}
		if at.i == len(at.p.comps) || string(e.name) == at.p.comps[at.i] {
			found = append(found, named{dir, e.inode, e.kind, string(e.name)})
		}
		return true
	})
	for _, n := range found {
		w.attach(f, at, n)
	}
}

// attach takes in an entry of a directory where at looks for something.
func (w *watcher) attach(f *FS, at want, n named) {
	if n.inode == 0 || n.inode > f.sb.inodes {
		return
	}
	kind := typeOf(f, n)
	show, real := at.show+"/"+n.name, at.real+"/"+n.name
	if at.i+1 == at.p.from {
		show = at.p.show
	}
	if at.i == len(at.p.comps) { // a glob
		if kind != ftypeDir {
			w.bind(show, n.inode)
		} else if at.p.glob == globDeep {
			w.descend(f, n.inode, want{at.p, at.i, show, real})
		}
		return
	}
	if n.name != at.p.comps[at.i] {
		return
	}
	last := at.i+1 == len(at.p.comps) && at.p.glob == globNone
	switch {
	case kind == ftypeSymlink:
		w.follow(f, at, n, show)
	case last:
		w.bind(show, n.inode)
	case kind == ftypeDir:
		w.descend(f, n.inode, want{at.p, at.i + 1, show, real})
	}
}

// follow goes on behind a symbolic link.
func (w *watcher) follow(f *FS, at want, n named, show string) {
	i, err := f.inode(n.inode)
	if err != nil || at.p.links >= maxPatternLink {
		return
	}
	target, err := f.target(f.v, i)
	if err != nil {
		return
	}
	if !strings.HasPrefix(target, "/") {
		target = at.real + "/" + target
	}
	comps := parts(path.Clean(target))
	p := &pattern{text: at.p.text, glob: at.p.glob, from: len(comps), show: show, links: at.p.links + 1}
	p.comps = append(comps, at.p.comps[at.i+1:]...)
	if len(p.comps) <= maxNameDepth {
		w.descend(f, rootInode, want{p: p})
	}
}

func typeOf(f *FS, n named) byte {
	if n.kind != 0 {
		return n.kind
	}
	i, err := f.inode(n.inode)
	switch {
	case err != nil:
		return 0
	case i.isDir():
		return ftypeDir
	case i.isSymlink():
		return ftypeSymlink
	}
	return ftypeRegular
}

// changed takes in an entry that came or went. Files are handled one by one; a directory or a link on the way that
// went, or a link that came, makes everything be resolved anew.
func (w *watcher) changed(f *FS, n named, came bool) {
	for _, at := range w.dirs[n.dir] {
		inGlob := at.i == len(at.p.comps)
		if !inGlob && n.name != at.p.comps[at.i] {
			continue
		}
		last := inGlob || at.i+1 == len(at.p.comps) && at.p.glob == globNone
		plain := n.kind != 0 && n.kind != ftypeDir && (inGlob || n.kind != ftypeSymlink)
		if !came && plain && last {
			show := at.show + "/" + n.name
			if at.i+1 == at.p.from {
				show = at.p.show
			}
			if w.bound[show] == n.inode {
				w.bind(show, 0)
			}
			continue
		}
		if came && (plain || n.kind == ftypeDir) {
			w.left = maxWatchWalk
			w.attach(f, at, n)
			continue
		}
		w.redo = true
	}
}

// rename brings the watches up to date and reports what changed. With no difference at hand (d is nil), everything is
// resolved anew.
func (t *Tracker) rename(d *delta, came, went []named, at time.Time) {
	w := t.watch
	for _, n := range went {
		w.changed(t.fs, n, false)
	}
	for _, n := range came {
		w.changed(t.fs, n, true)
	}
	if w.redo || d == nil {
		w.resolve(t.fs)
	}
	was := t.watched.Load()
	touched := w.touched
	w.touched = map[string]uint32{}
	dirty := len(touched) > 0 || d == nil
	if d != nil {
		for number := range d.twins {
			_, watched := was.files[number]
			dirty = dirty || watched
		}
	}
	if !dirty {
		return
	}
	now := t.publish(was, d, touched)
	t.report(touched, came, went, at, d == nil)
	t.compare(was, now, at)
	t.inlineWritten(now, d)
}

// rewatch resolves all watches after the index was built, fast commits included, and reports what is different from
// before. What is there at the attach is no change.
func (t *Tracker) rewatch(again bool) {
	was, bound := &watchSet{}, maps.Clone(t.watch.bound)
	if again {
		was = t.watched.Load()
	}
	t.watched.Store(was)
	t.quiet = true
	t.rename(nil, nil, nil, time.Time{})
	t.followFast()
	t.quiet = false
	if !again {
		return
	}
	touched := map[string]uint32{}
	for p := range t.watch.bound {
		touched[p] = bound[p]
	}
	for p, inode := range bound {
		touched[p] = inode
	}
	t.report(touched, nil, nil, time.Time{}, true)
	t.compare(was, t.watched.Load(), time.Time{})
	if t.fs.log == nil {
		t.bindWatched()
	}
}

// bindWatched does for a file system without a journal what a commit does: it finds the owner of what was written.
func (t *Tracker) bindWatched() {
	for _, number := range slices.Sorted(maps.Keys(t.watched.Load().files)) {
		i, err := t.fs.inode(number)
		if err != nil || !i.isRegular() {
			continue
		}
		m := mapper{v: t.view(), budget: 1 << 16, visit: func(s span) error {
			t.bind(owned{ownerOf(i, s), s.start, s.n})
			return nil
		}}
		_ = m.inode(i) // a broken map is in Stats
	}
	t.pending.turn()
}

// publish makes the set for the hot path.
func (t *Tracker) publish(was *watchSet, d *delta, touched map[string]uint32) *watchSet {
	stale := map[uint32]bool{}
	for p, inode := range touched {
		stale[inode], stale[t.watch.bound[p]] = true, true
	}
	paths := map[uint32][]string{}
	for p, inode := range t.watch.bound {
		paths[inode] = append(paths[inode], p)
	}
	now := &watchSet{files: make(map[uint32]*watchedFile, len(paths)), inline: map[uint64][]uint32{}}
	x := t.index.Load()
	for number, list := range paths {
		file := was.files[number]
		changed := d == nil || stale[number]
		if d != nil && !changed {
			_, changed = d.twins[number]
		}
		if file == nil || changed {
			if file = t.watchedFile(number, list, d); file == nil {
				continue
			}
			if x.full {
				t.claim(x, number)
			}
		}
		now.files[number] = file
		if file.block != 0 {
			now.inline[file.block] = append(now.inline[file.block], number)
		}
	}
	t.watched.Store(now)
	return now
}

func (t *Tracker) watchedFile(number uint32, paths []string, d *delta) *watchedFile {
	i, err := t.fs.inode(number)
	if d != nil && d.fast && d.twins[number].new != nil { // not yet in its place
		i, err = d.twins[number].new, nil
	}
	if err != nil {
		return nil
	}
	slices.Sort(paths)
	file := &watchedFile{number: number, paths: paths, size: i.size, mtime: i.mtime, mode: i.mode, uid: i.uid, gid: i.gid, generation: i.generation}
	if i.inline() && i.isRegular() {
		file.block, _, _ = t.fs.place(number)
	}
	return file
}

// claim names the blocks of a watched file even where the index is full.
func (t *Tracker) claim(x *index, number uint32) {
	i, err := t.fs.inode(number)
	if err != nil {
		return
	}
	m := mapper{v: t.view(), budget: 1 << 16, visit: func(s span) error {
		x.set(s.start, s.n, ownerOf(i, s), true)
		return nil
	}}
	_ = m.inode(i) // a broken map leaves the rest unnamed
}

// report tells how watched paths changed their inodes.
func (t *Tracker) report(touched map[string]uint32, came, went []named, at time.Time, rebuilt bool) {
	if t.o.Changed == nil || t.quiet {
		return
	}
	left, found := map[uint32]string{}, map[uint32]string{} // by a path on which something was, or is now
	for p, was := range touched {
		if is := t.watch.bound[p]; is != was {
			left[was], found[is] = max(left[was], p), max(found[is], p)
		}
	}
	to, from := byInode(came), byInode(went)
	for _, p := range slices.Sorted(maps.Keys(touched)) {
		was, is := touched[p], t.watch.bound[p]
		c := Change{Path: p, Inode: is, Time: at}
		switch {
		case was == is:
			continue
		case is == 0:
			c.Inode, c.What = was, "removed"
			if p := cmp.Or(t.entryPath(to, was), found[was]); p != "" {
				c.What, c.Detail = "renamed", "to "+p
			}
		default:
			c.What = "created"
			if p := cmp.Or(t.entryPath(from, is), left[is]); p != "" {
				c.What, c.Detail = "renamed", "from "+p
			}
			if was != 0 {
				c.Detail = strings.TrimPrefix(c.Detail+fmt.Sprintf(", in place of inode %d", was), ", ")
			}
		}
		if rebuilt {
			c.Detail = strings.TrimPrefix(c.Detail+", found by a rebuild of the index", ", ")
		}
		t.o.Changed(c)
	}
}

func byInode(list []named) map[uint32]named {
	m := make(map[uint32]named, len(list))
	for _, n := range slices.Backward(list) {
		m[n.inode] = n
	}
	return m
}

func (t *Tracker) entryPath(list map[uint32]named, inode uint32) string {
	n, ok := list[inode]
	if !ok {
		return ""
	}
	dir, err := t.fs.dirPath(t.view(), t.parents, n.dir)
	if err != nil {
		dir = "?"
	}
	return dir + "/" + n.name
}

// compare tells which watched files changed, other than in name.
func (t *Tracker) compare(was, now *watchSet, at time.Time) {
	if t.o.Changed == nil || t.quiet {
		return
	}
	for _, number := range slices.Sorted(maps.Keys(now.files)) {
		a, b := was.files[number], now.files[number]
		if a == nil || a == b {
			continue
		}
		if a.generation != b.generation {
			t.tell(b, at, "created", "in place of a deleted file")
			continue
		}
		switch {
		case a.size != b.size:
			t.tell(b, at, "modified", fmt.Sprintf("size %d → %d", a.size, b.size))
		case !a.mtime.Equal(b.mtime):
			t.tell(b, at, "modified", "")
		}
		if a.mode != b.mode {
			t.tell(b, at, "mode", fmt.Sprintf("%04o → %04o", a.mode&0o7777, b.mode&0o7777))
		}
		if a.uid != b.uid || a.gid != b.gid {
			t.tell(b, at, "owner", fmt.Sprintf("%d:%d → %d:%d", a.uid, a.gid, b.uid, b.gid))
		}
	}
}

// inlineWritten reports writes to files whose data lie in their inodes.
func (t *Tracker) inlineWritten(now *watchSet, d *delta) {
	if d == nil || t.quiet {
		return
	}
	for _, block := range slices.Sorted(maps.Keys(now.inline)) {
		for _, number := range now.inline[block] {
			w, changed := d.twins[number]
			if changed && !bytes.Equal(w.old.inlineData(), w.new.inlineData()) {
				t.access(now.files[number], Access{Op: OpWrite, Kind: KindInodes, Bytes: w.new.size, Pending: true, Inline: true})
			}
		}
	}
}

func (t *Tracker) tell(f *watchedFile, at time.Time, what, detail string) {
	for _, p := range f.paths {
		t.o.Changed(Change{Path: p, Inode: f.number, What: what, Detail: detail, Time: at})
	}
}
