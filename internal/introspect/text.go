package introspect

import (
	"bytes"
	"errors"
	"fmt"
	"slices"
	"time"

	"encoding/binary"
	"strings"
	"vigia/internal/kernel"
	"vigia/internal/kernel/patch"
)

// ErrNoReference: the image holds no reference of its kernel's code.
var ErrNoReference = errors.New("kernel text can't be checked: the image has no reference of it: build or import the image again")

// Kinds of findings of code.
const (
	KindTextChanged   = "text.changed"
	KindRodataChanged = "rodata.changed"
)

// UseReference gives the guest the reference of its kernel's code; nil, and why there is none. files are its modules' and
// may be nil.
func (g *Guest) UseReference(ref *kernel.Reference, why error, files ModuleFiles) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.reference, g.noReference, g.moduleFiles = ref, why, files
	if ref == nil && why == nil {
		g.noReference = ErrNoReference
	}
}

// text is the check of code.
func (c *Checker) text() (Result, error) {
	g := c.guest
	g.mu.Lock()
	ref, why, files := g.reference, g.noReference, g.moduleFiles
	g.mu.Unlock()
	found, pages, err := g.CheckExecutable()
	if err != nil {
		return Result{}, err
	}
	res := Result{Findings: found, Views: []View{{Check: "text", Name: "executable pages", Count: pages}}}
	if ref == nil {
		if why == nil {
			why = ErrNoReference
		}
		res.Views = append(res.Views, View{Check: "text", Name: "kernel text, bytes", Unknown: why.Error()})
		return res, nil
	}
	found, stats, err := g.CheckText(ref, files)
	if errors.Is(err, kernel.ErrUnsupported) {
		res.Views = append(res.Views, View{Check: "text", Name: "kernel text, bytes", Unknown: err.Error()})
		return res, nil
	}
	if err != nil {
		return Result{}, err
	}
	res.Findings = append(res.Findings, found...)
	res.Views = append(res.Views, View{Check: "text", Name: "kernel text, bytes", Count: stats.Bytes})
	modules := View{Check: "text", Name: "modules' text", Count: stats.Modules}
	if files == nil {
		modules.Unknown = "the image has no modules to compare with: build or import the image again"
	}
	res.Views = append(res.Views, modules)
	return res, nil
}

// TextStats says what a check of code looked at.
type TextStats struct {
	Bytes   int // compared
	Changed int // of these, not as they must be
	Sites   int // places that the kernel writes over
	Traced  int // of these, calls of the function tracer
	Modules int // whose text was compared
	Pages   int // executable pages that were asked whose they are
	Took    time.Duration
}

// textWindow is how much is compared at once; while it is, other views wait.
const textWindow = 128 << 10

const (
	maxTextFindings = 64
	maxTextGap      = 16 // bytes that are right between two that are wrong, for them to be told as one change
	maxTextBytes    = 64 // of a change that are shown
)

// textCheck is one comparison of a guest's code with what it must be.
type textCheck struct {
	*Guest
	ref    *kernel.Reference
	object patch.Kernel
	expect patch.Expect
	names  patch.Names
	mode   patch.Mode
	code   *codeMap
	armed  []armed // the kernel's own probes

	got, want []byte
	changes   []change
	seen      sightOf // of the module that is compared
	found     []Finding
	stats     TextStats
}

// change is a run of bytes that are not what they must be.
type change struct {
	addr      uint64
	got, want []byte
	n         int
}

