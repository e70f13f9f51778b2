package volume

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"hash/crc32"
	"io"
)

// This file reads a layer by doc/volume-format.md alone. It shares no code with what opens and writes layers, not even
// the sizes, so that a mistake there is not repeated here.

// Finding is one thing wrong with a layer.
type Finding struct {
	What   string // a short stable name: "header", "geometry", "map-page", …
	Where  int64  // offset in the file
	Detail string
}

func (f Finding) String() string { return fmt.Sprintf("%s at %d: %s", f.What, f.Where, f.Detail) }

// Report is what Check found out about a layer.
type Report struct {
	ID, Parent ID
	Size       int64 // of the disk
	Frozen     bool
	ContentID  bool
	Encrypted  bool
	Generation uint64
	Data, Zero int64 // blocks the layer has, and has as zeros
	Records    int   // in the log
	LogBytes   int64 // that they take
	// Damage is what is wrong; none means that the layer is sound. Notes are traces of a crash that do no harm.
	Damage, Notes []Finding
}

// Sound says that nothing is wrong.
func (r Report) Sound() bool { return len(r.Damage) == 0 }

const maxFindings = 1000

// Check reads the whole structure of a layer, of which size bytes exist, and names every damage. Its error is about
// reading: a file that can be read and makes no sense gives a report. It does not read the data; Verify does.
func Check(layer io.ReaderAt, size int64) (Report, error) {
	c := checker{r: layer, size: size}
	err := c.run()
	if c.ioErr != nil {
		err = c.ioErr
	}
	return c.rep, err
}

type checker struct {
	r     io.ReaderAt
	size  int64
	rep   Report
	ioErr error

	headerAt         int64
	logAt, logLen    int64
	mapAt            [2]int64
	pages, chunks    int64
	dataAt           int64
	which, wantedSum uint32
	states           map[int64][]byte // by chunk: 128 bytes
}

func (c *checker) damage(what string, where int64, format string, a ...any) {
	if len(c.rep.Damage) < maxFindings {
		c.rep.Damage = append(c.rep.Damage, Finding{what, where, fmt.Sprintf(format, a...)})
	}
}

func (c *checker) note(what string, where int64, format string, a ...any) {
	if len(c.rep.Notes) < maxFindings {
		c.rep.Notes = append(c.rep.Notes, Finding{what, where, fmt.Sprintf(format, a...)})
	}
}

// bytes reads n bytes at off; what lies beyond the file's end is nil.
func (c *checker) bytes(off, n int64) []byte {
	if off < 0 || n > c.size || off > c.size-n || c.ioErr != nil {
		return nil
	}
	b := make([]byte, n)
	if k, err := c.r.ReadAt(b, off); k < len(b) {
		c.ioErr = fmt.Errorf("check layer: read %d bytes at %d: %w", n, off, err)
		return nil
	}
	return b
}

func (c *checker) run() error {
	if !c.header() {
		return nil
	}
	c.states = map[int64][]byte{}
	c.mapArea()
	if c.rep.Frozen {
		c.frozenLog()
	} else {
		c.log()
	}
	c.count()
	return nil
}

// crcOK compares the CRC-32C of b with sum.
func crcOK(b []byte, sum uint32) bool {
	return crc32.Checksum(b, crc32.MakeTable(crc32.Castagnoli)) == sum
}

func allZero(b []byte) bool {
	for _, x := range b {
		if x != 0 {
			return false
		}
	}
	return true
}

