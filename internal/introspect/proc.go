package introspect

import (
	"encoding/binary"

	"vigia/internal/event"
)

const maxProcFiles = 1 << 15

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
