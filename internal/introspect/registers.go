package introspect

import (
	"errors"
	"fmt"
	"strconv"
	"strings"
)

// Processor tells what no memory holds: the registers of the guest's CPUs, in QEMU's words ("info registers -a").
type Processor interface {
	Registers() (string, error)
}

// registers are those of a CPU that a rootkit changes, or has to.
type registers struct {
	cpu           int
	idt, gdt      uint64
	cr0, cr4, dr7 uint64
	dr            [4]uint64
}

const (
	cr0WriteProtect = 1 << 16
	maxRegisters    = 4 << 20 // of text: 512 CPUs, some 3 KiB each
)

// errRegisters: what QEMU answered is no list of registers.
var errRegisters = errors.New("QEMU's list of registers is not understood")

// parseRegisters reads QEMU's text: a line "CPU#0" before each CPU's, and among them
//
//	GDT=     fffffe0000001000 0000007f
//	CR0=80050033 CR2=00007f… CR3=… CR4=00350ef0
//	DR0=0000000000000000 DR1=0000000000000000 DR2=0000000000000000 DR3=0000000000000000
func parseRegisters(text string) ([]registers, error) {
	var list []registers
	if len(text) > maxRegisters {
		return nil, errRegisters
	}
	for line := range strings.Lines(text) {
		line = strings.TrimSpace(line)
		if number, ok := strings.CutPrefix(line, "CPU#"); ok {
			n, err := strconv.Atoi(number)
			if err != nil || n < 0 || n >= maxCPUs || len(list) == maxCPUs {
				return nil, errRegisters
			}
			list = append(list, registers{cpu: n})
			continue
		}
		if len(list) == 0 {
			continue
		}
		r := &list[len(list)-1]
		named := map[string]*uint64{"GDT": &r.gdt, "IDT": &r.idt, "CR0": &r.cr0, "CR4": &r.cr4, "DR7": &r.dr7,
			"DR0": &r.dr[0], "DR1": &r.dr[1], "DR2": &r.dr[2], "DR3": &r.dr[3]}
		name, rest, _ := strings.Cut(line, "=")
		switch name {
		case "GDT", "IDT", "CR0", "DR0", "DR6":
		default:
			continue
		}
		for rest != "" {
			var value, next string
			if fields := strings.Fields(rest); len(fields) > 0 {
				value = fields[0]
				next = strings.Join(fields[1:], " ")
			}
			if at := named[name]; at != nil {
				v, err := strconv.ParseUint(value, 16, 64)
				if err != nil {
					return nil, errRegisters
				}
				*at = v
			}
			name, rest, _ = strings.Cut(next, "=")
		}
	}
	if len(list) == 0 {
		return nil, errRegisters
	}
	return list, nil
}

// CheckRegisters compares what the CPUs hold with what the kernel set: where their interrupt table and descriptors are,
// that they heed the page tables, and that nothing but the kernel's own breakpoints is in their debug registers.
func (g *Guest) CheckRegisters(text string) ([]Finding, error) {
	list, err := parseRegisters(text)
	if err != nil {
		return nil, err
	}
	return g.look(func(c *control) error { return c.registers(list) })
}

// processor is CheckRegisters for the checker.
func (c *Checker) registers() (Result, error) {
	if c.Processor == nil {
		return Result{Views: []View{{Name: "registers", Unknown: "QEMU was not asked"}}}, nil
	}
	text, err := c.Processor.Registers()
	if err != nil {
		return Result{}, err
	}
	list, err := parseRegisters(text)
	if err != nil {
		return Result{}, err
	}
	res, err := c.control("registers", func(k *control) error { return k.registers(list) })
	if err == nil {
		res.Views[0].Count = len(list)
	}
	return res, err
}

func (c *control) registers(list []registers) error {
	descr, err := c.symbolAddr("idt_descr")
	if err != nil {
		return err
	}
	idt, err := c.space.U64(descr + 2)
	if err != nil {
		return err
	}
	pinned := uint64(0)
	if at := c.known("cr4_pinned_bits"); at != 0 {
		pinned, _ = c.space.U64(at)
	}
	byCPU := map[int]registers{}
	for _, r := range list {
		byCPU[r.cpu] = r
	}
	return c.eachCPU(func(cpu int, offset uint64) error {
		r, ok := byCPU[cpu]
		if !ok || r.cr0 == 0 || r.idt == 0 {
			return nil // it does not run
		}
		report := func(register, detail string, s Severity) {
			c.found(Finding{Kind: "register.changed", Subject: fmt.Sprintf("%s of CPU %d", register, cpu), Severity: s, Detail: detail})
		}
		if r.idt != idt {
			report("IDTR", fmt.Sprintf("the CPU's interrupt table is at %#x, not where the kernel's is, %#x", r.idt, idt), Critical)
		}
		if page, err := c.profile.Symbol("gdt_page"); err == nil {
			got, err1 := c.space.Translate(r.gdt)
			want, err2 := c.space.Translate(page + offset)
			if err2 == nil && (err1 != nil || got != want) {
				report("GDTR", fmt.Sprintf("the CPU's descriptors are at %#x, not the kernel's", r.gdt), Critical)
			}
		}
		if r.cr0&cr0WriteProtect == 0 {
			report("CR0", "the CPU writes to read-only pages: write protection is off", Critical)
		}
		if r.cr4&pinned != pinned {
			report("CR4", fmt.Sprintf("the CPU's protections %#x are off, which the kernel pins", pinned&^r.cr4), Critical)
		}
		c.debugRegisters(cpu, offset, r, report)
		return nil
	})
}

// debugRegisters looks for breakpoints in the kernel that the kernel does not know of.
func (c *control) debugRegisters(cpu int, offset uint64, r registers, report func(register, detail string, s Severity)) {
	slots, err := c.profile.Symbol("bp_per_reg")
	if err != nil {
		return
	}
	for i, at := range r.dr {
		if r.dr7>>(2*i)&3 == 0 || at < kernelHalf {
			continue // off, or in a program
		}
		if event, err := c.space.U64(slots + offset + uint64(i)*8); err == nil && event == 0 {
			report(fmt.Sprintf("DR%d", i), "a breakpoint at "+c.where(at)+", which the kernel did not set", Critical)
		}
	}
}
