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

// registers is CheckRegisters for the checker.
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
	return c.control("registers", func(k *control) error { return k.registers(list) })
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
	// Which of the kernel's CPUs is which of QEMU's is not known: what one of them has, each may.
	tables, events := map[uint64]bool{}, [4]bool{}
	page, errPage := c.profile.Symbol("gdt_page")
	slots, errSlots := c.profile.Symbol("bp_per_reg")
	err = c.eachCPU(func(cpu int, offset uint64) error {
		if pa, err := c.space.Translate(page + offset); err == nil {
			tables[pa] = true
		}
		for i := range events {
			event, err := c.space.U64(slots + offset + uint64(i)*8)
			events[i] = events[i] || err == nil && event != 0
		}
		return nil
	})
	if err != nil {
		return err
	}
	for _, r := range list {
		if r.cr0 == 0 || r.idt == 0 {
			continue // it does not run
		}
		c.looked++
		report := func(register, detail string) {
			c.found(Finding{Kind: "register.changed", Subject: fmt.Sprintf("%s of CPU %d", register, r.cpu), Severity: Critical, Detail: detail})
		}
		if r.idt != idt {
			report("IDTR", fmt.Sprintf("the CPU's interrupt table is at %#x, not where the kernel's is, %#x", r.idt, idt))
		}
		if pa, err := c.space.Translate(r.gdt); errPage == nil && (err != nil || !tables[pa]) {
			report("GDTR", fmt.Sprintf("the CPU's descriptors are at %#x, not the kernel's", r.gdt))
		}
		if r.cr0&cr0WriteProtect == 0 {
			report("CR0", "the CPU writes to read-only pages: write protection is off")
		}
		if r.cr4&pinned != pinned {
			report("CR4", fmt.Sprintf("the CPU's protections %#x are off, which the kernel pins", pinned&^r.cr4))
		}
		for i, at := range r.dr {
			if r.dr7>>(2*i)&3 != 0 && at >= kernelHalf && errSlots == nil && !events[i] {
				report(fmt.Sprintf("DR%d", i), "a breakpoint at "+c.where(at)+", which the kernel did not set")
			}
		}
	}
	return nil
}
