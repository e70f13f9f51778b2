package introspect

import (
	"bytes"
	"cmp"
	"encoding/binary"
	"fmt"
	"slices"
)

// Kinds of findings of executable memory.
const (
	KindCodeUnowned  = "code.unowned"  // memory that the kernel may execute, and that belongs to nothing it knows of
	KindCodeWritable = "code.writable" // memory that the kernel may both write and execute
)

// leaf is a stretch of the kernel's address space that it may execute.
type leaf struct {
	va, size uint64
	writable bool
}

// end is the address behind it; of the last page there is, its last byte.
func (l leaf) end() uint64 {
	if end := l.va + l.size; end > l.va || l.size == 0 {
		return end
	}
	return ^uint64(0)
}

const (
	maxTables   = 1 << 17 // of the kernel's page tables that are looked into: 64 GiB in pages of 4 KiB
	maxLeaves   = 1 << 16
	maxUnowned  = 32
	entryBits   = 9
	pteP        = 1 << 0
	pteW        = 1 << 1
	pteU        = 1 << 2
	pteLeaf     = 1 << 7
	pteNoExec   = 1 << 63
	pteFrame    = 0x000f_ffff_ffff_f000
	kernelUpper = 256 // the first entry of the top table that is the kernel's
)

// execWalk goes through the kernel's page tables, every table once: some (espfix) are there thousands of times.
type execWalk struct {
	*Guest
	seen   map[uint64]bool
	leaves []leaf
	page   [5][4096]byte // a table of each level
}

// executable returns all that the kernel's page tables let it execute, by address.
func (g *Guest) executable() ([]leaf, error) {
	w := &execWalk{Guest: g, seen: map[uint64]bool{}}
	err := w.table(g.space.Root(), g.boot.Levels, 0, true)
	return w.leaves, err
}

// table visits a table of a level; writable says whether all above it allow writing.
func (w *execWalk) table(pa uint64, level int, base uint64, writable bool) error {
	key := pa | uint64(level)
	if w.seen[key] {
		return nil
	}
	if len(w.seen) >= maxTables || len(w.leaves) >= maxLeaves {
		return ErrEndless
	}
	w.seen[key] = true
	page := w.page[level-1][:]
	if err := w.meter.ReadPhys(pa, page); err != nil {
		if w.meter.left <= 0 {
			return err
		}
		return nil // not RAM: nothing can be executed by it
	}
	first := 0
	if level == w.boot.Levels {
		first = kernelUpper
	}
	shift := 12 + entryBits*(level-1)
	for i := first; i < 512; i++ {
		e := binary.LittleEndian.Uint64(page[8*i:])
		if e&pteP == 0 || e&pteNoExec != 0 {
			continue
		}
		va := base | uint64(i)<<shift
		if level == w.boot.Levels { // sign extension
			va |= ^uint64(0) << (shift + entryBits)
		}
		if level > 1 && (e&pteLeaf == 0 || level > 3) {
			if err := w.table(e&pteFrame, level-1, va, writable && e&pteW != 0); err != nil {
				return err
			}
			continue
		}
		if e&pteU == 0 {
			w.add(leaf{va: va, size: 1 << shift, writable: writable && e&pteW != 0})
		}
	}
	return nil
}

// add joins what lies side by side.
func (w *execWalk) add(l leaf) {
	if n := len(w.leaves); n > 0 {
		last := &w.leaves[n-1]
		if last.end() == l.va && last.writable == l.writable {
			last.size += l.size
			return
		}
	}
	w.leaves = append(w.leaves, l)
}

// owners says to whom executable memory belongs, in whole pages.
type owners struct {
	*Guest
	code  *codeMap
	packs []leaf // of BPF programs
	spans []leaf // all of these
	real  leaf   // the real-mode code that other CPUs start in
	buf   [4096]byte
}

func (g *Guest) newOwners(m *codeMap, leaves []leaf) *owners {
	o := &owners{Guest: g, code: m}
	o.findPacks(leaves)
	o.findReal()
	o.spread()
	return o
}

// findPacks lists the areas that BPF programs are packed into, as far as they hold what they should.
//
// Programs of sockets' filters and of seccomp are in no list of the kernel's. So each area is looked through by its own
// bitmap: what is free must be breakpoints; what is taken must be programs, each with its size before it, breakpoints,
// and the start that all programs have.
func (o *owners) findPacks(leaves []leaf) {
	head, err1 := o.profile.Symbol("pack_list")
	list, err2 := o.profile.Offset("bpf_prog_pack", "list")
	ptr, err3 := o.profile.Offset("bpf_prog_pack", "ptr")
	bits, err4 := o.profile.Offset("bpf_prog_pack", "bitmap")
	if err1 != nil || err2 != nil || err3 != nil || err4 != nil {
		return
	}
	_ = o.walk(head+o.boot.Slide, func(node uint64) error {
		p, err := o.space.U64(node - list + ptr)
		if err != nil || len(o.packs) >= maxPacks {
			return ErrEndless
		}
		i, exact := slices.BinarySearchFunc(leaves, p, func(l leaf, va uint64) int { return cmp.Compare(l.va, va) })
		if !exact {
			i--
		}
		if i >= 0 && p < leaves[i].end() {
			o.pack(p, min(leaves[i].end(), p+maxPack), node-list+bits)
		}
		return nil
	})
}

