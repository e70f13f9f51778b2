package introspect

import (
	"bufio"
	"bytes"
	"compress/gzip"
	"encoding/binary"
	"io"
	"os"
	"slices"
	"strings"
	"testing"

	"github.com/ulikunitz/xz"

	"vigia/internal/kernel"
	"vigia/internal/memory"
)

// A recording is the memory that the views read of a real guest, in lines of 64 bytes, and its kernel's profile
// reduced to what they ask for. Gzip of: profile length u64, profile, RAM bytes u64, then lines: address u64, 64 bytes.
//
// To make one: boot a guest, then run TestRecord with VIGIA_TEST_KERNEL, VIGIA_TEST_RAM and VIGIA_RECORD=file.
const lineSize = 64

var recordedSymbols = []string{"_text", "_etext", "linux_banner", "init_task", "init_top_pgt", "__pgtable_l5_enabled",
	"tk_core", "modules", "saved_command_line", "tainted_mask", "total_forks", "__per_cpu_end", "jiffies_64", "panic_cpu"}

var recordedTypes = []string{"task_struct", "signal_struct", "cred", "pid", "mm_struct", "file", "dentry", "mount", "vfsmount",
	"timekeeper", "module", "module_memory", "files_struct", "fdtable", "inode", "socket", "sock", "unix_sock", "unix_address"}

// recorder keeps what is read through it, the first time.
type recorder struct {
	*memory.RAM
	lines map[uint64][]byte
	bulk  map[uint64]bool // lines that were only read as part of much more; nil: no matter
}

func (r *recorder) ReadPhys(pa uint64, b []byte) error {
	for at := pa &^ (lineSize - 1); at < pa+uint64(len(b)); at += lineSize {
		if r.lines[at] == nil {
			line := make([]byte, lineSize)
			if err := r.RAM.ReadPhys(at, line); err != nil {
				return err
			}
			r.lines[at] = line
			if r.bulk != nil && len(b) > 1024 {
				r.bulk[at] = true
			}
		} else if len(b) <= 1024 {
			delete(r.bulk, at)
		}
		lo, hi := max(at, pa), min(at+lineSize, pa+uint64(len(b)))
		copy(b[lo-pa:], r.lines[at][lo-at:hi-at])
	}
	return nil
}

// Window has no pages: every read is to be recorded.
func (r *recorder) Window(f func(memory.Pager) error) error { return f(nil) }

// PeekPhys is not recorded: a search touches all of RAM, and what it finds is read again.
func (r *recorder) PeekPhys(pa uint64, b []byte) error { return r.RAM.PeekPhys(pa, b) }

func TestRecord(t *testing.T) {
	out := os.Getenv("VIGIA_RECORD")
	if out == "" {
		t.Skip("VIGIA_RECORD names no file to record to")
	}
	_, p, m := live(t)
	p, err := p.Reduce(recordedSymbols, recordedTypes)
	if err != nil {
		t.Fatal(err)
	}
	r := &recorder{RAM: m, lines: make(map[uint64][]byte)}
	g, err := Attach(r, p)
	if err != nil {
		t.Fatal(err)
	}
	banner := make([]byte, len(p.Banner()))
	_ = r.ReadPhys(g.boot.Phys+g.link.banner-g.link.text, banner)
	list, err1 := g.Processes()
	_, err2 := g.CPU(nil)
	modules, err3 := g.Modules()
	sockets, err4 := g.Sockets()
	files, err5 := g.Files(0)
	system, err6 := g.System()
	_, _ = g.Panicked()
	t.Log(len(list), len(modules), len(sockets), len(files), system, err1, err2, err3, err4, err5, err6)
	writeRecording(t, out, p, r)
}

func writeRecording(t *testing.T, out string, p *kernel.Profile, r *recorder) {
	t.Helper()
	var buf bytes.Buffer
	z, _ := gzip.NewWriterLevel(&buf, gzip.BestCompression)
	var profile bytes.Buffer
	if err := p.Encode(&profile); err != nil {
		t.Fatal(err)
	}
	size := uint64(0)
	for _, reg := range r.Regions() {
		size += reg.Size
	}
	_ = binary.Write(z, binary.LittleEndian, uint64(profile.Len()))
	_, _ = z.Write(profile.Bytes())
	_ = binary.Write(z, binary.LittleEndian, size)
	var addrs []uint64
	for at := range r.lines {
		addrs = append(addrs, at)
	}
	slices.Sort(addrs)
	for _, at := range addrs {
		if bytes.Equal(r.lines[at], make([]byte, lineSize)) {
			continue
		}
		_ = binary.Write(z, binary.LittleEndian, at)
		_, _ = z.Write(r.lines[at])
	}
	if err := z.Close(); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(out, buf.Bytes(), 0o644); err != nil {
		t.Fatal(err)
	}
	t.Logf("%s: %d lines, profile %d, file %d bytes", out, len(addrs), profile.Len(), buf.Len())
}

// recorded is RAM as a recording has it: what was not recorded reads as zeros.
type recorded struct {
	regions []memory.Region
	lines   map[uint64]*[lineSize]byte
	reads   int // how many there have been
}

func (r *recorded) Regions() []memory.Region { return r.regions }

func (r *recorded) ReadPhys(pa uint64, b []byte) error {
	r.reads++
	in := slices.ContainsFunc(r.regions, func(reg memory.Region) bool {
		return pa >= reg.Phys && pa-reg.Phys < reg.Size && uint64(len(b)) <= reg.Size-(pa-reg.Phys)
	})
	if !in {
		return memory.ErrNoRAM
	}
	for at := pa &^ (lineSize - 1); at < pa+uint64(len(b)); at += lineSize {
		lo, hi := max(at, pa), min(at+lineSize, pa+uint64(len(b)))
		if line := r.lines[at]; line != nil {
			copy(b[lo-pa:hi-pa], line[lo-at:hi-at])
		} else {
			clear(b[lo-pa : hi-pa])
		}
	}
	return nil
}

// clone returns a copy that can be written to.
func (r *recorded) clone() *recorded {
	c := &recorded{regions: r.regions, lines: make(map[uint64]*[lineSize]byte, len(r.lines))}
	for at, line := range r.lines {
		copied := *line
		c.lines[at] = &copied
	}
	return c
}

// load reads a recording from testdata.
func load(t testing.TB, name string) (*recorded, *kernel.Profile) {
	t.Helper()
	f, err := os.Open("testdata/" + name)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	var z io.Reader
	if strings.HasSuffix(name, ".xz") { // xz -9e of what was in the .gz: two thirds of it
		z, err = xz.NewReader(bufio.NewReader(f))
	} else {
		z, err = gzip.NewReader(f)
	}
	if err != nil {
		t.Fatal(err)
	}
	b, err := io.ReadAll(z)
	if err != nil {
		t.Fatal(err)
	}
	return parseRecording(t, b)
}

func parseRecording(t testing.TB, b []byte) (*recorded, *kernel.Profile) {
	t.Helper()
	n := binary.LittleEndian.Uint64(b)
	p, err := kernel.Load(b[8 : 8+n])
	if err != nil {
		t.Fatal(err)
	}
	b = b[8+n:]
	r := &recorded{regions: memory.Q35Layout(binary.LittleEndian.Uint64(b)), lines: make(map[uint64]*[lineSize]byte)}
	for b = b[8:]; len(b) > 0; b = b[8+lineSize:] {
		r.lines[binary.LittleEndian.Uint64(b)] = (*[lineSize]byte)(b[8:])
	}
	return r, p
}
