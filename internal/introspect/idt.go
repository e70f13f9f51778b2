package introspect

import (
	"encoding/binary"
	"fmt"
	"strings"
)

// CheckIDT reports gates of the interrupt descriptor table that do not lead to the kernel's own entry points, and
// descriptors of the CPUs' GDTs through which a user's program could enter the kernel by itself.
//
// All CPUs share idt_table, which they see through a read-only page of the CPU entry area. What their IDTR really holds
// is in no memory; QEMU can be asked for it (CheckRegisters).
func (g *Guest) CheckIDT() ([]Finding, error) { return g.look((*control).idt) }

const (
	vectors     = 256
	gateSize    = 16
	kernelCS    = 0x10
	gateIRQ     = 0xe // type of an interrupt gate; the kernel makes no others
	firstIRQ    = 0x20
	systemFirst = 0xe0 // no kernel has system vectors below
	vectorInt80 = 0x80
)

// exceptions are the entry points by vector (arch/x86/kernel/idt.c); those that a kernel may lack, or leave at its early
// handler, too.
var exceptions = map[int][]string{
	0: {"asm_exc_divide_error"}, 1: {"asm_exc_debug"}, 2: {"asm_exc_nmi"}, 3: {"asm_exc_int3"}, 4: {"asm_exc_overflow"},
	5: {"asm_exc_bounds"}, 6: {"asm_exc_invalid_op"}, 7: {"asm_exc_device_not_available"}, 8: {"asm_exc_double_fault"},
	9: {"asm_exc_coproc_segment_overrun"}, 10: {"asm_exc_invalid_tss"}, 11: {"asm_exc_segment_not_present"},
	12: {"asm_exc_stack_segment"}, 13: {"asm_exc_general_protection"}, 14: {"asm_exc_page_fault"},
	15: {"asm_exc_spurious_interrupt_bug"}, 16: {"asm_exc_coprocessor_error"}, 17: {"asm_exc_alignment_check"},
	18: {"asm_exc_machine_check"}, 19: {"asm_exc_simd_coprocessor_error"}, 20: {"asm_exc_virtualization_exception"},
	21: {"asm_exc_control_protection"}, 29: {"asm_exc_vmm_communication"},
	vectorInt80: {"asm_int80_emulation", "entry_INT80_compat"},
	0xec:        {"asm_sysvec_apic_timer_interrupt"}, 0xf6: {"asm_sysvec_irq_work"}, 0xf7: {"asm_sysvec_x86_platform_ipi"},
	0xf8: {"asm_sysvec_reboot"}, 0xf9: {"asm_sysvec_threshold"}, 0xfa: {"asm_sysvec_thermal"},
	0xfb: {"asm_sysvec_call_function_single"}, 0xfc: {"asm_sysvec_call_function"}, 0xfd: {"asm_sysvec_reschedule_ipi"},
	0xfe: {"asm_sysvec_error_interrupt"}, 0xff: {"asm_sysvec_spurious_apic_interrupt"},
}

func (c *control) idt() error {
	table, err := c.symbolAddr("idt_table")
	if err != nil {
		return err
	}
	b, err := c.table(table, vectors*gateSize)
	if err != nil {
		return err
	}
	for v := range vectors {
		c.gate(v, table+uint64(v)*gateSize, b[v*gateSize:][:gateSize])
	}
	c.idtPage(table)
	return c.eachCPU(c.gdt)
}

// gate looks at one entry: offset 0..15, selector, ist and zero, type, dpl and present, offset 16..31, offset 32..63.
func (c *control) gate(vector int, at uint64, b []byte) {
	le := binary.LittleEndian
	target := uint64(le.Uint16(b)) | uint64(le.Uint16(b[6:]))<<16 | uint64(le.Uint32(b[8:]))<<32
	bits := le.Uint16(b[4:])
	if bits>>15 == 0 {
		return // not present
	}
	subject := fmt.Sprintf("vector %d", vector)
	report := func(s Severity, detail string) {
		c.found(Finding{Kind: "idt.changed", Subject: subject, Detail: detail, Severity: s,
			Evidence: []Evidence{{Address: at, Bytes: append([]byte(nil), b...), Note: "gate to " + c.where(target)}}})
	}
	switch {
	case !c.entry(vector, target):
		detail := fmt.Sprintf("interrupt %d enters %s", vector, c.where(target))
		if names := exceptions[vector]; names != nil {
			detail += ", not " + names[0]
		}
		report(Critical, detail)
	case le.Uint16(b[2:]) != kernelCS || bits>>8&0x1f != gateIRQ:
		report(High, fmt.Sprintf("the gate of interrupt %d has selector %#x and type %#x", vector, le.Uint16(b[2:]), bits>>8&0x1f))
	case bits>>13&3 != 0 && vector != 3 && vector != 4 && vector != vectorInt80:
		report(High, fmt.Sprintf("interrupt %d may be raised by any program", vector))
	}
}