const (
	maxPacks  = 1024
	maxPack   = 2 << 20
	packChunk = 64 // bytes that a bit of a pack's bitmap stands for
)

// pack accepts an area page by page, up to the first that is not as it should be.
func (o *owners) pack(start, end, bitmap uint64) {
	taken := func(at uint64) bool {
		n := (at - start) / packChunk
		word, err := o.space.U64(bitmap + n/64*8)
		return err == nil && word>>(n%64)&1 != 0
	}
	at := start
	for at < end {
		if !taken(at) {
			if !o.only(at, packChunk, opInt3) {
				break
			}
			at += packChunk
			continue
		}
		size, err := o.space.U32(at)
		if err != nil || size < packChunk/2 || uint64(size) > end-at || !o.program(at) {
			break
		}
		next := at + (uint64(size)+packChunk-1)&^(packChunk-1)
		for ; at < next && taken(at); at += packChunk {
		}
		if at < next {
			break
		}
	}
	o.packs = append(o.packs, leaf{va: start, size: at&^4095 - start})
}

const opInt3 = 0xcc

// program reports whether a BPF program begins at an address: a size, breakpoints, then ENDBR or the place for the
// function tracer.
func (o *owners) program(at uint64) bool {
	b := o.buf[:256]
	if o.space.Read(at, b) != nil {
		return false
	}
	code := b[4:]
	for len(code) > 0 && code[0] == opInt3 {
		code = code[1:]
	}
	return bytes.HasPrefix(code, []byte{0xf3, 0x0f, 0x1e, 0xfa}) || bytes.HasPrefix(code, []byte{0x0f, 0x1f, 0x44, 0x00, 0x00})
}

// findReal finds the trampoline of real mode, which lies in the first megabyte.
func (o *owners) findReal() {
	at, err1 := o.profile.Symbol("real_mode_header")
	from, err2 := o.profile.Symbol("real_mode_blob")
	to, err3 := o.profile.Symbol("real_mode_blob_end")
	if err1 != nil || err2 != nil || err3 != nil || to < from || to-from > 1<<20 {
		return
	}
	if va, err := o.space.U64(at + o.boot.Slide); err == nil {
		if pa, err := o.space.Translate(va); err == nil && pa < 1<<20 {
			o.real = leaf{va: va, size: (to - from + 4095) &^ 4095}
		}
	}
}

// spread joins all that belongs to somebody to stretches of whole pages, by address.
func (o *owners) spread() {
	o.spans = append(slices.Clone(o.packs), o.real)
	for _, r := range o.code.runs {
		if r.owner != ownerFreed && r.end > r.start {
			start := r.start &^ 4095
			o.spans = append(o.spans, leaf{va: start, size: (r.end+4095)&^4095 - start})
		}
	}
	slices.SortFunc(o.spans, func(a, b leaf) int { return cmp.Compare(a.va, b.va) })
}

// only reports whether n bytes all have one value.
func (o *owners) only(va uint64, n int, c byte) bool {
	b := o.buf[:n]
	return o.space.Read(va, b) == nil && bytes.Count(b, []byte{c}) == n
}

// CheckExecutable reports what the kernel may execute and that belongs to nothing it knows of, and what it may also write.
// pages is how much was looked at.
func (g *Guest) CheckExecutable() (found []Finding, pages int, err error) {
	err = g.view(func() error {
		found, pages = nil, 0
		m, err := g.codeMap()
		if err != nil {
			return err
		}
		leaves, err := g.executable()
		if err != nil {
			return err
		}
		o := g.newOwners(m, leaves)
		for _, l := range leaves {
			pages += int(l.size / 4096)
			if l.writable {
				found = append(found, g.execFinding(KindCodeWritable, l, "the kernel may both write and execute this memory"))
			}
			found = append(found, o.unowned(l)...)
			if len(found) > maxUnowned {
				break
			}
		}
		return nil
	})
	return found, pages, err
}

// unowned tells the stretches of l that belong to nobody.
func (o *owners) unowned(l leaf) []Finding {
	var out []Finding
	free := func(from, to uint64) {
		if from < to && len(out) < maxUnowned {
			out = append(out, o.execFinding(KindCodeUnowned, leaf{va: from, size: to - from},
				"executable memory of the kernel's that is not its text, no module's, and not in its lists of code that it has made"))
		}
	}
	at := l.va
	for _, s := range o.spans {
		if s.va >= l.end() {
			break
		}
		if s.end() > at {
			free(at, s.va)
			at = max(at, s.end())
		}
	}
	free(at, l.end())
	return out
}

func (g *Guest) execFinding(kind string, l leaf, why string) Finding {
	head := make([]byte, maxTextBytes)
	n, _ := g.space.ReadSome(l.va, head)
	note := ""
	if pa, err := g.space.Translate(l.va); err == nil {
		note = fmt.Sprintf("at physical address %#x", pa)
	}
	return Finding{Kind: kind, Subject: fmt.Sprintf("%#x", l.va), Severity: Critical, Detail: fmt.Sprintf("%s: %d bytes", why, l.size),
		Evidence: []Evidence{{Address: l.va, Bytes: head[:n], Note: note}}}
}
