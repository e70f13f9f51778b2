package introspect

import (
	"encoding/binary"
	"fmt"
	"strings"
)

// CheckSyscalls reports entries of the tables of system calls that do not lead to a system call of the kernel's.
//
// Since Linux 6.9, and in kernels that took that change back to older ones (6.1.86), the table is for tracing alone and
// calls are dispatched by a switch in x64_sys_call: code, which CheckText compares. Entries are looked at all the same:
// older tools still write there.
func (g *Guest) CheckSyscalls() ([]Finding, error) { return g.look((*control).syscalls) }

// syscallTables are the tables a kernel may have, and how the names of their functions begin.
var syscallTables = []string{"sys_call_table", "ia32_sys_call_table", "x32_sys_call_table"}

var syscallPrefixes = []string{"__x64_sys_", "__ia32_sys_", "__x64_compat_sys_", "__ia32_compat_sys_", "sys_ni_syscall", "__do_sys_ni"}

func (c *control) syscalls() error {
	for _, name := range syscallTables {
		table, err := c.symbolAddr(name)
		if err != nil {
			continue
		}
		n := c.entries(table, 1024)
		b, err := c.table(table, n*8)
		if err != nil {
			return err
		}
		for i := range n {
			c.syscall(name, i, table+uint64(i)*8, binary.LittleEndian.Uint64(b[i*8:]))
		}
	}
	return nil
}

// entries says how many pointers lie between a table and the next symbol, at most limit.
func (c *control) entries(table uint64, limit int) int {
	for n := 1; n < limit; n++ {
		if s, offset, ok := c.profile.SymbolAt(table - c.boot.Slide + uint64(n)*8); !ok || offset == 0 || s.Addr != table-c.boot.Slide {
			return n
		}
	}
	return limit
}

func (c *control) syscall(table string, number int, at, target uint64) {
	if target == 0 {
		return // what fills the table up to the next symbol
	}
	if c.code.at(target).owner == ownerKernel {
		for _, s := range c.profile.SymbolsAt(target - c.boot.Slide) {
			for _, prefix := range syscallPrefixes {
				if strings.HasPrefix(s.Name, prefix) {
					return
				}
			}
		}
	}
	subject := fmt.Sprintf("%s[%d]", table, number)
	c.found(Finding{Kind: "syscall.hooked", Subject: subject, Severity: Critical, Detail: fmt.Sprintf("system call %d leads to %s", number, c.where(target)),
		Evidence: []Evidence{pointerAt(at, target, "pointer to "+c.where(target))}})
}
