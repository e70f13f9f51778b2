package introspect

import (
	"encoding/binary"
	"errors"
	"fmt"

	"vigia/internal/kernel"
)

// control is one look at what a rootkit changes to be called: tables, lists and pointers that lead to code. Each check
// follows them and asks whose code they lead to.
//
// Three things may be said of a pointer to code. It must lead to the start of a function of the kernel, into a module
// that is on the kernel's list, or into code that the kernel itself has made and listed. Where the kernel file says what
// it must be, it must be that. And a module that was not built with the kernel (the kernel taints it) is named wherever
// it hooks itself in: there is good software of that kind, but every rootkit is.
type control struct {
	*Guest
	code     *codeMap
	findings []Finding
	listed   map[string]bool // the findings that only list something
	serious  int             // how many others there are
	looked   int             // pointers to code that were followed
	buf      []byte          // for tables, kept from one to the next
	checked  map[uint64]bool // tables of functions that were looked at
	image    struct{ start, end, initStart, initEnd uint64 }
}

// controls are the checks of control flow. Each is named after what it looks at.
var controls = []struct {
	name  string
	cheap bool
	look  func(c *control) error
}{
	{"idt", true, (*control).idt},
	{"syscalls", true, (*control).syscalls},
	{"ftrace", true, (*control).ftrace},
	{"kprobes", true, (*control).kprobes},
	{"uprobes", true, (*control).uprobes},
	{"tracepoints", true, (*control).tracepoints},
	{"bpf", true, (*control).bpf},
	{"network", true, (*control).network},
	{"lsm", true, (*control).lsm},
	{"notifiers", true, (*control).notifiers},
	{"helpers", true, (*control).helpers},
	{"mounts", true, (*control).mounts},
	{"proc", false, (*control).procFiles},
	{"inodes", false, (*control).inodes},
	{"file operations", false, (*control).openFiles},
	{"terminals", true, (*control).terminals},
	{"formats", true, (*control).lists},
	{"timers", true, all((*control).timers, (*control).clocks)},
	{"breakpoints", true, (*control).breakpoints},
	{"threads", true, (*control).tasks},
	{"pointers", false, (*control).static},
}

// controlChecks are the same for the checker.
func controlChecks() (list []check) {
	for _, k := range controls {
		list = append(list, check{k.name, k.cheap, func(c *Checker) (Result, error) { return c.control(k.name, k.look) }})
	}
	return list
}

// control runs one of them. A list that stays torn is a finding: who breaks one hides what comes after.
func (c *Checker) control(name string, look func(*control) error) (Result, error) {
	found, looked, err := c.guest.control(look)
	if errors.Is(err, ErrTorn) {
		found, err = []Finding{{Kind: KindListBroken, Subject: name, Severity: Medium, Detail: "a list that this check follows is torn: " + err.Error()}}, nil
	}
	if err != nil {
		return Result{}, err
	}
	view := View{Check: name, Name: name, Count: looked}
	return Result{Findings: found, Views: []View{view}}, nil
}

// look runs one check, in one sample.
func (g *Guest) look(look func(c *control) error) ([]Finding, error) {
	found, _, err := g.control(look)
	return found, err
}

func (g *Guest) control(look func(c *control) error) (found []Finding, looked int, err error) {
	c := &control{Guest: g}
	err = g.view(func() (err error) {
		c.findings, c.looked, c.serious = nil, 0, 0
		c.listed, c.checked = map[string]bool{}, map[uint64]bool{}
		if c.code, err = g.codeMap(); err != nil {
			return err
		}
		c.image.start, c.image.end = c.known("_text"), c.known("_end")
		c.image.initStart, c.image.initEnd = c.known("__init_begin"), c.known("__init_end")
		return look(c)
	})
	if err != nil {
		return nil, 0, err
	}
	return c.findings, c.looked, nil
}

// all joins looks to one; what a kernel lacks ends only the look that needs it.
func all(looks ...func(c *control) error) func(c *control) error {
	return func(c *control) error {
		for _, look := range looks {
			if err := look(c); err != nil && !errors.Is(err, errNotBuilt) {
				return err
			}
		}
		return nil
	}
}

// errNotBuilt: the kernel was built without what a check looks at, or says too little of it.
var errNotBuilt = fmt.Errorf("%w: it was built without it", kernel.ErrUnsupported)

