package ext4

import (
	"bytes"
	"errors"
	"io/fs"
	"path"
	"testing"
	"time"
)

// patched is a real disk with a few bytes changed. A patch is a place (3 bytes, in units of 4), a length (1 byte) and
// the bytes.
func patched(base []byte, patch []byte, from, span int64) *disk {
	d := &disk{b: bytes.Clone(base)}
	eachPatch(patch, from, span, func(r record) { d.apply(r) })
	return d
}

func eachPatch(patch []byte, from, span int64, visit func(record)) {
	for n := 0; len(patch) > 4 && n < 64; n++ {
		at := (int64(patch[0]) | int64(patch[1])<<8 | int64(patch[2])<<16) * 4 % span
		size := min(int(patch[3]), len(patch)-4, int(span-at))
		visit(record{op: 'W', off: from + at, data: patch[4 : 4+size]})
		patch = patch[4+size:]
	}
}

func patch(at int64, b []byte) []byte {
	at /= 4
	return append([]byte{byte(at), byte(at >> 8), byte(at >> 16), byte(len(b))}, b...)
}

// useAll does with a disk all that can be done, within bounds.
func useAll(t *testing.T, d *disk) {
	t.Helper()
	began := time.Now()
	size := int64(len(d.b))
	_, _ = Find(d, size)
	if f, err := Open(d, 0, size); err == nil {
		left := 2000
		visitAll(f, "/", &left)
	} else if !errors.Is(err, ErrNotExt4) && !errors.Is(err, ErrCorrupt) && !errors.As(err, new(ErrUnsupported)) {
		t.Fatalf("an error without a name: %v", err)
	}
	w, err := NewTracker(d, Filesystem{Size: size}, Options{Watch: traceWatch, RebuildDelay: time.Hour})
	if err == nil {
		for off := int64(0); off < size; off += 1 << 20 {
			w.Read(off, 1<<20)
		}
		w.Counts()
		w.Close()
	}
	if took := time.Since(began); took > 10*time.Second {
		t.Fatalf("took %v", took)
	}
}

func visitAll(f *FS, dir string, left *int) {
	list, err := f.ReadDir(dir, 1000)
	if err != nil {
		return
	}
	for _, i := range list {
		if *left--; *left < 0 || len(dir) > 4096 {
			return
		}
		name := path.Join(dir, i.Name())
		switch {
		case i.IsDir():
			visitAll(f, name, left)
		case i.Mode().IsRegular():
			if file, err := f.Open(name); err == nil {
				_, _ = file.ReadAt(make([]byte, 8192), 0)
				_, _ = file.ReadAt(make([]byte, 8192), i.Size()-100)
			}
		case i.Mode()&fs.ModeSymlink != 0:
			_, _ = f.Readlink(name)
			_, _ = f.Stat(name)
		}
	}
}

func FuzzImage(f *testing.F) {
	var bases [][]byte
	for _, name := range []string{"inline", "ext3", "reboot", "bigalloc"} {
		bases = append(bases, loadTrace(f, name).disk().b)
	}
	for n := range bases {
		f.Add(byte(n), []byte{})
		f.Add(byte(n), patch(1024+0x18, []byte{9, 0, 0, 0}))
		f.Add(byte(n), patch(1024+0x28, []byte{0, 0, 0, 0}))
		f.Add(byte(n), patch(2048+8, []byte{1, 0, 0, 0}))
	}
	f.Fuzz(func(t *testing.T, n byte, p []byte) {
		base := bases[int(n)%len(bases)]
		useAll(t, patched(base, p, 0, min(int64(len(base)), 2<<20)))
	})
}

func FuzzSuperblock(f *testing.F) {
	for _, name := range traces {
		f.Add(loadTrace(f, name).disk().b[1024:2048], int64(16<<20))
	}
	f.Fuzz(func(t *testing.T, b []byte, size int64) {
		sb, err := parseSuper(b, size)
		if err != nil {
			return
		}
		if uint64(sb.blocks)*uint64(sb.blockSize) > uint64(size) || sb.groups == 0 || sb.tableBlocks() == 0 || sb.kind() == "" {
			t.Fatalf("%+v", sb)
		}
	})
}

func FuzzDirectory(f *testing.F) {
	for _, name := range []string{"plain", "ext3", "htree"} {
		tr := loadTrace(f, name)
		d := tr.disk()
		for _, r := range tr.records {
			d.apply(r)
		}
		w := newTracker(f, d, tr.size, Options{})
		for b, n := uint64(0), 0; b < w.fs.sb.blocks && n < 8; b++ {
			if o, _ := w.index.Load().at(b); o.kind() == ownDir {
				buf := make([]byte, w.fs.v.bs)
				if w.fs.v.block(b, buf) == nil {
					f.Add(buf, true)
					n++
				}
			}
		}
	}
	f.Fuzz(func(t *testing.T, b []byte, filetype bool) {
		n := 0
		_ = eachEntry(b, filetype, func(e entry) bool {
			if len(e.name) == 0 || len(e.name) > 255 || e.inode == 0 {
				t.Fatalf("%+v", e)
			}
			n++
			return true
		})
		if n > len(b)/8 {
			t.Fatalf("%d entries in %d bytes", n, len(b))
		}
	})
}