// header finds the newer good one of the two slots and checks every field of it.
func (c *checker) header() bool {
	var best []byte
	for slot := range int64(2) {
		b := c.bytes(slot*4096, 4096)
		switch {
		case b == nil:
			if c.ioErr == nil {
				c.damage("short-file", c.size, "the file ends inside header slot %d", slot)
			}
			return false
		case !crcOK(b[:4092], binary.LittleEndian.Uint32(b[4092:])):
			c.note("header-slot", slot*4096, "slot %d has a wrong checksum: the write of it was cut off, or it was damaged later", slot)
			continue
		}
		switch gen := binary.LittleEndian.Uint64(b[16:]); {
		case best == nil || gen > c.rep.Generation:
			if best != nil {
				c.note("header-slot", 0, "slot 0 is older than slot 1: the writing of it was cut off")
			}
			best, c.rep.Generation, c.headerAt = b, gen, slot*4096
		case gen < c.rep.Generation:
			c.note("header-slot", 4096, "slot 1 is older than slot 0: the writing of it was cut off")
		case !bytes.Equal(b, best):
			c.damage("header-slot", 4096, "the slots differ, though both are of generation %d", gen)
		}
	}
	if best == nil {
		c.damage("header", 0, "neither header slot has a right checksum")
		return false
	}
	return c.fields(best)
}

func (c *checker) fields(b []byte) bool {
	le := binary.LittleEndian
	at := c.headerAt
	if string(b[:8]) != "VIGIAVOL" {
		c.damage("magic", at, "%q is not a layer's", b[:8])
		return false
	}
	if v := le.Uint32(b[8:]); v != 1 {
		c.damage("version", at+8, "%d is not known here", v)
		return false
	}
	copy(c.rep.ID[:], b[24:56])
	copy(c.rep.Parent[:], b[56:88])
	c.rep.Size = int64(le.Uint64(b[88:]))
	c.rep.Frozen = le.Uint32(b[96:]) == 2
	c.rep.ContentID = le.Uint32(b[100:])&1 != 0
	c.rep.Encrypted = le.Uint32(b[168:]) != 0
	c.logAt, c.logLen = int64(le.Uint64(b[112:])), int64(le.Uint64(b[120:]))
	c.mapAt = [2]int64{int64(le.Uint64(b[128:])), int64(le.Uint64(b[136:]))}
	c.pages, c.dataAt = int64(le.Uint64(b[144:])), int64(le.Uint64(b[160:]))
	c.which, c.wantedSum = le.Uint32(b[152:]), le.Uint32(b[156:])
	if c.rep.Generation == 0 {
		c.damage("generation", at+16, "is 0")
	}
	if c.rep.ID.IsZero() {
		c.damage("id", at+24, "is empty")
	}
	if s := le.Uint32(b[96:]); s != 1 && s != 2 {
		c.damage("state", at+96, "%d is neither writable (1) nor frozen (2)", s)
	}
	if le.Uint32(b[100:])&^1 != 0 {
		c.damage("flags", at+100, "%#x has bits that are not known here", le.Uint32(b[100:]))
	}
	if k := le.Uint32(b[168:]); k > 1 {
		c.damage("cipher", at+168, "%d is not known here", k)
	}
	if !allZero(b[172:176]) || !allZero(b[208:4092]) {
		c.damage("reserved", at+172, "reserved bytes of the header are not zero")
	}
	return c.geometry(at, b)
}

// geometry works out where everything has to be from the disk's size, and compares.
func (c *checker) geometry(at int64, b []byte) bool {
	size := c.rep.Size
	if size <= 0 || size%512 != 0 || size > 4<<40 {
		c.damage("size", at+88, "a disk of %d bytes", size)
		return false
	}
	ceil := func(a, b int64) int64 { return (a + b - 1) / b }
	c.chunks = ceil(size, 2<<20)
	pages := ceil(c.chunks, 31)
	logLen := max(1<<20, pages*4096)
	live := 4096 + ceil(c.chunks*128, 4096)*4096
	data := ceil(8192+logLen+2*pages*4096+live, 1<<20) << 20
	le := binary.LittleEndian
	ok := true
	for _, f := range []struct {
		name      string
		off       int64
		got, want int64
	}{
		{"header size", 12, int64(le.Uint32(b[12:])), 4096}, {"block size", 104, int64(le.Uint32(b[104:])), 4096},
		{"chunk blocks", 108, int64(le.Uint32(b[108:])), 512}, {"log offset", 112, c.logAt, 8192}, {"log size", 120, c.logLen, logLen},
		{"map 0 offset", 128, c.mapAt[0], 8192 + logLen}, {"map 1 offset", 136, c.mapAt[1], 8192 + logLen + pages*4096},
		{"map pages", 144, c.pages, pages}, {"data offset", 160, c.dataAt, data},
	} {
		if f.got != f.want {
			c.damage("geometry", at+f.off, "%s is %d, a disk of %d bytes has %d", f.name, f.got, size, f.want)
			ok = false
		}
	}
	if c.which > 1 {
		c.damage("map-number", at+152, "%d is neither 0 nor 1", c.which)
		ok = false
	}
	if want := data + ceil(size, 4096)*4096; c.size < want {
		c.damage("short-file", c.size, "the file should be %d bytes long: data at its end is gone", want)
		ok = ok && c.size >= data
	}
	return ok
}

