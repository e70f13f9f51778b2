package introspect

import "fmt"

const maxTerminals = 1024

// terminals looks at terminals, their drivers and line disciplines: who hooks one of those reads what is typed.
func (c *control) terminals() error {
	drivers, err := c.symbolAddr("tty_drivers")
	r := c.resolver()
	link, ops := r.field("tty_driver", "tty_drivers"), r.field("tty_driver", "ops")
	ttys, count := r.field("tty_driver", "ttys"), r.field("tty_driver", "num")
	tops, ldisc, lops := r.field("tty_struct", "ops"), r.field("tty_struct", "ldisc"), r.field("tty_ldisc", "ops")
	size, lsize := r.size("tty_operations"), r.size("tty_ldisc_ops")
	if err != nil || r.err != nil {
		return errNotBuilt
	}
	if table := c.known("tty_ldiscs"); table != 0 {
		b, err := c.table(table, c.entries(table, 64)*8)
		if err == nil {
			for i, v := range pointersIn(b) {
				c.operations(fmt.Sprintf("line discipline %d", i), table+uint64(i)*8, v, lsize)
			}
		}
	}
	return c.walk(drivers, func(node uint64) error {
		driver := node - link
		read := reader{s: c.space}
		table, array, n := read.u64(driver+ops), read.u64(driver+ttys), read.u32(driver+count)
		if read.err != nil {
			return ErrTorn
		}
		c.operations("a terminal's driver", driver+ops, table, size)
		if array == 0 {
			return nil
		}
		b, err := c.table(array, int(min(n, maxTerminals))*8)
		if err != nil {
			return nil
		}
		for i, tty := range pointersIn(b) {
			if tty == 0 {
				continue
			}
			read := reader{s: c.space}
			table, discipline := read.u64(tty+tops), read.u64(tty+ldisc)
			subject := fmt.Sprintf("terminal %d", i)
			c.operations(subject, tty+tops, table, size)
			if table, err := c.space.U64(discipline + lops); err == nil && discipline != 0 {
				c.operations(subject, discipline+lops, table, lsize)
			}
		}
		return nil
	})
}