// CheckText compares the kernel's code and read-only data with what ref says they must be, and that of modules with their
// files; files may be nil.
func (g *Guest) CheckText(ref *kernel.Reference, files ModuleFiles) ([]Finding, TextStats, error) {
	if ref == nil {
		return nil, TextStats{}, ErrNoReference
	}
	began := time.Now()
	defer ref.Trim()
	if err := ref.Verify(); err != nil {
		return nil, TextStats{}, err
	}
	t := &textCheck{Guest: g, ref: ref}
	if err := g.view(t.prepare); err != nil {
		return nil, TextStats{}, err
	}
	boot := g.Boot()
	err := t.segments()
	if err == nil && files != nil {
		err = t.modules(files)
	}
	if err == nil && g.Boot() != boot {
		err = ErrNotReady // it was reset meanwhile
	}
	if err != nil {
		return nil, TextStats{}, err
	}
	g.mu.Lock()
	if g.textSound.mode = nil; t.stats.Changed == 0 && g.textSound.boot == boot {
		g.textSound.mode = &t.mode
	}
	g.mu.Unlock()
	t.stats.Took, t.stats.Traced = time.Since(began), t.expect.Traced
	t.stats.Sites += ref.NumSites()
	return append(t.findings(), t.found...), t.stats, nil
}

// prepare finds out whose code is where, and what the kernel chose at boot.
func (t *textCheck) prepare() error {
	if !bytes.Equal(t.ref.Banner(), t.profile.Banner()) {
		return fmt.Errorf("%w: it is of another kernel", kernel.ErrReference)
	}
	var err error
	if t.code, err = t.codeMap(); err != nil {
		return err
	}
	t.armed = t.probes()
	t.object = patch.Kernel{Ref: t.ref, Slide: t.boot.Slide}
	t.names = t.textNames()
	t.mode = patch.Mode{New: t.ref.NewAlternatives(), Features: t.features()}
	t.expect = patch.Expect{Object: t.object, Mode: &t.mode, Names: &t.names, Env: t}
	t.textSound.begin(t.boot)
	if known := t.textSound.mode; known != nil {
		t.mode = *known
		return nil
	}
	patch.Calibrate(t.object, &t.names, &t.mode, t.Code)
	return t.unexplained()
}

// unexplained says why a kernel's code can't be compared: it is written over in ways that nobody here knows how to compute. What
// decides is the kernel file, and what most of the code is, not a variable in the guest that anybody could set.
func (t *textCheck) unexplained() error {
	switch {
	case t.mode.Return != 0 && slices.Contains(t.names.DepthReturns, t.mode.Return):
		return fmt.Errorf("%w: it counts the depth of calls (retbleed=stuff), for which it writes over all of them", kernel.ErrUnsupported)
	case t.names.Preambles > 0:
		return fmt.Errorf("%w: it was built with FineIBT, for which it writes over all functions' starts", kernel.ErrUnsupported)
	}
	return nil
}

// textNames looks up what the kernel's code writers refer to.
func (t *textCheck) textNames() patch.Names {
	at := func(names ...string) uint64 {
		for _, name := range names {
			if addr, err := t.profile.Symbol(name); err == nil {
				return addr + t.boot.Slide
			}
		}
		return 0
	}
	preambles := uint64(0)
	if start, end := at("__cfi_sites"), at("__cfi_sites_end"); end > start && start != 0 {
		preambles = end - start
	}
	return patch.Names{
		DepthReturns: []uint64{at("call_depth_return_thunk"), at("x86_return_skl")}, Preambles: preambles,
		ReturnThunk: at("__x86_return_thunk"), ITSReturn: at("its_return_thunk"),
		StaticReturn: at("__static_call_return0"), JccReturn: at("__static_call_return"),
		ParavirtNop: at("nop_func", "_paravirt_nop"), ParavirtBug: at("BUG_func", "paravirt_BUG"),
		Tracers: []uint64{at("ftrace_caller"), at("ftrace_regs_caller")},
	}
}

// features reads the CPU's features, as alternatives ask for them.
func (t *textCheck) features() []byte {
	base, err1 := t.profile.Symbol("boot_cpu_data")
	f, err2 := t.profile.Field("cpuinfo_x86", "x86_capability")
	if err1 != nil || err2 != nil || f.Size*f.Count > 1024 {
		return nil
	}
	b := make([]byte, f.Size*f.Count)
	if t.space.Read(base+t.boot.Slide+f.Offset, b) != nil {
		return nil
	}
	return b
}

