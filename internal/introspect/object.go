package introspect

import (
	"encoding/binary"
	"fmt"
	"slices"

	"vigia/internal/event"
	"vigia/internal/kernel"
)

// CheckOperations follows objects to their tables of functions: the files of /proc, every file system and its inodes in
// memory, open files, sockets, terminals, binary formats, input handlers.
func (g *Guest) CheckOperations() ([]Finding, error) {
	return g.look(all((*control).procFiles, (*control).inodes, (*control).openFiles, (*control).terminals, (*control).lists))
}

const (
	maxProcFiles = 1 << 15
	maxInodes    = 1 << 15 // of all file systems, in one check
	maxInodeSize = 4096
)

// procOwn are files of /proc that rootkits rewrite, by which of their tables, and what it is.
var procOwn = map[string]string{
	"/proc/modules ops": "modules_proc_ops", "/proc/kallsyms ops": "kallsyms_proc_ops", "/proc/kcore ops": "kcore_proc_ops",
	"/proc/kmsg ops": "kmsg_proc_ops", "/proc/stat ops": "stat_proc_ops", "/proc ops": "proc_root_operations",
	"/proc/net/tcp seq_ops": "tcp4_seq_ops", "/proc/net/tcp6 seq_ops": "tcp6_seq_ops", "/proc/net/udp seq_ops": "udp_seq_ops",
	"/proc/net/udp6 seq_ops": "udp6_seq_ops", "/proc/net/raw seq_ops": "raw_seq_ops", "/proc/net/raw6 seq_ops": "raw6_seq_ops",
	"/proc/net/packet seq_ops": "packet_seq_ops", "/proc/net/unix seq_ops": "unix_seq_ops",
}

type procLayout struct {
	ops, seq, write, iops, dops, name, mode     uint64
	subdir, node                                uint64
	fileSize, dirSize, seqSize, iSize, size, dS uint64
}

// procFiles walks the trees of /proc and of every namespace's /proc/net.
func (c *control) procFiles() error {
	r, l := c.resolver(), procLayout{}
	l.ops, l.seq = r.field("proc_dir_entry", "proc_ops"), r.field("proc_dir_entry", "seq_ops")
	l.write, l.iops, l.dops = r.field("proc_dir_entry", "write"), r.field("proc_dir_entry", "proc_iops"), r.field("proc_dir_entry", "proc_dops")
	l.name, l.mode = r.field("proc_dir_entry", "name"), r.field("proc_dir_entry", "mode")
	l.subdir, l.node = r.field("proc_dir_entry", "subdir"), r.field("proc_dir_entry", "subdir_node")
	l.fileSize, l.dirSize, l.seqSize = r.size("proc_ops"), r.size("file_operations"), r.size("seq_operations")
	l.iSize, l.size, l.dS = r.size("inode_operations"), r.size("proc_dir_entry"), r.size("dentry_operations")
	link, net := r.field("net", "list"), r.optional("net", "proc_net")
	root, err := c.symbolAddr("proc_root")
	if r.err != nil || err != nil || l.size > maxOperations {
		return errNotBuilt
	}
	n := 0
	if err := c.procFile(&l, root, "/proc", true, &n); err != nil {
		return err
	}
	namespaces := c.known("net_namespace_list")
	if namespaces == 0 || net == noField {
		return nil
	}
	spaces := 0
	return c.walk(namespaces, func(node uint64) error {
		if spaces++; spaces > maxNamespaces {
			return ErrEndless
		}
		entry, err := c.space.U64(node - link + net)
		if err != nil || entry == 0 {
			return nil // it is being made
		}
		return c.procFile(&l, entry, "/proc/net", true, &n) // whose mode nobody sets
	})
}