// entry says whether a gate leads where it should.
func (c *control) entry(vector int, target uint64) bool {
	switch c.code.at(target).owner {
	case ownerKernel:
		name := c.symbol(target)
		if names := exceptions[vector]; names != nil && c.has(names) {
			for _, n := range names {
				if name == n || name == "xen_"+n || c.known(n) == target {
					return true
				}
			}
			return vector == 0xec && strings.HasPrefix(name, "asm_sysvec_") // another timer's
		}
		return vector >= firstIRQ && (strings.HasPrefix(name, "asm_sysvec_") ||
			c.stub("irq_entries_start", vector-firstIRQ, target) || vector >= systemFirst && c.spurious(target))
	case ownerFreed:
		// Exceptions that the kernel has no handler for keep what the first stage of the boot set.
		return vector < firstIRQ && c.early(vector, target)
	}
	return false
}

// has says that the kernel was built with one of the entry points of these names.
func (c *control) has(names []string) bool {
	for _, n := range names {
		if c.known(n) != 0 {
			return true
		}
	}
	return false
}

// known is symbolAddr for those who only compare: 0 where there is none. Several names may stand at one address.
func (c *control) known(name string) uint64 {
	addr, _ := c.symbolAddr(name)
	return addr
}

// stub says that target is the n-th of the equal pieces that start at a symbol: 8 bytes each, 16 in a kernel built for
// indirect branch tracking.
func (c *control) stub(symbol string, n int, target uint64) bool {
	base := c.known(symbol)
	return base != 0 && (target == base+uint64(n)*8 || target == base+uint64(n)*16)
}

func (c *control) spurious(target uint64) bool {
	base := c.known("spurious_entries_start")
	return base != 0 && target >= base && (target-base)%8 == 0 && target-base < (vectors-systemFirst)*16
}

// early says that target is the vector's piece of the early handlers: 9 bytes each, 13 with endbr64.
func (c *control) early(vector int, target uint64) bool {
	base := c.known("early_idt_handler_array")
	return base != 0 && (target == base+uint64(vector)*9 || target == base+uint64(vector)*13)
}

// idtPage checks that what the CPUs are told of is idt_table.
func (c *control) idtPage(table uint64) {
	descr := c.known("idt_descr")
	if descr == 0 {
		return
	}
	b, err := c.table(descr, 10) // limit, address
	if err != nil {
		return
	}
	address := binary.LittleEndian.Uint64(b[2:])
	got, err1 := c.space.Translate(address)
	want, err2 := c.space.Translate(table)
	if err2 != nil || err1 == nil && got == want && binary.LittleEndian.Uint16(b) == vectors*gateSize-1 {
		return
	}
	c.found(Finding{Kind: "idt.changed", Subject: "idt_descr", Severity: Critical,
		Detail:   fmt.Sprintf("the interrupt table that CPUs load is at %#x, not idt_table", address),
		Evidence: []Evidence{{Address: descr, Bytes: append([]byte(nil), b...), Note: "descriptor of the table"}}})
}

// eachCPU calls look with the number of each possible CPU and how far its own variables lie from the per-CPU symbols.
func (c *control) eachCPU(look func(cpu int, offset uint64) error) error {
	offsets, err := c.symbolAddr("__per_cpu_offset")
	if err != nil {
		return err
	}
	count, err := c.symbolAddr("nr_cpu_ids")
	if err != nil {
		return err
	}
	n, err := c.space.U32(count)
	if err != nil {
		return err
	}
	for cpu := range int(min(n, maxCPUs)) {
		offset, err := c.space.U64(offsets + uint64(cpu)*8)
		if err != nil {
			return err
		}
		if offset == 0 || c.space.Read(offset, make([]byte, 8)) != nil {
			continue // never brought up
		}
		if err := look(cpu, offset); err != nil {
			return err
		}
	}
	return nil
}

// gdt looks for system descriptors that are no TSS: a call gate lets any program call whatever it holds.
func (c *control) gdt(cpu int, offset uint64) error {
	page, err := c.profile.Symbol("gdt_page")
	if err != nil {
		return errNotBuilt
	}
	const entries = 16
	b, err := c.table(page+offset, entries*8)
	if err != nil {
		return nil
	}
	for i := 0; i < entries; i++ {
		d := binary.LittleEndian.Uint64(b[i*8:])
		if d>>47&1 == 0 { // not present
			continue
		}
		kind, dpl := d>>40&0xf, d>>45&3
		code := d>>43&3 == 3 // of those that are no system descriptors
		if d>>44&1 == 0 {
			if kind == 9 || kind == 11 || kind == 2 { // a TSS or an LDT: two entries long
				i++
				continue
			}
		} else if !code || dpl == 0 || dpl == 3 {
			continue
		}
		c.found(Finding{Kind: "idt.changed", Subject: fmt.Sprintf("GDT of CPU %d, entry %d", cpu, i), Severity: Critical,
			Detail:   "a descriptor that the kernel never makes: through it programs can enter the kernel",
			Evidence: []Evidence{{Address: page + offset + uint64(i)*8, Bytes: append([]byte(nil), b[i*8:][:8]...)}}})
	}
	return nil
}