// mapArea reads the map in use, page by page.
func (c *checker) mapArea() {
	sum := uint32(0)
	for p := range c.pages {
		at := c.mapAt[c.which] + p*4096
		b := c.bytes(at, 4096)
		if c.ioErr != nil {
			return
		}
		if allZero(b) {
			continue
		}
		le := binary.LittleEndian
		crc := le.Uint32(b[4092:])
		var bind [12]byte
		le.PutUint64(bind[:], uint64(p))
		le.PutUint32(bind[8:], crc)
		sum = crc32.Update(sum, crc32.MakeTable(crc32.Castagnoli), bind[:])
		switch {
		case !crcOK(b[:4092], crc):
			c.damage("map-page", at, "page %d has a wrong checksum: what it says of blocks %d to %d is lost", p, p*31*512, (p+1)*31*512-1)
			continue
		case string(b[3968:3972]) != "VMAP" || le.Uint64(b[3976:]) != uint64(p) || !allZero(b[3972:3976]) || !allZero(b[3992:4092]):
			c.damage("map-page", at, "page %d is not labelled as that page", p)
			continue
		}
		if g := le.Uint64(b[3984:]); g != c.rep.Generation {
			c.damage("map-page", at, "page %d is of generation %d, the header of %d", p, g, c.rep.Generation)
		}
		for i := range int64(31) {
			c.chunk(p*31+i, b[i*128:(i+1)*128], at+i*128)
		}
	}
	if sum != c.wantedSum {
		c.damage("map-sum", c.mapAt[c.which], "the pages' checksums do not add up to the header's: a page is lost or of another time")
	}
}

// chunk takes over what is said of one chunk, after checking it.
func (c *checker) chunk(n int64, states []byte, at int64) {
	if n >= c.chunks {
		if !allZero(states) {
			c.damage("beyond-end", at, "states of chunk %d, the disk has %d", n, c.chunks)
		}
		return
	}
	last := (c.rep.Size + 4095) / 4096
	for i := range int64(512) {
		switch s := states[i/4] >> (2 * (i % 4)) & 3; {
		case s == 3:
			c.damage("block-state", at+i/4, "block %d has the unknown state 3", n*512+i)
		case s != 0 && n*512+i >= last:
			c.damage("beyond-end", at+i/4, "block %d has a state, the disk has %d blocks", n*512+i, last)
		}
	}
	if !allZero(states) || c.states[n] != nil {
		c.states[n] = append([]byte(nil), states...)
	}
}

// log follows the records until the first that does not belong.
func (c *checker) log() {
	at := int64(0)
	for seq := uint64(0); at+4096 <= c.logLen; seq++ {
		n := c.record(at, seq)
		if n == 0 {
			break
		}
		at += n
		c.rep.Records++
	}
	c.rep.LogBytes = at
	c.strays(at)
}