// procFile looks at one struct proc_dir_entry and those below it.
func (c *control) procFile(l *procLayout, entry uint64, path string, directory bool, n *int) error {
	if *n++; *n > maxProcFiles || len(path) > maxPath {
		return ErrEndless
	}
	b, err := c.table(entry, int(l.size))
	if err != nil {
		return ErrTorn
	}
	at := func(off uint64) uint64 { return binary.LittleEndian.Uint64(b[off:]) }
	ops, seq, write, iops, dops := at(l.ops), at(l.seq), at(l.write), at(l.iops), at(l.dops)
	directory = directory || binary.LittleEndian.Uint16(b[l.mode:])>>12 == 4
	size := l.fileSize
	if directory {
		size = l.dirSize
	}
	c.procTable(path, entry+l.ops, ops, size, "ops")
	c.operations(path, entry+l.iops, iops, l.iSize)
	c.operations(path, entry+l.dops, dops, l.dS)
	c.hooked("operations.changed", path, "a write to "+path, entry+l.write, write)
	if c.code.at(seq).owner != ownerNone { // a file of one text is shown by a function alone
		c.hooked("operations.changed", path, "reading "+path, entry+l.seq, seq)
	} else {
		c.procTable(path, entry+l.seq, seq, l.seqSize, "seq_ops")
	}
	if !directory {
		return nil
	}
	return c.tree(entry+l.subdir, func(node uint64) error {
		child := node - l.node
		pointer, err := c.space.U64(child + l.name)
		if err != nil {
			return ErrTorn
		}
		name, err := c.space.CString(pointer, 64)
		if err != nil && len(name) == 0 {
			return ErrTorn
		}
		return c.procFile(l, child, path+"/"+event.Text(name), false, n)
	})
}

// procTable is operations for a file that may be known to have one of its own.
func (c *control) procTable(path string, pointer, table, size uint64, which string) {
	c.operations(path, pointer, table, size)
	own, want := procOwn[path+" "+which], uint64(0)
	if own != "" {
		want = c.known(own)
	}
	if want == 0 || table == want || !c.inImage(table) {
		return
	}
	is := c.symbol(table)
	e := pointerAt(pointer, table, "pointer to "+is)
	e.Expected = binary.LittleEndian.AppendUint64(nil, want)
	c.found(Finding{Kind: "operations.changed", Subject: path, Severity: Critical, Detail: path + " is served by " + is + ", not " + own,
		Evidence: []Evidence{e}})
}

// inodes looks at the file systems, and at the inodes that they have in memory.
func (c *control) inodes() error {
	blocks, err := c.symbolAddr("super_blocks")
	r := c.resolver()
	link, ops, dops := r.field("super_block", "s_list"), r.field("super_block", "s_op"), r.field("super_block", "s_d_op")
	list, id := r.field("super_block", "s_inodes"), r.field("super_block", "s_id")
	node, iop, fop := r.field("inode", "i_sb_list"), r.field("inode", "i_op"), r.field("inode", "i_fop")
	aops, number := r.field("inode", "i_data.a_ops"), r.field("inode", "i_ino")
	opsSize, dSize, iSize, fSize, aSize := r.size("super_operations"), r.size("dentry_operations"), r.size("inode_operations"), r.size("file_operations"), r.size("address_space_operations")
	size := r.size("inode")
	if err != nil || r.err != nil || size > maxInodeSize || max(iop, fop, aops, number, node)+8 > size {
		return errNotBuilt
	}
	left := maxInodes
	return c.loose(blocks, maxNamespaces, func(at uint64) {
		block := at - link
		read := reader{s: c.space}
		name := make([]byte, 32)
		read.bytes(block+id, name)
		table, dtable := read.u64(block+ops), read.u64(block+dops)
		if read.err != nil {
			return
		}
		fs := "file system " + event.Text(untilNUL(name))
		c.operations(fs, block+ops, table, opsSize)
		c.operations(fs, block+dops, dtable, dSize)
		_ = c.loose(block+list, left, func(at uint64) {
			left--
			inode := at - node
			b, err := c.table(inode, int(size))
			if err != nil {
				return
			}
			word := func(off uint64) uint64 { return binary.LittleEndian.Uint64(b[off:]) }
			i, f, a := word(iop), word(fop), word(aops)
			if c.checked[i] && c.checked[f] && (a == 0 || c.checked[a]) {
				c.looked++
				return
			}
			subject := fmt.Sprintf("inode %d of %s", word(number), fs)
			c.operations(subject, inode+iop, i, iSize)
			c.operations(subject, inode+fop, f, fSize)
			c.operations(subject, inode+aops, a, aSize)
		})
	})
}

// loose follows a circular list by its next pointers alone, as the kernel does, up to most elements: what changes too
// often to be whole, and where one look more or less does no harm.
func (c *control) loose(head uint64, most int, visit func(node uint64)) error {
	node, err := c.space.U64(head)
	for n := 0; err == nil && node != head && n < most; n++ {
		at := node
		node, err = c.space.U64(at)
		if err == nil {
			visit(at)
		}
	}
	if c.meter.left <= 0 {
		return ErrEndless
	}
	return nil
}

