package kernel

import (
	"encoding/binary"
	"fmt"
	"io"
	"os"
	"sort"

	"golang.org/x/sys/unix"
)

// Reference is what a kernel's code and read-only data are before it runs: the bytes of the kernel file, which of them
// move with KASLR, and every place that the kernel itself writes over. It is made from the kernel file alone, and lies
// in one flat file (doc/reference-format.md) that is mapped: what it costs while nobody looks at it is nothing.
//
// All addresses are link addresses.
type Reference struct {
	data   []byte
	s      [refCount][]byte
	head   refHead
	mapped bool
	sound  bool // Verify has found it so
}

// SiteKind is the sort of a place that the kernel writes over in its own code. Package patch knows what may stand there.
type SiteKind uint8

// The sorts of places, in the order in which the kernel writes them.
const (
	SiteRetpoline   SiteKind = 1 + iota // an indirect call or jump; Aux: the register
	SiteReturn                          // a return
	SiteParavirt                        // A: where the pointer to the function is that is called
	SiteAlternative                     // A: the first of Aux Alternatives
	SiteEndbr                           // ENDBR that is sealed
	SiteLock                            // a LOCK prefix
	SiteStatic                          // a static call; A: its key; Aux: StaticTail, StaticTrampoline
	SiteJump                            // a jump label; A: where it jumps
	SiteFtrace                          // the call at a function's start
	SitePointer                         // a constant of 8 bytes put in at boot; A: the variable it is a copy of
	SiteShift                           // a constant of 1 byte put in at boot; A: the variable
	SiteEmpty                           // a module's reference to a section of its own without bytes; Aux: EmptyRelative
)

// Bits of a static call's Aux.
const (
	StaticTail       = 1 // a jump, not a call
	StaticTrampoline = 2 // the trampoline, not a place that calls
)

// EmptyRelative is the Aux of a SiteEmpty that counts from itself.
const EmptyRelative = 1

// ConstantUnnamed is the Aux of a constant whose variable has no name: USER_PTR_MAX.
const ConstantUnnamed = 1

// Site is a place that the kernel writes over.
type Site struct {
	Addr uint64
	A    uint64
	Len  int
	Aux  uint16
	Kind SiteKind
}

// Alternative is one entry of .altinstructions: where a CPU feature decides between two pieces of code.
type Alternative struct {
	Addr, Replacement   uint64
	Feature             uint16
	Not, DirectCall     bool
	Len, ReplacementLen int
}

// Segment is a run of a kernel's or a module's bytes.
type Segment struct {
	Addr uint64
	Data []byte
}

// End is the address behind it.
func (s Segment) End() uint64 { return s.Addr + uint64(len(s.Data)) }

// RelocKind is how a place moves with KASLR.
type RelocKind uint8

// Kinds of relocations.
const (
	RelocAbs64 RelocKind = iota // 8 bytes, plus the slide
	RelocAbs32                  // 4 bytes, plus the slide
	RelocNeg32                  // 4 bytes, less the slide: relative to a place that does not move
)

const (
	refMagic   = "vigiaref"
	refVersion = 1
	maxRef     = 256 << 20
)

// The sections of the file.
const (
	refSecHead = iota + 1
	refSecBanner
	refSecText
	refSecRodata
	refSecReplacement
	refSecRelocs
	refSecSites
	refSecAlternatives
	refCount
)

const (
	siteRecord = 16
	altRecord  = 16
	headRecord = 8 * 8
)

// refHead are the addresses of the parts.
type refHead struct {
	base                    uint64 // _text; offsets count from here
	rodata                  uint64
	afterInit, afterInitEnd uint64 // within rodata: written until the boot is done
	jumps, jumpsEnd         uint64 // within that: jump_table, whose order changes
	replacement             uint64
	flags                   uint64
}

const refNewAlternatives = 1 // alternatives have flags: Linux 6.4 and later

var refRecordSize = [refCount]int{refSecHead: headRecord, refSecBanner: 1, refSecText: 1, refSecRodata: 1, refSecReplacement: 1,
	refSecRelocs: 4, refSecSites: siteRecord, refSecAlternatives: altRecord}

// LoadReference makes a reference of the bytes that Encode wrote. It keeps b.
func LoadReference(b []byte) (*Reference, error) {
	s, err := refFormat.unpack(b)
	if err != nil {
		return nil, err
	}
	r := &Reference{data: b}
	copy(r.s[:], s)
	if len(r.s[refSecHead]) != headRecord {
		return nil, fmt.Errorf("%w: it has no head", ErrReference)
	}
	h := r.s[refSecHead]
	for i, p := range r.head.fields() {
		*p = binary.LittleEndian.Uint64(h[8*i:])
	}
	return r, r.check()
}

func (h *refHead) fields() [8]*uint64 {
	return [...]*uint64{&h.base, &h.rodata, &h.afterInit, &h.afterInitEnd, &h.jumps, &h.jumpsEnd, &h.replacement, &h.flags}
}

// check makes sure that no part wraps round.
func (r *Reference) check() error {
	for _, s := range []Segment{r.Text(), r.Rodata(), r.Replacement()} {
		if s.End() < s.Addr || s.Addr < r.head.base || s.End()-r.head.base > maxVmlinux {
			return fmt.Errorf("%w: a part at %#x", ErrReference, s.Addr)
		}
	}
	return nil
}

