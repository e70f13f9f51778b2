package introspect

import (
	"encoding/binary"
	"fmt"
	"slices"
	"strings"
)

// CheckFtrace lists who is called at the entry of the kernel's functions by its function tracer, and reports call sites
// that are switched on though nobody who is registered asks for them.
//
// Each traceable function begins with five bytes that are a no-op, or a call when traced. ftrace_ops_list holds who asked, ftrace's
// pages hold a record for each function: whether its call is switched on, and how many want it. What the bytes
// themselves are is CheckText's question.
func (g *Guest) CheckFtrace() ([]Finding, error) { return g.look((*control).ftrace) }

const (
	maxTracers      = 1024
	maxTraced       = 4096 // functions of one tracer
	maxTracedNamed  = 8    // of them in a finding
	maxTracePages   = 1 << 14
	traceEnabled    = 1 << 31 // FTRACE_FL_ENABLED of dyn_ftrace.flags
	maxTraceRecords = 1 << 17 // of one page of records; a kernel has some 60,000 in all
)

// tracer is one ftrace_ops.
type tracer struct {
	at, function uint64
	sites        []uint64 // none: every function
}

func (c *control) ftrace() error {
	tracers, err := c.tracers()
	if err != nil {
		return err
	}
	for _, t := range tracers {
		c.hook("ftrace.hook", c.traced(t), "ftrace: the entry of "+c.traced(t), t.at, t.function)
	}
	for _, name := range []string{"ftrace_trace_function", "ftrace_graph_entry", "ftrace_graph_return"} {
		c.variable("ftrace.hook", name)
	}
	c.graphs()
	return c.sites(tracers)
}

// variable checks a pointer to a function that the kernel keeps in a variable of its own.
func (c *control) variable(kind, name string) {
	at, err := c.symbolAddr(name)
	if err != nil {
		return
	}
	if target, err := c.space.U64(at); err == nil {
		c.hooked(kind, name, name, at, target)
	}
}

func (c *control) tracers() (list []tracer, err error) {
	first, err := c.symbolAddr("ftrace_ops_list")
	if err != nil {
		return nil, err
	}
	end, err := c.symbolAddr("ftrace_list_end")
	if err != nil {
		return nil, err
	}
	r := c.resolver()
	function, next := r.field("ftrace_ops", "func"), r.field("ftrace_ops", "next")
	if r.err != nil {
		return nil, r.err
	}
	for at := first; len(list) < maxTracers; {
		read := reader{s: c.space}
		if at = read.u64(at); at == end || at == 0 && read.err == nil {
			return list, nil
		}
		t := tracer{at: at + function, function: read.u64(at + function)}
		if read.err != nil {
			return nil, ErrTorn
		}
		t.sites = c.filter(at)
		list = append(list, t)
		at += next
	}
	return nil, ErrTorn
}

// filter returns the functions that a tracer asked for.
func (c *control) filter(ops uint64) (sites []uint64) {
	r := c.resolver()
	hash, filter := r.field("ftrace_ops", "func_hash"), r.field("ftrace_ops_hash", "filter_hash")
	bits, count, buckets := r.field("ftrace_hash", "size_bits"), r.field("ftrace_hash", "count"), r.field("ftrace_hash", "buckets")
	link, ip := r.field("ftrace_func_entry", "hlist"), r.field("ftrace_func_entry", "ip")
	read := reader{s: c.space}
	table := read.u64(read.u64(ops+hash) + filter)
	size, n, head := read.u64(table+bits), read.u64(table+count), read.u64(table+buckets)
	if r.err != nil || read.err != nil || n == 0 || size > 16 {
		return nil
	}
	for i := range uint64(1) << size {
		_ = c.hashed(head+i*8, func(node uint64) error {
			if at, err := c.space.U64(node - link + ip); err == nil && len(sites) < maxTraced {
				sites = append(sites, at)
			}
			return nil
		})
	}
	slices.Sort(sites)
	return sites
}

