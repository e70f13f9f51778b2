package ext4

import (
	"bytes"
	"encoding/binary"
	"flag"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/klauspost/compress/zstd"
)

// A trace is what a real guest's kernel wrote to a disk: testdata/record.sh makes them with QEMU's blklogwrites driver.
// It is a zstd stream: the disk's size (8 bytes), then records of a letter (B: the disk before; W: a write;
// T: a discard), the offset (8 bytes), the length (4 bytes) and the data (B and W), all little-endian.
type trace struct {
	size    int64
	base    []record
	records []record
}

type record struct {
	op   byte
	off  int64
	n    int64
	data []byte
}

// disk is a volume in memory.
type disk struct {
	mu sync.RWMutex
	b  []byte
}

func (d *disk) ReadAt(p []byte, off int64) (int, error) {
	d.mu.RLock()
	defer d.mu.RUnlock()
	return bytes.NewReader(d.b).ReadAt(p, off)
}

func (d *disk) apply(r record) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if r.op == 'T' {
		clear(d.b[r.off : r.off+r.n])
		return
	}
	copy(d.b[r.off:], r.data)
}

// play makes r on the disk and tells the tracker.
func (d *disk) play(t *Tracker, r record) {
	d.apply(r)
	if r.op == 'T' {
		t.Trimmed(r.off, r.n)
		return
	}
	t.Written(r.off, r.data)
}

func (tr *trace) disk() *disk {
	d := &disk{b: make([]byte, tr.size)}
	for _, r := range tr.base {
		d.apply(r)
	}
	return d
}

func loadTrace(tb testing.TB, name string) *trace {
	tb.Helper()
	f, err := os.Open(filepath.Join("testdata", name+".trace.zst"))
	if err != nil {
		tb.Fatal(err)
	}
	defer f.Close()
	z, err := zstd.NewReader(f)
	if err != nil {
		tb.Fatal(err)
	}
	defer z.Close()
	b, err := io.ReadAll(z)
	if err != nil {
		tb.Fatal(err)
	}
	tr := &trace{size: int64(le.Uint64(b))}
	for b = b[8:]; len(b) > 0; {
		r := record{op: b[0], off: int64(le.Uint64(b[1:])), n: int64(le.Uint32(b[9:]))}
		b = b[13:]
		if r.op != 'T' {
			r.data, b = b[:r.n], b[r.n:]
		}
		if r.op == 'B' {
			tr.base = append(tr.base, r)
		} else {
			tr.records = append(tr.records, r)
		}
	}
	return tr
}

var (
	convert = flag.String("convert", "", "directory with b-NAME.img and d-NAME.log, to be made testdata/NAME.trace.zst")
	update  = flag.Bool("update", false, "write the golden files anew")
)

// TestConvert is the second half of testdata/record.sh.
func TestConvert(t *testing.T) {
	if *convert == "" {
		t.Skip("only for making traces")
	}
	logs, _ := filepath.Glob(filepath.Join(*convert, "d-*.log"))
	for _, l := range logs {
		name := strings.TrimSuffix(strings.TrimPrefix(filepath.Base(l), "d-"), ".log")
		img, err := os.ReadFile(filepath.Join(*convert, "b-"+name+".img"))
		if err != nil {
			t.Fatal(err)
		}
		log, err := os.ReadFile(l)
		if err != nil {
			t.Fatal(err)
		}
		var out bytes.Buffer
		z, _ := zstd.NewWriter(&out, zstd.WithEncoderLevel(zstd.SpeedBestCompression), zstd.WithWindowSize(32<<20))
		_, _ = z.Write(convertLog(img, log))
		z.Close()
		if err := os.WriteFile(filepath.Join("testdata", name+".trace.zst"), out.Bytes(), 0o644); err != nil {
			t.Fatal(err)
		}
	}
}

// convertLog reads the format of dm-log-writes, as QEMU writes it.
func convertLog(img, log []byte) []byte {
	out := binary.LittleEndian.AppendUint64(nil, uint64(len(img)))
	put := func(op byte, off, n int64, data []byte) {
		out = append(out, op)
		out = le.AppendUint64(out, uint64(off))
		out = le.AppendUint32(out, uint32(n))
		out = append(out, data...)
	}
	for at := 0; at < len(img); at += 1024 {
		if b := img[at : at+1024]; !bytes.Equal(b, make([]byte, 1024)) {
			put('B', int64(at), 1024, b)
		}
	}
	entries, sector := le.Uint64(log[16:]), int64(le.Uint32(log[24:]))
	at := sector
	for range entries {
		start, n, flags := int64(le.Uint64(log[at:]))*sector, int64(le.Uint64(log[at+8:]))*sector, le.Uint64(log[at+16:])
		at += sector
		switch {
		case n == 0 || start >= int64(len(img)):
		case flags&4 != 0:
			put('T', start, n, nil)
			continue
		default:
			put('W', start, n, log[at:at+n])
		}
		at += n
	}
	return out
}

