package ext4

import (
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"testing"
	"time"
)

// million is a file system with a million files in a thousand directories, each file with one block and a hole behind it. The
// layout is mke2fs's; inodes and directories are made up as they are read.
type million struct {
	base   *os.File
	fs     *FS
	tables map[uint64]uint32 // block of an inode table → its first inode
}

const (
	millionDirs  = 1024
	millionFiles = 1000 // in each
	dirBlocks    = 6
	firstDir     = 100
	firstFile    = 2000
	filesAt      = 200_000          // block
	dirsAt       = 2*32768 + 20_000 // in the third group, behind its inode table
	rootAt       = dirsAt - 8
)

func makeMillion(t *testing.T) *million {
	t.Helper()
	path, err := exec.LookPath("mke2fs")
	if err != nil {
		t.Skip("no mke2fs: install e2fsprogs")
	}
	image := filepath.Join(t.TempDir(), "disk")
	if out, err := exec.Command(path, "-q", "-F", "-t", "ext4", "-b", "4096", "-I", "256", "-N", "1200000", "-O", "^metadata_csum,^uninit_bg,^flex_bg,^has_journal,^dir_index",
		"-E", "lazy_itable_init=1", image, "12G").CombinedOutput(); err != nil {
		t.Fatalf("mke2fs: %v: %s", err, out)
	}
	f, err := os.Open(image)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	m := &million{base: f, tables: map[uint64]uint32{}}
	if m.fs, err = Open(f, 0, 12<<30); err != nil {
		t.Fatal(err)
	}
	for g, gr := range m.fs.groups {
		for b := range m.fs.sb.tableBlocks() {
			m.tables[gr.inodeTable+b] = uint32(g)*m.fs.sb.inodesPerGroup + uint32(b)*16 + 1
		}
	}
	return m
}

func (m *million) ReadAt(p []byte, off int64) (int, error) {
	for at := 0; at < len(p); {
		pos := off + int64(at)
		var block [4096]byte
		if err := m.block(uint64(pos/4096), block[:]); err != nil {
			return at, err
		}
		at += copy(p[at:], block[pos%4096:])
	}
	return len(p), nil
}

func (m *million) block(n uint64, b []byte) error {
	switch {
	case m.tables[n] != 0:
		for i := range 16 {
			m.inode(m.tables[n]+uint32(i), b[256*i:256*i+256])
		}
		return nil
	case n >= rootAt && n < rootAt+8:
		entriesOf(b, int(n-rootAt)*128, 128, millionDirs, func(i int) (uint32, string, byte) { return firstDir + uint32(i), fmt.Sprintf("d%04d", i), 2 })
		return nil
	case n >= dirsAt && n < dirsAt+millionDirs*dirBlocks:
		d, part := int(n-dirsAt)/dirBlocks, int(n-dirsAt)%dirBlocks
		entriesOf(b, part*200, 200, millionFiles, func(i int) (uint32, string, byte) {
			return firstFile + uint32(d*millionFiles+i), fmt.Sprintf("file-%04d", i), 1
		})
		return nil
	}
	_, err := m.base.ReadAt(b, int64(n)*4096)
	if err == io.EOF {
		err = nil
	}
	return err
}

// inode makes an inode with one extent.
func (m *million) inode(number uint32, b []byte) {
	mode, at, n := uint16(0o100644), uint64(0), uint64(1)
	switch i := int(number); {
	case i == rootInode:
		mode, at, n = 0o40755, rootAt, 8
	case i >= firstDir && i < firstDir+millionDirs:
		mode, at, n = 0o40755, uint64(dirsAt+(i-firstDir)*dirBlocks), dirBlocks
	case i >= firstFile && i < firstFile+millionDirs*millionFiles:
		at = uint64(filesAt + 2*(i-firstFile))
	default:
		return
	}
	le.PutUint16(b, mode)
	le.PutUint32(b[4:], uint32(n*4096))
	le.PutUint16(b[0x1A:], 1)
	le.PutUint32(b[0x20:], 0x80000) // EXTENTS_FL
	e := b[0x28:]
	le.PutUint16(e, 0xF30A)
	le.PutUint16(e[2:], 1)
	le.PutUint16(e[4:], 4)
	le.PutUint16(e[12+4:], uint16(n))
	le.PutUint32(e[12+8:], uint32(at))
}

// entriesOf fills one block of a directory with the entries from first on.
func entriesOf(b []byte, first, most, all int, give func(int) (uint32, string, byte)) {
	last := 0
	at := 0
	for i := first; i < min(first+most, all); i++ {
		inode, name, kind := give(i)
		size := (8 + len(name) + 3) &^ 3
		le.PutUint32(b[at:], inode)
		le.PutUint16(b[at+4:], uint16(size))
		b[at+6], b[at+7] = byte(len(name)), kind
		copy(b[at+8:], name)
		last, at = at, at+size
	}
	le.PutUint16(b[last+4:], uint16(4096-last)) // to the block's end; an empty block is one unused entry
}

// TestAMillionFiles builds the index of a file system with a million files whose blocks lie apart, which is the worst for it.
// Its memory keeps to its bound, what is watched is named, and so is what has a place in the index; the rest is not, and that is said.
func TestAMillionFiles(t *testing.T) {
	if testing.Short() {
		t.Skip("it reads inode tables of 300 MB")
	}
	m := makeMillion(t)
	before := heap()
	began := time.Now()
	var seen []Access
	const watched = "/d1000/file-0999"
	tr, err := NewTracker(m, Filesystem{Kind: "ext4", Size: 12 << 30}, Options{Watch: []string{watched}, Access: func(a Access) { seen = append(seen, a) }})
	if err != nil {
		t.Fatal(err)
	}
	defer tr.Close()
	took, used := time.Since(began), heap()-before
	stats := tr.Stats()
	t.Logf("%s, %d MiB of heap, %+v", took.Round(time.Millisecond), used>>20, stats)
	if used > 24<<20 {
		t.Errorf("it takes %d MiB, the bound is 16 and what is found at the side", used>>20)
	}
	tr.Read((filesAt+2*(1000*millionFiles+999))*4096, 4096)
	if len(seen) != 1 || seen[0].Path != watched {
		t.Errorf("the watched file's last block is read: %v", seen)
	}
	if stats.Degraded == "" {
		tr.Read(filesAt*4096, 4096)
		if c := tr.Counts(); len(c) == 0 {
			t.Error("an unwatched file's block has no name")
		}
	}
}

func heap() int64 {
	runtime.GC()
	runtime.GC()
	var s runtime.MemStats
	runtime.ReadMemStats(&s)
	return int64(s.HeapAlloc)
}
