package ext4

import (
	"bytes"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"path"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

func newTracker(tb testing.TB, d *disk, size int64, o Options) *Tracker {
	tb.Helper()
	if o.RebuildDelay == 0 {
		o.RebuildDelay = time.Hour
	}
	w, err := NewTracker(d, Filesystem{Size: size}, o)
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(w.Close)
	return w
}

// A guard may attach at any instant of a guest's life, also to a disk whose journal is dirty.
func TestAttachAnywhere(t *testing.T) {
	for _, name := range traces {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			tr := loadTrace(t, name)
			for part := range 12 {
				d := tr.disk()
				at := len(tr.records) * part / 12
				for _, r := range tr.records[:at] {
					d.apply(r)
				}
				w, err := NewTracker(d, Filesystem{Size: tr.size}, Options{Watch: traceWatch, RebuildDelay: time.Hour})
				if err != nil {
					t.Logf("attached at record %d: %v", at, err) // in the middle of mke2fs or of a resize
					continue
				}
				for _, r := range tr.records[at:] {
					d.play(w, r)
				}
				if err := w.Sync(); err != nil {
					t.Fatal(err)
				}
				sameIndex(t, fmt.Sprintf("attached at record %d", at), w, d)
				w.Close()
			}
		})
	}
}

// Every block of every file that the reader lists must carry that file's name, and reading it must be reported as
// reading that file and nothing else.
func TestNamesAgreeWithTheReader(t *testing.T) {
	for _, name := range traces {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			tr := loadTrace(t, name)
			d := tr.disk()
			var got []Access
			w := newTracker(t, d, tr.size, Options{Watch: []string{"/**"}, Access: func(a Access) { got = append(got, a) }})
			for _, r := range tr.records {
				d.play(w, r)
			}
			if err := w.Sync(); err != nil {
				t.Fatal(err)
			}
			f, err := Open(d, 0, tr.size)
			if err != nil {
				t.Fatal(err)
			}
			files := 0
			walk(t, f, "/", func(name string, i Info) {
				if !i.Mode().IsRegular() {
					return
				}
				files++
				file, err := f.Open(name)
				if err != nil {
					t.Fatal(err)
				}
				for _, s := range file.spans {
					got = nil
					w.Read(int64(s.start)*f.v.bs, int64(s.n)*f.v.bs)
					if len(got) != 1 || got[0].Path != name && !slices.Contains(got[0].Paths, name) || got[0].Bytes != int64(s.n)*f.v.bs {
						t.Fatalf("reading %s at block %d gave %+v", name, s.start, got)
					}
					if _, _, paths := w.Owner(int64(s.start) * f.v.bs); !slices.Contains(paths, name) {
						t.Fatalf("block %d of %s belongs to %q", s.start, name, paths)
					}
				}
				if file.inline != nil && file.size > 0 {
					b, _, _ := f.place(i.Inode)
					got = nil
					w.Read(int64(b)*f.v.bs, f.v.bs)
					if !slices.ContainsFunc(got, func(a Access) bool { return a.Inline && a.Path == name }) {
						t.Fatalf("reading the inode of %s gave %+v", name, got)
					}
				}
			})
			if files < 5 {
				t.Fatalf("only %d files", files)
			}
		})
	}
}

func walk(t *testing.T, f *FS, dir string, visit func(string, Info)) {
	t.Helper()
	list, err := f.ReadDir(dir, 10000)
	if err != nil {
		t.Fatal(err)
	}
	for _, i := range list {
		name := path.Join(dir, i.Name())
		visit(name, i)
		if i.IsDir() {
			walk(t, f, name, visit)
		}
	}
}

