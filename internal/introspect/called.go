package introspect

import (
	"strings"

	"vigia/internal/event"
)

// Called is a system call at its way out.
type Called struct {
	PID, TID int64
	Comm     string
	Call     Call
	Name     string // by the kernel's table; empty where it can't be told
	Text     string // the path among its arguments, where it has one: the caller's own words, which may have changed since
}

const (
	callEntry = "__x64_sys_" // what the functions of calls begin with
	maxCalls  = 1024
	maxText   = 256
)

// pathArgument says which argument of a call is a path.
var pathArgument = map[string]int{
	"open": 0, "creat": 0, "stat": 0, "newstat": 0, "lstat": 0, "newlstat": 0, "access": 0, "execve": 0, "unlink": 0, "mkdir": 0, "rmdir": 0, "chdir": 0,
	"chmod": 0, "chown": 0, "readlink": 0, "rename": 0, "link": 0, "symlink": 0, "truncate": 0, "statfs": 0, "umount": 0, "chroot": 0,
	"openat": 1, "openat2": 1, "newfstatat": 1, "faccessat": 1, "faccessat2": 1, "unlinkat": 1, "mkdirat": 1, "readlinkat": 1, "renameat": 1, "renameat2": 1,
	"fchmodat": 1, "fchownat": 1, "statx": 1, "execveat": 1, "mount": 1,
}

// Called reads the call that the task on a CPU is about to come back from.
func (g *Guest) Called(cpu int) (c Called, err error) {
	err = g.at(cpu, func(l *momentLayout, task uint64) (err error) {
		c, err = g.called(l, task)
		return err
	})
	return c, err
}

func (g *Guest) called(l *momentLayout, task uint64) (c Called, err error) {
	t := &g.layout.task
	r := reader{s: g.space}
	c.PID, c.TID = int64(int32(r.u32(task+t.tgid))), int64(int32(r.u32(task+t.pid)))
	comm := g.scratch[:16]
	r.bytes(task+t.comm, comm)
	c.Comm = event.Text(untilNUL(comm))
	mm := r.u64(task + t.mm)
	if r.err != nil {
		return Called{}, r.err
	}
	c.Call = g.call(l, task)
	c.Name = g.callName(c.Call.Number)
	if arg, ok := pathArgument[c.Name]; ok && mm != 0 {
		c.Text = g.userText(mm, c.Call.Args[arg])
	}
	return c, nil
}

// callName looks a call up in the kernel's table. Later kernels do not call by it any more, but have it still.
func (g *Guest) callName(number int64) string {
	if number < 0 || number >= maxCalls {
		return ""
	}
	if name, ok := g.callNames[number]; ok {
		return name
	}
	name := ""
	if table, err := g.profile.Symbol("sys_call_table"); err == nil {
		at, err := g.space.U64(table + g.boot.Slide + 8*uint64(number))
		s, offset, ok := g.profile.SymbolAt(at - g.boot.Slide)
		if err == nil && ok && offset == 0 {
			name, _ = strings.CutPrefix(s.Name, callEntry)
		}
	}
	if g.callNames == nil {
		g.callNames = map[int64]string{}
	}
	g.callNames[number] = name
	return name
}

// userText reads a text of a process's own memory, as far as it is present.
func (g *Guest) userText(mm, at uint64) string {
	pgd, err := g.space.U64(mm + g.layout.mm.pgd)
	if err != nil {
		return ""
	}
	root, err := g.space.Translate(pgd)
	if err != nil {
		return ""
	}
	g.user.Reset(root, g.boot.Levels)
	n, _ := g.user.ReadSome(at, g.scratch[:maxText])
	return event.Text(untilNUL(g.scratch[:n]))
}