// traced names what a tracer is called for.
func (c *control) traced(t tracer) string {
	if len(t.sites) == 0 {
		return "all functions"
	}
	var names []string
	for _, at := range t.sites[:min(len(t.sites), maxTracedNamed)] {
		names = append(names, c.function(at))
	}
	text := strings.Join(names, ", ")
	if more := len(t.sites) - len(names); more > 0 {
		text += fmt.Sprintf(" and %d more", more)
	}
	return text
}

// function names the function that an address lies in.
func (c *control) function(va uint64) string {
	name, _, _ := strings.Cut(c.where(va), "+0x")
	return name
}

// graphs checks who is called on return from functions: 6.12 keeps several.
func (c *control) graphs() {
	array, err := c.symbolAddr("fgraph_array")
	if err != nil {
		return
	}
	r := c.resolver()
	entry, exit := r.field("fgraph_ops", "entryfunc"), r.field("fgraph_ops", "retfunc")
	b, err := c.table(array, c.entries(array, 64)*8)
	if err != nil || r.err != nil {
		return
	}
	for b = slices.Clone(b); len(b) >= 8; b = b[8:] {
		ops := binary.LittleEndian.Uint64(b)
		for _, at := range []uint64{ops + entry, ops + exit} {
			if target, err := c.space.U64(at); err == nil && ops != 0 {
				c.hooked("ftrace.hook", "fgraph", "ftrace: the tracer of calls and returns", at, target)
			}
		}
	}
}

// sites looks at the records of all functions for those that are switched on, and at where their calls lead.
func (c *control) sites(tracers []tracer) error {
	r := c.resolver()
	next, records, count := r.field("ftrace_page", "next"), r.field("ftrace_page", "records"), r.field("ftrace_page", "index")
	ip, flags := r.field("dyn_ftrace", "ip"), r.field("dyn_ftrace", "flags")
	size, err := c.profile.Size("dyn_ftrace")
	if r.err != nil || err != nil || ip+8 > size || flags+8 > size {
		return r.err
	}
	page, err := c.symbolAddr("ftrace_pages_start")
	if err != nil {
		return err
	}
	page, err = c.space.U64(page)
	for i := 0; err == nil && page != 0; i++ {
		read := reader{s: c.space}
		at, n := read.u64(page+records), uint64(read.u32(page+count))
		page = read.u64(page + next)
		if i == maxTracePages || n > maxTraceRecords || read.err != nil {
			return ErrTorn
		}
		b, err := c.table(at, int(n*size))
		if err != nil {
			return ErrTorn
		}
		for ; len(b) > 0; b = b[size:] {
			if f := binary.LittleEndian.Uint64(b[flags:]); f&traceEnabled != 0 {
				c.site(binary.LittleEndian.Uint64(b[ip:]), tracers)
			}
		}
	}
	if err != nil {
		return ErrTorn
	}
	return nil
}

// site looks at a call that is switched on.
func (c *control) site(ip uint64, tracers []tracer) {
	var call [5]byte
	if c.space.Read(ip, call[:]) != nil {
		return
	}
	name := c.function(ip)
	evidence := []Evidence{{Address: ip, Bytes: call[:], Note: "entry of " + name}}
	if call[0] == 0xe8 {
		target := ip + 5 + uint64(int64(int32(binary.LittleEndian.Uint32(call[1:]))))
		if o := c.code.at(target).owner; o != ownerKernel && o != ownerMade {
			c.found(Finding{Kind: "ftrace.hook", Subject: name, Severity: Critical,
				Detail: "the entry of " + name + " calls " + c.where(target), Evidence: evidence})
			return
		}
	}
	asked := slices.ContainsFunc(tracers, func(t tracer) bool {
		_, named := slices.BinarySearch(t.sites, ip)
		return named || len(t.sites) == 0
	})
	if !asked {
		c.found(Finding{Kind: "ftrace.hook", Subject: name, Severity: High,
			Detail: "the entry of " + name + " is traced, and no tracer on the kernel's list asked for it", Evidence: evidence})
	}
}
