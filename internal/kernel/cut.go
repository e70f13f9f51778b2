package kernel

import (
	"encoding/binary"
	"fmt"
	"slices"
)

// Cut returns a reference of two stretches alone, of the text and of the read-only data, with all that explains them: what
// the comparison is tested with, in some kilobytes. Places in the text that lie only partly within it are left out, so it should
// begin and end between functions.
func (r *Reference) Cut(text, rodata Segment) (*Reference, error) {
	c := &cutter{from: r}
	c.keep(refSecText, r.Text(), text)
	c.keep(refSecRodata, r.Rodata(), rodata)
	if c.err != nil {
		return nil, c.err
	}
	c.head = r.head
	c.head.base, c.head.rodata = text.Addr, rodata.Addr
	c.replacements(text)
	c.sites()
	c.relocs()
	c.out[refSecBanner] = r.Banner()
	for _, f := range c.head.fields() {
		c.out[refSecHead] = binary.LittleEndian.AppendUint64(c.out[refSecHead], *f)
	}
	return LoadReference(refFormat.pack(c.out[:]))
}

// cutter gathers the sections of a part of a reference.
type cutter struct {
	from *Reference
	head refHead
	kept []Segment
	out  [refCount][]byte
	err  error
}

// keep takes part of a section.
func (c *cutter) keep(section int, whole, part Segment) {
	b, ok := within(whole.Data, part.Addr-whole.Addr, uint64(len(part.Data)))
	if !ok || part.Addr < whole.Addr {
		c.err = fmt.Errorf("%w: %#x is not in it", ErrReference, part.Addr)
		return
	}
	c.out[section] = b
	c.kept = append(c.kept, Segment{part.Addr, b})
}

func (c *cutter) has(addr uint64, n int) bool {
	return slices.ContainsFunc(c.kept, func(s Segment) bool { return addr >= s.Addr && addr+uint64(n) <= s.End() })
}

// replacements takes the stretch that holds all code that alternatives in text may put there.
func (c *cutter) replacements(text Segment) {
	low, high := ^uint64(0), uint64(0)
	for i := range c.from.NumSites() {
		s := c.from.Site(i)
		if s.Kind != SiteAlternative || s.Addr < text.Addr || s.Addr+uint64(s.Len) > text.End() {
			continue
		}
		for _, a := range c.from.Alternatives(s.A, int(s.Aux)) {
			if a.ReplacementLen > 0 {
				low, high = min(low, a.Replacement), max(high, a.Replacement+uint64(a.ReplacementLen))
			}
		}
	}
	c.head.replacement = c.head.base
	if whole := c.from.Replacement(); low < high && low >= whole.Addr && high <= whole.End() {
		c.head.replacement = low
		c.keep(refSecReplacement, whole, Segment{low, whole.Data[low-whole.Addr : high-whole.Addr]})
	}
}

// sites takes the places that lie in what is kept.
func (c *cutter) sites() {
	b := &refBuilder{head: c.head}
	for i := range c.from.NumSites() {
		s := c.from.Site(i)
		if !c.has(s.Addr, s.Len) {
			continue
		}
		if s.Kind == SiteAlternative {
			list := c.from.Alternatives(s.A, int(s.Aux))
			s.A = uint64(len(b.alts))
			b.alts = append(b.alts, list...)
		}
		b.list = append(b.list, s)
	}
	b.encodeRecords()
	c.out[refSecSites], c.out[refSecAlternatives] = b.out[refSecSites], b.out[refSecAlternatives]
}

// relocs takes those that reach into what is kept.
func (c *cutter) relocs() {
	for i := range len(c.from.s[refSecRelocs]) / 4 {
		addr, kind := c.from.Reloc(i)
		if addr >= c.head.base && c.has(addr, 1) {
			c.out[refSecRelocs] = binary.LittleEndian.AppendUint32(c.out[refSecRelocs], uint32(addr-c.head.base)<<2|uint32(kind))
		}
	}
}