var traces = []string{"plain", "wrap", "fast", "journal", "inline", "ext3", "nojournal", "bigalloc", "resize", "htree", "async",
	"reboot", "fastreboot"} // these begin with the dirty journal of a guest that was killed

var traceWatch = []string{"/etc/shadow", "/etc/passwd", "/etc/group", "/home/**", "/srv/*", "/conf/shadow-", "/deep/er/secret"}

// owners lists an index as text.
func owners(x *index) []string {
	var out []string
	var last owner
	for b := uint64(0); b < x.blocks; {
		o, next := x.at(b)
		next = min(next, x.blocks)
		if n := len(out); n == 0 || o != last {
			out = append(out, fmt.Sprintf("%d: %#x", b, o))
		}
		b, last = next, o
	}
	return out
}

func sameIndex(t *testing.T, when string, tr *Tracker, d *disk) {
	t.Helper()
	fresh, err := NewTracker(d, tr.at, tr.o.quiet())
	if err != nil {
		t.Fatalf("%s: %v", when, err)
	}
	a, b := owners(tr.index.Load()), owners(fresh.index.Load())
	if !slices.Equal(a, b) {
		t.Errorf("%s: followed and fresh index differ: %s", when, difference(a, b))
	}
	for number := uint32(1); number <= tr.fs.sb.inodes; number++ {
		p, q := slices.Sorted(slices.Values(tr.parents.of(number))), slices.Sorted(slices.Values(fresh.parents.of(number)))
		if !slices.Equal(p, q) {
			t.Errorf("%s: parents of inode %d: followed %v, fresh %v", when, number, p, q)
			break
		}
	}
	p, q := fmt.Sprint(tr.watch.bound), fmt.Sprint(fresh.watch.bound)
	if p != q {
		t.Errorf("%s: watched: followed %s, fresh %s", when, p, q)
	}
}

func (o Options) quiet() Options {
	o.Access, o.Changed = nil, nil
	return o
}

func difference(a, b []string) string {
	for i := range a {
		if i >= len(b) || a[i] != b[i] {
			return fmt.Sprintf("at %s, not %s", a[i:min(len(a), i+4)], b[min(len(b), i):min(len(b), i+4)])
		}
	}
	return fmt.Sprintf("%d entries, not %d", len(a), len(b))
}

// TestTraces follows what real kernels wrote. After every commit the index must be the one that a look at the whole
// disk gives, and at the end the accesses and changes must be the ones that are written down.
func TestTraces(t *testing.T) {
	for _, name := range traces {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			tr := loadTrace(t, name)
			d := tr.disk()
			var got strings.Builder
			o := Options{Watch: traceWatch, RebuildDelay: 1 << 40,
				Access: func(a Access) {
					fmt.Fprintf(&got, "%s %s %s %d pending=%v inline=%v\n", a.Op, a.Path, a.Kind, a.Bytes, a.Pending, a.Inline)
				},
				Changed: func(c Change) { fmt.Fprintf(&got, "%s %s %d (%s)\n", c.What, c.Path, c.Inode, c.Detail) }}
			w, err := NewTracker(d, Filesystem{Size: tr.size}, o)
			if err != nil {
				t.Fatal(err)
			}
			defer w.Close()
			seen, rebuilds := uint64(0), 0
			for n, r := range tr.records {
				d.play(w, r)
				if s := w.Stats(); s.State != "current" {
					if name != "nojournal" {
						fmt.Fprintf(&got, "rebuild: %s\n", s.Reason)
					}
					rebuilds++
					if err := w.Sync(); err != nil {
						t.Logf("record %d: %v", n, err) // in the middle of a resize
					}
				} else if s.Commits+s.Fast != seen {
					seen = s.Commits + s.Fast
					sameIndex(t, fmt.Sprintf("record %d, commit %d", n, s.Commits), w, d)
				}
				if t.Failed() {
					t.FailNow()
				}
			}
			sameIndex(t, "at the end", w, d)
			s := w.Stats()
			t.Logf("%d records, %d commits, %d fast, %d rebuilds, %v a commit, overlay %d, unbound %d", len(tr.records), s.Commits, s.Fast, rebuilds, s.CommitTime/time.Duration(max(1, s.Commits)), s.Overlay, s.Unbound)
			golden(t, name, got.String())
		})
	}
}

func golden(t *testing.T, name, got string) {
	t.Helper()
	file := filepath.Join("testdata", name+".golden")
	if *update {
		if err := os.WriteFile(file, []byte(got), 0o644); err != nil {
			t.Fatal(err)
		}
		return
	}
	want, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	if got != string(want) {
		t.Errorf("events differ: %s", difference(strings.Split(got, "\n"), strings.Split(string(want), "\n")))
	}
}