// openFiles looks at what processes hold open: a file has a table of its own, which may differ from its inode's.
func (c *control) openFiles() error {
	r := c.resolver()
	fop := r.field("file", "f_op")
	size := r.size("file_operations")
	if r.err != nil {
		return errNotBuilt
	}
	s := c.socketTables()
	return c.eachFile(0, func(f openFile) error {
		table, err := c.space.U64(f.file + fop)
		if err != nil {
			return nil
		}
		c.operations(fmt.Sprintf("file %d of %s", f.fd, nameTask(f.comm, f.pid)), f.file+fop, table, size)
		if s != nil && table == s.files {
			c.socketOf(s, f)
		}
		return nil
	})
}

type socketTables struct {
	files, private, sock, ops, proto uint64
	calls                            []uint64 // pointers to functions in a sock
	opsSize, protoSize               uint64
}

func (c *control) socketTables() *socketTables {
	r, s := c.resolver(), &socketTables{files: c.known("socket_file_ops")}
	s.private, s.sock, s.ops = r.field("file", "private_data"), r.field("socket", "sk"), r.field("socket", "ops")
	s.proto = r.field("sock", "__sk_common.skc_prot")
	for _, f := range []string{"sk_state_change", "sk_data_ready", "sk_write_space", "sk_error_report", "sk_backlog_rcv", "sk_destruct"} {
		s.calls = append(s.calls, r.field("sock", f))
	}
	s.opsSize, s.protoSize = r.size("proto_ops"), r.size("proto")
	if r.err != nil || s.files == 0 {
		return nil
	}
	return s
}

func (c *control) socketOf(s *socketTables, f openFile) {
	r := reader{s: c.space}
	sock := r.u64(f.file + s.private)
	ops, sk := r.u64(sock+s.ops), r.u64(sock+s.sock)
	proto := r.u64(sk + s.proto)
	if r.err != nil || sk == 0 {
		return
	}
	subject := fmt.Sprintf("socket %d of %s", f.fd, nameTask(f.comm, f.pid))
	c.operations(subject, sock+s.ops, ops, s.opsSize)
	c.operations(subject, sk+s.proto, proto, s.protoSize)
	for _, call := range s.calls {
		if target, err := c.space.U64(sk + call); err == nil {
			c.hooked("operations.changed", subject, "an event of "+subject, sk+call, target)
		}
	}
}

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

// pointersIn splits what was read into pointers; they outlive the memory that was read to.
func pointersIn(b []byte) []uint64 {
	list := make([]uint64, 0, len(b)/8)
	for ; len(b) >= 8; b = b[8:] {
		list = append(list, binary.LittleEndian.Uint64(b))
	}
	return list
}

// registered are lists of structs with pointers to functions.
var registered = []struct {
	head, typ, link string
	calls           []string
	what            string
}{
	{"formats", "linux_binfmt", "lh", []string{"load_binary", "load_shlib", "core_dump"}, "a binary format"},
	{"input_handler_list", "input_handler", "node", []string{"event", "events", "filter", "match", "connect"}, "an input handler"},
}

func (c *control) lists() error {
	for _, l := range registered {
		link, err := c.profile.Offset(l.typ, l.link)
		head, ok := c.listHead(l.head)
		if err != nil || !ok {
			continue
		}
		err = c.walk(head, func(node uint64) error {
			for _, call := range l.calls {
				off, err := c.profile.Offset(l.typ, call)
				if err != nil {
					continue // a name of another version's
				}
				if target, err := c.space.U64(node - link + off); err == nil {
					c.hooked("operations.changed", l.head, l.what, node-link+off, target)
				}
			}
			return nil
		})
		if err != nil {
			return err
		}
	}
	return nil
}

// listHead finds the list of a name that several symbols may share: the one in writable memory.
func (c *control) listHead(name string) (uint64, bool) {
	writable := c.known("_sdata")
	found := slices.DeleteFunc(c.profile.SymbolsNamed(name), func(s kernel.Symbol) bool { return s.Addr+c.boot.Slide < writable })
	if len(found) != 1 {
		return 0, false
	}
	return found[0].Addr + c.boot.Slide, true
}