// Reading a file's inode or its directory is not reading the file.
func TestMetadataIsNotTheFile(t *testing.T) {
	tr := loadTrace(t, "plain")
	d := tr.disk()
	var got []Access
	w := newTracker(t, d, tr.size, Options{Watch: []string{"/etc/shadow"}, Access: func(a Access) { got = append(got, a) }})
	f := w.fs
	shadow, err := f.Stat("/etc/shadow")
	if err != nil {
		t.Fatal(err)
	}
	block, _, _ := f.place(shadow.Inode)
	w.Read(int64(block)*f.v.bs, f.v.bs)
	etc, _ := f.resolve("/etc", true)
	m := mapper{v: f.v, budget: 9, visit: func(s span) error { w.Read(int64(s.start)*f.v.bs, int64(s.n)*f.v.bs); return nil }}
	if err := m.inode(etc); err != nil {
		t.Fatal(err)
	}
	if len(got) != 0 {
		t.Errorf("reported %+v", got)
	}
	file, _ := f.Open("/etc/shadow")
	w.Read(int64(file.spans[0].start)*f.v.bs+512, 512)
	if len(got) != 1 || got[0].Bytes != 512 || got[0].Path != "/etc/shadow" || got[0].Op != OpRead {
		t.Errorf("reported %+v", got)
	}
	kinds := map[Kind]uint64{}
	for _, c := range w.Counts() {
		kinds[c.Kind] += c.Reads
		if c.Kind == KindData && c.Path != "/etc/shadow" {
			t.Errorf("count %+v", c)
		}
	}
	if kinds[KindInodes] != 1 || kinds[KindDir] != 1 || kinds[KindData] != 1 {
		t.Errorf("counts %v", kinds)
	}
	if rest := w.Counts(); len(rest) != 0 {
		t.Errorf("counts are not reset: %v", rest)
	}
}

// One goroutine writes what the guest wrote; others read at the same time.
func TestConcurrent(t *testing.T) {
	tr := loadTrace(t, "htree")
	d := tr.disk()
	var hits atomic.Int64
	w := newTracker(t, d, tr.size, Options{Watch: traceWatch, Access: func(Access) { hits.Add(1) }, RebuildDelay: time.Millisecond})
	done := make(chan struct{})
	var wg sync.WaitGroup
	for n := range 3 {
		wg.Go(func() {
			rnd := rand.New(rand.NewPCG(1, uint64(n)))
			for {
				select {
				case <-done:
					return
				default:
				}
				w.Read(rnd.Int64N(tr.size), 16384)
				if rnd.IntN(200) == 0 {
					w.Counts()
					w.Stats()
					w.Owner(rnd.Int64N(tr.size))
				}
			}
		})
	}
	for n, r := range tr.records {
		d.play(w, r)
		if n%500 == 0 {
			w.mu.Lock()
			w.markStale("a test")
			w.mu.Unlock()
		}
	}
	close(done)
	wg.Wait()
	if err := w.Sync(); err != nil {
		t.Fatal(err)
	}
	sameIndex(t, "at the end", w, d)
}

// A guest that scribbles over its own disk gets no panic, no endless loop, and the index finds its feet again.
func TestScribble(t *testing.T) {
	for _, name := range []string{"plain", "inline", "ext3", "fast", "journal", "reboot"} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			tr := loadTrace(t, name)
			for seed := range uint64(6) {
				rnd := rand.New(rand.NewPCG(seed, 7))
				d := tr.disk()
				w := newTracker(t, d, tr.size, Options{Watch: traceWatch, Access: func(Access) {}, Changed: func(Change) {}})
				for n, r := range tr.records {
					if r.op == 'W' && rnd.IntN(4) == 0 {
						r.data = slices.Clone(r.data)
						for range 1 + rnd.IntN(4) {
							r.data[rnd.IntN(len(r.data))] ^= byte(1 << rnd.IntN(8))
						}
					}
					d.play(w, r)
					if n%16 == 0 {
						_ = w.Sync() // it may have no file system any more
						w.Counts()
					}
				}
				began := time.Now()
				_ = w.Sync()
				if took := time.Since(began); took > 5*time.Second {
					t.Errorf("a rebuild took %v", took)
				}
				if f, err := Open(d, 0, tr.size); err == nil {
					_, _ = f.ReadDir("/", 100)
				}
			}
		})
	}
}