// OpenReference maps the reference in f, which may be closed afterwards. Before it is first used it is to be verified.
func OpenReference(f *os.File) (*Reference, error) {
	st, err := f.Stat()
	if err != nil {
		return nil, fmt.Errorf("open reference: %w", err)
	}
	if st.Size() < headerSize || st.Size() > maxRef {
		return nil, fmt.Errorf("%w: %d bytes", ErrReference, st.Size())
	}
	b, err := unix.Mmap(int(f.Fd()), 0, int(st.Size()), unix.PROT_READ, unix.MAP_SHARED)
	if err != nil {
		return nil, fmt.Errorf("open reference: %w", err)
	}
	r, err := LoadReference(b)
	if err != nil {
		_ = unix.Munmap(b)
		return nil, err
	}
	r.mapped = true
	return r, nil
}

// Verify checks the checksum of the whole file, once. It is for one goroutine.
func (r *Reference) Verify() error {
	if r.sound {
		return nil
	}
	got, want := bodySum(r.data)
	if r.sound = got == want; !r.sound {
		return fmt.Errorf("%w: checksum differs", ErrReference)
	}
	return nil
}

// Trim gives the pages of a mapped reference back to the host: to be called when a check is over.
func (r *Reference) Trim() {
	if r.mapped {
		_ = unix.Madvise(r.data, unix.MADV_DONTNEED)
	}
}

// Close ends the mapping. Nothing may be reading it.
func (r *Reference) Close() error {
	if !r.mapped {
		return nil
	}
	r.mapped = false
	data := r.data
	r.data, r.s = nil, [refCount][]byte{}
	return unix.Munmap(data)
}

// Encode writes the reference in its flat format.
func (r *Reference) Encode(w io.Writer) error {
	_, err := w.Write(r.data)
	return err
}

// Banner is the kernel's "Linux version …" line: a reference goes with the profile that has the same.
func (r *Reference) Banner() []byte { return r.s[refSecBanner] }

// Base is the link address of _text.
func (r *Reference) Base() uint64 { return r.head.base }

// Text is the kernel's code, Rodata its read-only data, Replacement the code that alternatives put in.
func (r *Reference) Text() Segment   { return Segment{r.head.base, r.s[refSecText]} }
func (r *Reference) Rodata() Segment { return Segment{r.head.rodata, r.s[refSecRodata]} }
func (r *Reference) Replacement() Segment {
	return Segment{r.head.replacement, r.s[refSecReplacement]}
}

// AfterInit is the part of Rodata that is data until the boot is done, Jumps the part of that which is jump_table.
func (r *Reference) AfterInit() (start, end uint64) { return r.head.afterInit, r.head.afterInitEnd }
func (r *Reference) Jumps() (start, end uint64)     { return r.head.jumps, r.head.jumpsEnd }

// NewAlternatives reports whether the kernel puts alternatives in as Linux does since 6.4.
func (r *Reference) NewAlternatives() bool { return r.head.flags&refNewAlternatives != 0 }

// Relocs returns the range of numbers of relocations whose places lie in [from, to).
func (r *Reference) Relocs(from, to uint64) (first, end int) {
	n := len(r.s[refSecRelocs]) / 4
	at := func(addr uint64) int {
		return sort.Search(n, func(i int) bool { a, _ := r.Reloc(i); return a >= addr })
	}
	return at(from), at(to)
}

// Reloc returns one relocation.
func (r *Reference) Reloc(i int) (addr uint64, kind RelocKind) {
	v := binary.LittleEndian.Uint32(r.s[refSecRelocs][4*i:])
	return r.head.base + uint64(v>>2), RelocKind(v & 3)
}

// NumSites returns how many places there are, in the order of their addresses; Site returns one.
func (r *Reference) NumSites() int { return len(r.s[refSecSites]) / siteRecord }
func (r *Reference) Site(i int) Site {
	le, b := binary.LittleEndian, r.s[refSecSites][i*siteRecord:]
	s := Site{Addr: r.head.base + uint64(le.Uint32(b)), Kind: SiteKind(b[8]), Len: int(b[9]), Aux: le.Uint16(b[10:])}
	if a := le.Uint32(b[4:]); s.Kind == SiteAlternative {
		s.A = uint64(a)
	} else {
		s.A = r.head.base + uint64(int64(int32(a)))
	}
	return s
}

// Alternatives returns n entries from the first on: nil where there are not so many.
func (r *Reference) Alternatives(first uint64, n int) []Alternative {
	t, ok := within(r.s[refSecAlternatives], first*altRecord, uint64(n)*altRecord)
	if !ok || first > 1<<32 {
		return nil
	}
	out := make([]Alternative, n)
	le := binary.LittleEndian
	for i := range out {
		b := t[i*altRecord:]
		out[i] = Alternative{Addr: r.head.base + uint64(le.Uint32(b)), Replacement: r.head.base + uint64(le.Uint32(b[4:])),
			Feature: le.Uint16(b[8:]), Len: int(b[10]), ReplacementLen: int(b[11]), Not: b[12]&1 != 0, DirectCall: b[12]&2 != 0}
	}
	return out
}