// U64 and the rest are what package patch asks of a guest.
func (t *textCheck) U64(addr uint64) (uint64, bool) {
	v, err := t.space.U64(addr)
	return v, err == nil
}

// Function reports whether addr is code of the kernel's or of a module that is listed.
func (t *textCheck) Function(addr uint64) bool {
	o := t.code.at(addr).owner
	return o == ownerKernel || o == ownerModule || o == ownerAlien
}

// Tracer reports whether addr is the start of a trampoline of the function tracer.
func (t *textCheck) Tracer(addr uint64) bool {
	c := t.code.at(addr)
	return c.owner == ownerMade && c.start == addr
}

// Own reports whether addr lies in a module, or at the end of one.
func (t *textCheck) Own(addr uint64) bool {
	return t.code.within(addr).owner != ownerNone || t.code.within(addr-1).owner != ownerNone
}

// Code reads guest memory.
func (t *textCheck) Code(addr uint64, b []byte) bool { return t.space.Read(addr, b) == nil }

// segments compares the text and the read-only data.
func (t *textCheck) segments() error {
	text, ro := t.ref.Text(), t.ref.Rodata()
	if err := t.compare(text.Addr, text.End()); err != nil {
		return err
	}
	from, to := t.ref.AfterInit()
	if from < ro.Addr || to > ro.End() || from >= to {
		return t.compare(ro.Addr, ro.End())
	}
	if err := t.compare(ro.Addr, from); err != nil {
		return err
	}
	return t.compare(to, ro.End())
}

// compare compares a stretch of link addresses, a window at a time.
func (t *textCheck) compare(from, to uint64) error {
	for at := from; at < to; at += textWindow {
		end := min(at+textWindow, to)
		if err := t.view(func() error { return t.window(at, end, from, to) }); err != nil {
			return err
		}
	}
	return nil
}

// window compares [at, end), reading on both sides as far as a site may reach, but not beyond [low, high).
func (t *textCheck) window(at, end, low, high uint64) error {
	start := max(low, at-min(at, patch.Margin))
	stop := min(high, end+patch.Margin)
	n := int(stop - start)
	t.got, t.want = slices.Grow(t.got[:0], n)[:n], slices.Grow(t.want[:0], n)[:n]
	run := start + t.boot.Slide
	if read, _ := t.space.ReadSome(run, t.got); read < n {
		clear(t.got[read:]) // pages that are gone: told as changed
	}
	t.stats.Bytes += int(end - at)
	sum := t.textSound.sum(t.got)
	if t.textSound.known[at] == sum {
		t.expect.Traced += t.textSound.traced[at]
		return nil
	}
	traced := t.expect.Traced
	if !t.expect.Window(run, t.got, t.want) {
		return fmt.Errorf("%w: it lacks %#x", kernel.ErrReference, at)
	}
	t.tracerCalls(run, t.got, t.want)
	probed := t.probed(run, t.got, t.want)
	if t.differ(at+t.boot.Slide, t.got[at-start:][:end-at], t.want[at-start:][:end-at]) == 0 && !probed {
		t.textSound.known[at], t.textSound.traced[at] = sum, t.expect.Traced-traced
	} else {
		delete(t.textSound.known, at)
	}
	return nil
}

// tracerCalls expects what the function tracer's own entry points call, in the code from run on: whoever the tracer has made
// its function (CheckFtrace looks at whose that is), or one of the functions by which it finds those who are registered.
func (t *textCheck) tracerCalls(run uint64, got, want []byte) {
	var function uint64
	if at, err := t.profile.Symbol("ftrace_trace_function"); err == nil {
		function, _ = t.space.U64(at + t.boot.Slide)
	}
	for _, name := range []string{"ftrace_call", "ftrace_regs_call"} {
		at, err := t.profile.Symbol(name)
		at += t.boot.Slide
		if err != nil || at < run || at-run > uint64(len(got)) || uint64(len(got))-(at-run) < 5 {
			continue
		}
		call := got[at-run:][:5]
		target := at + 5 + uint64(int64(int32(binary.LittleEndian.Uint32(call[1:]))))
		s, offset, ok := t.profile.SymbolAt(target - t.boot.Slide)
		tracers := strings.HasPrefix(s.Name, "ftrace_") || strings.HasPrefix(s.Name, "arch_ftrace_")
		if call[0] == 0xe8 && ok && offset == 0 && t.code.at(target).owner == ownerKernel && (target == function || tracers) {
			copy(want[at-run:], call)
		}
	}
}

