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
	maxInodes    = 1 << 15 // of all file systems, in one check
	maxInodeSize = 4096
)

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
