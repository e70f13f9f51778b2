package introspect

import (
	"encoding/binary"

	"vigia/internal/kernel"
	"vigia/internal/memory"
)

// slabLayout is what finding a slab cache's objects takes. Every page of RAM has a struct page, all in one array at
// vmemmap_base; where a page is the first of a slab, the same bytes are a struct slab, which names its cache.
type slabLayout struct {
	vmemmap, direct              uint64 // link addresses of vmemmap_base and page_offset_base
	pageSize, cache, objects     uint64
	objectsShift, objectsBits    uint8
	size, compound               uint64
	taskCache, credCache, initCr uint64 // link addresses
	err                          error
}

func (g *Guest) slabLayout() *slabLayout {
	if g.slabs != nil {
		return g.slabs
	}
	r, l := &resolver{p: g.profile}, &slabLayout{}
	l.vmemmap, l.direct = r.symbol("vmemmap_base"), r.symbol("page_offset_base")
	l.taskCache, l.credCache, l.initCr = r.symbol("task_struct_cachep"), r.symbol("cred_jar"), r.symbol("init_cred")
	l.cache, l.size = r.field("slab", "slab_cache"), r.field("kmem_cache", "size")
	l.compound = r.field("page", "compound_head")
	if size, err := g.profile.Size("page"); err == nil {
		l.pageSize = size
	}
	f, err := g.profile.Field("slab", "objects")
	l.objects, l.objectsShift, l.objectsBits = f.Offset, f.BitShift, f.BitSize
	if l.err = r.err; l.err == nil {
		l.err = err
	}
	if l.err == nil && (l.pageSize < 32 || l.pageSize > 256 || l.cache+8 > l.pageSize || l.objects+4 > l.pageSize) {
		l.err = &kernel.MissingError{What: "type", Name: "page"}
	}
	g.slabs = l
	g.profile.Trim()
	return l
}

const (
	pageShift     = 12
	maxPages      = 1 << 24 // 64 GiB of RAM
	pagesAtOnce   = 64
	maxSlabs      = 1 << 14
	maxSlabObject = 512
)

// slabObjects visits every object of the cache whose pointer lies at link address cache, the free ones too.
func (g *Guest) slabObjects(cache uint64, visit func(object uint64)) error {
	l := g.slabLayout()
	if l.err != nil {
		return l.err
	}
	r := reader{s: g.space}
	want := r.u64(cache + g.boot.Slide)
	vmemmap, direct := r.u64(l.vmemmap+g.boot.Slide), r.u64(l.direct+g.boot.Slide)
	size := uint64(r.u32(want + l.size))
	if r.err != nil {
		return r.err
	}
	if size < 64 || size > 1<<16 {
		return ErrTorn
	}
	slabs := 0
	g.eachPage(l, vmemmap, want, func(pfn uint64, page []byte) {
		if slabs++; slabs > maxSlabs {
			return
		}
		n := binary.LittleEndian.Uint32(page[l.objects:]) >> l.objectsShift & (1<<l.objectsBits - 1)
		for i := range uint64(min(n, maxSlabObject)) {
			visit(direct + pfn<<pageShift + i*size)
		}
	})
	return nil
}

// eachPage visits the struct pages of all RAM that name a cache. Parts of the array that are not mapped have no RAM
// behind them.
func (g *Guest) eachPage(l *slabLayout, vmemmap, cache uint64, visit func(pfn uint64, page []byte)) {
	sized, ok := g.mem.(memory.Sized)
	if !ok {
		return
	}
	buf := make([]byte, pagesAtOnce*l.pageSize)
	for _, r := range sized.Regions() {
		first, end := r.Phys>>pageShift, min((r.Phys+r.Size)>>pageShift, r.Phys>>pageShift+maxPages)
		for pfn := first; pfn < end && g.meter.left > 0; pfn += pagesAtOnce {
			b := buf[:min(pagesAtOnce, end-pfn)*l.pageSize]
			if g.space.Read(vmemmap+pfn*l.pageSize, b) != nil {
				continue
			}
			for at := 0; at < len(b); at += int(l.pageSize) {
				if page := b[at : at+int(l.pageSize)]; binary.LittleEndian.Uint64(page[l.cache:]) == cache {
					visit(pfn+uint64(at)/l.pageSize, page)
				}
			}
		}
	}
}

// slabOf returns the cache that an object of the kernel's direct map belongs to; 0 where its page is no slab's.
func (g *Guest) slabOf(object uint64) (cache uint64, err error) {
	l := g.slabLayout()
	if l.err != nil {
		return 0, l.err
	}
	r := reader{s: g.space}
	vmemmap, direct := r.u64(l.vmemmap+g.boot.Slide), r.u64(l.direct+g.boot.Slide)
	if r.err != nil || object < direct {
		return 0, r.err
	}
	page := vmemmap + (object-direct)>>pageShift*l.pageSize
	if head := r.u64(page + l.compound); head&1 != 0 { // a tail page
		page = head - 1
	}
	cache = r.u64(page + l.cache)
	return cache, r.err
}

const stackEndMagic = 0x57AC6E9D // include/uapi/linux/magic.h

// taskSlabs is every task_struct in the memory that tasks are made of, the idle and the hidden ones too, if it is in use:
// it has a stack, or is a zombie that its pid knows.
func (g *Guest) taskSlabs() *listing {
	l := newListing(viewSlab)
	s := g.slabLayout()
	if s.err != nil {
		return l.unknown(s.err)
	}
	v := g.taskViewLayout()
	if v.usage == noField || v.stack == noField {
		return l.unknown(&kernel.MissingError{What: "field", Name: "task_struct.stack"})
	}
	err := g.slabObjects(s.taskCache, func(task uint64) {
		if g.inUse(task) {
			l.at[task] = true
		}
	})
	if err != nil {
		return l.unknown(err)
	}
	return l
}

func (g *Guest) inUse(task uint64) bool {
	v := g.taskViewLayout()
	r := reader{s: g.space}
	usage, stack := r.u32(task+v.usage), r.u64(task+v.stack)
	if r.err != nil || int32(usage) <= 0 {
		return false
	}
	if stack != 0 {
		end, err := g.space.U64(stack)
		return err == nil && uint32(end) == stackEndMagic && !g.copied(task)
	}
	settled, err := g.settled(task)
	return err == nil && settled
}

// copied reports whether a task is still no more than its parent's bytes, as each is when it is made.
func (g *Guest) copied(task uint64) bool {
	t := &g.layout.task
	r := reader{s: g.space}
	pid := r.u64(task + t.threadPid)
	other := r.u64(pid+g.layout.pid.tasks) - t.pidLinks
	if r.err != nil || pid == 0 || other == task {
		return false
	}
	same := r.u32(task+t.pid) == r.u32(other+t.pid) && r.u64(task+t.startTime) == r.u64(other+t.startTime)
	return same && r.err == nil
}