// record applies the record at an offset of the log and returns its length, 0 if there is none.
func (c *checker) record(at int64, seq uint64) int64 {
	le := binary.LittleEndian
	b := c.bytes(c.logAt+at, 4096)
	if b == nil || string(b[:4]) != "VLOG" || le.Uint64(b[8:]) != c.rep.Generation || le.Uint64(b[16:]) != seq {
		return 0
	}
	n := int64(le.Uint32(b[24:]))
	size := (32 + n*132 + 4095) / 4096 * 4096
	if n == 0 || n > c.chunks || size > c.logLen-at {
		c.note("log-tail", c.logAt+at, "record %d claims %d chunks", seq, n)
		return 0
	}
	if b = c.bytes(c.logAt+at, size); b == nil {
		return 0
	}
	if !crcOK(b[8:], le.Uint32(b[4:])) {
		c.note("log-tail", c.logAt+at, "record %d was cut off: the flush that wrote it never ended", seq)
		return 0
	}
	if !allZero(b[28:32]) || !allZero(b[32+n*132:]) {
		c.damage("reserved", c.logAt+at+28, "reserved bytes of record %d are not zero", seq)
	}
	for i := range n {
		e := b[32+i*132:]
		c.chunk(int64(le.Uint32(e)), e[4:132], c.logAt+at+32+i*132)
	}
	return size
}

// strays looks behind the log's end for records of this generation: one that is whole means that a record before it,
// which was durable, is lost.
func (c *checker) strays(end int64) {
	le := binary.LittleEndian
	for at := end; at+4096 <= c.logLen; at += 4096 {
		b := c.bytes(c.logAt+at, 4096)
		if b == nil || string(b[:4]) != "VLOG" || le.Uint64(b[8:]) != c.rep.Generation || le.Uint64(b[16:]) <= uint64(c.rep.Records) {
			continue
		}
		n := int64(le.Uint32(b[24:]))
		size := (32 + n*132 + 4095) / 4096 * 4096
		if n == 0 || n > c.chunks || size > c.logLen-at {
			continue
		}
		if r := c.bytes(c.logAt+at, size); r != nil && crcOK(r[8:], le.Uint32(r[4:])) {
			c.damage("log-gap", c.logAt+end, "record %d is gone, yet record %d lies behind it: flushed writes are lost", c.rep.Records, le.Uint64(b[16:]))
			return
		}
	}
}

// frozenLog makes sure that a frozen layer's log says nothing: records of the generation in force would count.
func (c *checker) frozenLog() {
	b := c.bytes(c.logAt, 4096)
	if b != nil && string(b[:4]) == "VLOG" && binary.LittleEndian.Uint64(b[8:]) == c.rep.Generation {
		c.damage("frozen-log", c.logAt, "a frozen layer has a log record of its own generation")
	}
}

func (c *checker) count() {
	for _, st := range c.states {
		for _, s := range st {
			for k := range 4 {
				switch s >> (2 * k) & 3 {
				case 1:
					c.rep.Data++
				case 2:
					c.rep.Zero++
				}
			}
		}
	}
}

// CheckChain compares the reports of a chain's layers, the lowest first: each must lie over the one before it, all but
// the last must be frozen, unless a swap was cut off, and none may be smaller than what is below it. What it finds is added to the
// reports.
func CheckChain(reps []Report) {
	var below *Report
	seen := map[ID]bool{}
	for i := range reps {
		r := &reps[i]
		add := func(what, format string, a ...any) {
			r.Damage = append(r.Damage, Finding{what, 0, fmt.Sprintf(format, a...)})
		}
		switch {
		case below == nil && !r.Parent.IsZero():
			add("parent", "lies over layer %.12s, which is missing", r.Parent)
		case below != nil && r.Parent != below.ID:
			add("parent", "lies over layer %.12s, but below it is %.12s", r.Parent, below.ID)
		}
		if below != nil && r.Size < below.Size {
			add("size", "a disk of %d bytes over one of %d", r.Size, below.Size)
		}
		switch {
		case r.Frozen || i == len(reps)-1:
		case i == len(reps)-2 && !reps[i+1].Frozen:
			r.Notes = append(r.Notes, Finding{"swap", 0, "is not frozen yet under its overlay: whoever opens the volume next ends that"})
		default:
			add("state", "is writable, yet another layer lies over it")
		}
		if seen[r.ID] {
			add("id", "layer %.12s occurs twice", r.ID)
		}
		seen[r.ID] = true
		below = r
	}
}