// maxFound bounds what one check says; what is beyond it would say the same. What is listed has a bound of its own, so that
// nobody can fill it to keep something else out, and is listed once: each network namespace has the same hooks.
const (
	maxFound  = 256
	maxListed = 64
)

func (c *control) found(f Finding) {
	if f.Severity == Info {
		if what := f.Kind + f.Subject + f.Detail; !c.listed[what] && len(c.listed) < maxListed {
			c.listed[what] = true
			c.findings = append(c.findings, f)
		}
		return
	}
	if c.serious++; c.serious <= maxFound {
		c.findings = append(c.findings, f)
	}
}

// resolver looks up fields and sizes; a check asks for the same ones in each sample.
func (c *control) resolver() *resolver {
	if c.fieldMemo == nil {
		c.fieldMemo = map[string]uint64{}
	}
	return &resolver{p: c.profile, memo: c.fieldMemo}
}

// symbolAddr returns the run-time address of the kernel's one symbol of a name.
func (c *control) symbolAddr(name string) (uint64, error) {
	if c.symbolMemo == nil {
		c.symbolMemo = map[string]uint64{}
	}
	link, ok := c.symbolMemo[name]
	if !ok {
		link, _ = c.profile.Symbol(name) // 0: there is none
		c.symbolMemo[name] = link
	}
	if link == 0 {
		return 0, fmt.Errorf("%w: %s", errNotBuilt, name)
	}
	return link + c.boot.Slide, nil
}

// table reads n bytes into memory that the next table uses again.
func (c *control) table(va uint64, n int) ([]byte, error) {
	if cap(c.buf) < n {
		c.buf = make([]byte, n)
	}
	b := c.buf[:n]
	return b, c.space.Read(va, b)
}

// where says whose code an address is, in words: "tcp4_seq_show", "module x: hook+0x10", "no known code".
func (c *control) where(va uint64) string {
	in := c.code.at(va)
	switch in.owner {
	case ownerKernel:
		return c.symbol(va)
	case ownerFreed:
		return c.symbol(va) + ", which is freed after boot"
	case ownerModule, ownerAlien:
		name := c.moduleSymbol(in, va)
		if name == "" {
			name = fmt.Sprintf("+%#x", va-in.start)
		}
		return "module " + in.name + ": " + name
	case ownerMade:
		return "made code " + in.name
	}
	if c.inImage(va) {
		return c.symbol(va) + ", which is data"
	}
	return fmt.Sprintf("%#x, which is no known code", va)
}

// thing names data of the kernel's image, or of a module.
func (c *control) thing(va uint64) string {
	in := c.code.within(va)
	if in.owner == ownerNone {
		return c.symbol(va)
	}
	name := c.moduleSymbol(in, va)
	if name == "" {
		name = fmt.Sprintf("+%#x", va-in.start)
	}
	return "module " + in.name + ": " + name
}

// whole says that an address is where a function of the kernel starts.
func (c *control) whole(va uint64) bool {
	_, offset, ok := c.profile.SymbolAt(va - c.boot.Slide)
	return ok && offset == 0
}

// judge says how bad it is that something in the kernel calls the code at an address, where it is not known what
// should be there: a hook that anyone may have registered.
func (c *control) judge(va uint64) Severity {
	c.looked++
	switch c.code.at(va).owner {
	case ownerKernel:
		if c.whole(va) {
			return Info
		}
		return High // into the middle of a function
	case ownerModule, ownerMade:
		return Info
	case ownerAlien:
		return High
	}
	return Critical
}

// hook reports a registered hook: what it is, and whose code it calls. pointer is where its address was read.
func (c *control) hook(kind, subject, what string, pointer, target uint64) {
	c.found(Finding{Kind: kind, Subject: subject, Detail: what + " calls " + c.where(target), Severity: c.judge(target),
		Evidence: []Evidence{pointerAt(pointer, target, "pointer to "+c.where(target))}})
}

// hooked is hook for what a healthy kernel is full of: only what is wrong is reported.
func (c *control) hooked(kind, subject, what string, pointer, target uint64) {
	if target != 0 && c.judge(target) != Info {
		c.hook(kind, subject, what, pointer, target)
	}
}

// pointerAt is a pointer as evidence.
func pointerAt(at, value uint64, note string) Evidence {
	return Evidence{Address: at, Bytes: binary.LittleEndian.AppendUint64(nil, value), Note: note}
}