func FuzzExtents(f *testing.F) {
	tr := loadTrace(f, "htree")
	d := tr.disk()
	for _, r := range tr.records {
		d.apply(r)
	}
	file, err := Open(d, 0, tr.size)
	if err != nil {
		f.Fatal(err)
	}
	for _, name := range []string{"/frag", "/many", "/etc/passwd"} {
		i, err := file.resolve(name, true)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(i.root(), true)
	}
	f.Fuzz(func(t *testing.T, root []byte, extents bool) {
		raw := make([]byte, 256)
		copy(raw[iBlockOffset:iBlockOffset+iBlockSize], root)
		le.PutUint16(raw, modeRegular)
		if extents {
			le.PutUint32(raw[0x20:], flagExtents)
		}
		spans, blocks := 0, file.v.blocks
		m := mapper{v: file.v, budget: 1000, visit: func(s span) error {
			if spans++; s.start == 0 || s.n == 0 || s.start+s.n > blocks {
				t.Fatalf("%+v", s)
			}
			return nil
		}}
		_ = m.inode(parseInode(12, raw))
		if spans > 1000 {
			t.Fatalf("%d spans", spans)
		}
	})
}

// FuzzJournal changes the log, and lets the guest write it: one without checksums, so that what is in it is believed.
func FuzzJournal(f *testing.F) {
	tr := loadTrace(f, "ext3")
	d := tr.disk()
	probe := newTracker(f, d, tr.size, Options{})
	first, _ := probe.fs.log.place(0)
	from := int64(first) * 1024
	var live []byte
	for n, r := range tr.records {
		d.play(probe, r)
		if probe.fs.log.live && n > 200 {
			live = bytes.Clone(d.b)
			break
		}
	}
	for i := range uint32(24) {
		b := make([]byte, 1024)
		if probe.fs.log.read(i, b) == nil && be.Uint32(b) == journalMagic {
			f.Add(patch(int64(i)*1024, b[:60]), byte(i))
		}
	}
	f.Fuzz(func(t *testing.T, p []byte, more byte) {
		d := &disk{b: bytes.Clone(live)}
		w := newTracker(t, d, tr.size, Options{Watch: traceWatch, Access: func(Access) {}, Changed: func(Change) {}})
		touched := map[int64]bool{}
		eachPatch(p, from, 200<<10, func(r record) {
			d.apply(r)
			for at := r.off &^ 1023; at < r.off+int64(len(r.data)); at += 1024 {
				touched[at] = true
			}
		})
		for at := range touched {
			w.Written(at, bytes.Clone(d.b[at:at+1024]))
		}
		for i := range uint32(more) { // and all commit blocks there are, again
			b := make([]byte, 1024)
			if place, err := w.fs.log.place(i); err == nil && w.fs.log.v.raw(place, b) == nil {
				w.Written(int64(place)*1024, b)
			}
		}
		_ = w.Sync()
		w.Counts()
		w.Close()
	})
}

func FuzzFastCommit(f *testing.F) {
	tr := loadTrace(f, "fastreboot")
	base := tr.disk()
	w := newTracker(f, base, tr.size, Options{Watch: traceWatch})
	for n := uint32(0); n < 8; n++ {
		if _, blocks := w.fs.log.fast(n); blocks > 0 {
			b := make([]byte, 4096)
			_ = w.fs.log.read(w.fs.log.last+1+n, b)
			f.Add(b[:1024])
		}
	}
	before := owners(w.index.Load())
	f.Fuzz(func(t *testing.T, b []byte) {
		var records []fastRecord
		for len(b) >= 4 && len(records) < 1000 {
			n := min(int(le.Uint16(b[2:])), len(b)-4)
			records = append(records, fastRecord{le.Uint16(b) % 10, b[4 : 4+n]})
			b = b[4+n:]
		}
		w := newTracker(t, base, tr.size, Options{Watch: traceWatch})
		w.applyFast(records)
		w.fast.reset()
		w.fast.tooMany = false
		w.followFast()
		if after := owners(w.index.Load()); difference(before, after) != difference(before, before) {
			t.Fatalf("not undone: %s", difference(before, after))
		}
		w.Close()
	})
}

func FuzzFind(f *testing.F) {
	for _, table := range tables {
		f.Add(table.make().b[:8192], int64(64<<20))
	}
	f.Fuzz(func(t *testing.T, b []byte, size int64) {
		found, _ := Find(bytes.NewReader(b), size)
		if len(found) > maxPartitions {
			t.Fatalf("%d partitions", len(found))
		}
		for _, p := range found {
			if p.Offset < 0 || p.Size < 0 || p.Offset+p.Size > max(size, 0) {
				t.Fatalf("%+v on a disk of %d", p, size)
			}
		}
	})
}