// differ notes where got is not want, and returns how many bytes that are. Runs of changed bytes with few right ones between them are one change.
func (t *textCheck) differ(addr uint64, got, want []byte) int {
	const step = 256
	before := t.stats.Changed
	for i := 0; i < len(got); i += step {
		end := min(i+step, len(got))
		if bytes.Equal(got[i:end], want[i:end]) {
			continue
		}
		for j := i; j < end; j++ {
			if got[j] != want[j] {
				t.stats.Changed++
				t.changed(addr, j, got, want)
			}
		}
	}
	return t.stats.Changed - before
}

// changed adds the byte at addr+j to the last change, or begins another.
func (t *textCheck) changed(addr uint64, j int, got, want []byte) {
	at := addr + uint64(j)
	if n := len(t.changes); n > 0 {
		if c := &t.changes[n-1]; at-c.addr < uint64(c.n)+maxTextGap && at >= c.addr {
			c.n = int(at-c.addr) + 1
			if from := c.addr - addr; c.addr >= addr && c.n <= maxTextBytes { // else it began in the window before
				c.got, c.want = slices.Clone(got[from:j+1]), slices.Clone(want[from:j+1])
			}
			return
		}
	}
	if len(t.changes) < maxTextFindings {
		t.changes = append(t.changes, change{addr: at, n: 1, got: []byte{got[j]}, want: []byte{want[j]}})
	}
}

// findings tells the changes.
func (t *textCheck) findings() []Finding {
	var out []Finding
	for _, c := range t.changes {
		out = append(out, t.finding(c))
	}
	return out
}

func (t *textCheck) finding(c change) Finding {
	f := Finding{Kind: KindTextChanged, Subject: t.symbol(c.addr), Severity: Critical,
		Evidence: []Evidence{{Address: c.addr, Bytes: c.got, Expected: c.want, Note: siteAt(t.object, c.addr)}}}
	what := "the kernel's code"
	if text := t.ref.Text(); c.addr-t.boot.Slide-text.Addr >= uint64(len(text.Data)) {
		f.Kind, what = KindRodataChanged, "the kernel's read-only data"
	}
	f.Detail = fmt.Sprintf("%s differs in %s from what the kernel file has there and from all that the kernel itself writes", what, count(c.n))
	if len(c.got) > 0 && c.got[0] == 0xcc && f.Kind == KindTextChanged {
		f.Detail += "; it begins with a breakpoint, and the kernel has no probe there"
	}
	return f
}

// siteNames say what the kernel writes at a place.
var siteNames = map[kernel.SiteKind]string{kernel.SiteRetpoline: "an indirect call", kernel.SiteReturn: "a return",
	kernel.SiteParavirt: "a paravirt call", kernel.SiteAlternative: "an alternative", kernel.SiteEndbr: "a sealed ENDBR",
	kernel.SiteLock: "a LOCK prefix", kernel.SiteStatic: "a static call", kernel.SiteJump: "a jump label",
	kernel.SiteFtrace: "a function's start, for the function tracer", kernel.SitePointer: "a constant of the boot",
	kernel.SiteShift: "a constant of the boot"}

// siteAt names the place that the kernel writes over at an address, if it is one.
func siteAt(o patch.Object, addr uint64) string {
	for i := patch.FirstSite(o, addr-min(addr, patch.Margin)); i < o.NumSites(); i++ {
		s := o.Site(i)
		if s.Addr > addr {
			break
		}
		if addr < s.Addr+uint64(s.Len) {
			return siteNames[s.Kind]
		}
	}
	return ""
}