// A file system that is made anew inside the guest is noticed.
func TestMadeAnew(t *testing.T) {
	a, b := loadTrace(t, "wrap"), loadTrace(t, "nojournal")
	d := a.disk()
	w := newTracker(t, d, a.size, Options{Watch: []string{"/etc/*"}})
	d.play(w, record{op: 'W', off: 0, data: make([]byte, 1<<20)})
	if err := w.Sync(); err == nil || w.Stats().State != "lost" {
		t.Fatalf("%v %+v", err, w.Stats())
	}
	for _, r := range slices.Backward(b.base) {
		r.op = 'W'
		d.play(w, r)
	}
	if err := w.Sync(); err != nil {
		t.Fatal(err)
	}
	if s := w.Stats(); s.State != "current" || s.Journal != "none" || s.Watched != 3 {
		t.Errorf("%+v", s)
	}
}

func TestFullIndexStillFollowsTheWatched(t *testing.T) {
	tr := loadTrace(t, "htree")
	d := tr.disk()
	for _, r := range tr.records {
		d.apply(r)
	}
	var got []Access
	w := newTracker(t, d, tr.size, Options{Watch: []string{"/frag"}, MaxBytes: 4096, Access: func(a Access) { got = append(got, a) }})
	if s := w.Stats(); !strings.Contains(s.Degraded, "full") {
		t.Errorf("%+v", s)
	}
	f, _ := w.fs.Open("/frag")
	for _, s := range f.spans {
		w.Read(int64(s.start)*1024, 1024)
	}
	if len(got) != len(f.spans) {
		t.Errorf("%d of %d reads are named", len(got), len(f.spans))
	}
}

func TestBadWatches(t *testing.T) {
	for _, p := range []string{"", "etc/shadow", "/a/*/b", "/", "/a/../b", "/x*"} {
		if _, err := newWatcher([]string{p}); err == nil {
			t.Errorf("%q was taken", p)
		}
	}
}

// The reader of a disk with a dirty journal sees what was committed, and nothing of it is written to the disk.
func TestDirtyJournal(t *testing.T) {
	tr := loadTrace(t, "reboot")
	d := tr.disk()
	before := bytes.Clone(d.b)
	f, err := Open(d, 0, tr.size)
	if err != nil {
		t.Fatal(err)
	}
	if b, err := f.ReadFile("/home/late/file", 100); err != nil || string(b) != "late\n" {
		t.Errorf("%q %v", b, err)
	}
	if _, err := f.Stat("/etc/shadow-"); err == nil {
		t.Error("/etc/shadow- is still there")
	}
	if b, err := f.ReadFile("/conf/shadow", 100); err != nil || !strings.HasSuffix(string(b), "user2:x:2\n") {
		t.Errorf("%q %v", b, err)
	}
	var pe *fs.PathError
	if _, err := f.ReadFile("/etc/shadow", 3); err == nil || !strings.Contains(err.Error(), "too large") {
		t.Errorf("%v %v", err, pe)
	}
	if !bytes.Equal(before, d.b) {
		t.Error("the disk was written")
	}
}

// The counts of a deleted file keep its name (truncate writes the last block of /var/again once more), also where its inode was given to another since.
func TestCountsOfDeletedFiles(t *testing.T) {
	tr := loadTrace(t, "plain")
	d := tr.disk()
	w := newTracker(t, d, tr.size, Options{})
	for _, r := range tr.records {
		d.play(w, r)
	}
	got := map[string]uint64{}
	for _, c := range w.Counts() {
		got[c.Path] += c.WriteBytes
	}
	for name, want := range map[string]uint64{"/srv/reuse": 40 * 4096, "/var/again": 61 * 4096, "/srv/falloc": 4 * 4096, "/var/old/docs/f8": 8 * 4096} {
		if got[name] != want {
			t.Errorf("%s: %d bytes written, not %d", name, got[name], want)
		}
	}
}
