package introspect

import (
	"bytes"

	"vigia/internal/event"
)

// image fills in what a process runs: its executable and its command line, both from its mm.
func (g *Guest) image(p *Process, mm uint64) {
	l := &g.layout.mm
	exe, err := g.space.U64(mm + l.exe)
	if err == nil && exe != 0 {
		p.Exe, err = g.filePath(exe)
	}
	if err != nil {
		p.Unknown = append(p.Unknown, "exe")
	}
	line, whole := g.cmdline(mm)
	// A process that ended or called exec meanwhile has left this mm, which may be another's by now.
	if now, err := g.space.Fresh(p.Task + g.layout.task.mm); err != nil || now != mm {
		p.Exe = ""
		p.Unknown = append(p.Unknown, "exe", "cmdline")
		return
	}
	p.Cmdline = line
	if !whole {
		p.Unknown = append(p.Unknown, "cmdline")
	}
}

// cmdline reads a process's arguments through its own page tables. Where a page is not in memory, whole is false and
// what comes before it is returned.
func (g *Guest) cmdline(mm uint64) (line string, whole bool) {
	l := &g.layout.mm
	r := reader{s: g.space}
	pgd, start, end := r.u64(mm+l.pgd), r.u64(mm+l.argStart), r.u64(mm+l.argEnd)
	envStart, envEnd := r.u64(mm+l.envStart), r.u64(mm+l.envEnd)
	if r.err != nil {
		return "", false
	}
	if start >= end {
		return "", true
	}
	if !g.copying {
		root, err := g.space.Translate(pgd)
		if err != nil {
			return "", false
		}
		g.user.Reset(root, g.boot.Levels)
	}
	args, whole := g.arguments(start, end)
	if !whole || envStart != end || envEnd < envStart || args[len(args)-1] == 0 {
		return joined(args), whole
	}
	// No NUL at the end: the process wrote itself a title over its arguments, on into its environment, as one text
	// (fs/proc/base.c: get_mm_proctitle).
	args, whole = g.arguments(start, envEnd)
	if title := untilNUL(args); len(title) < len(args) {
		return joined(title), true
	}
	return joined(args), whole
}

// arguments reads a process's memory from start up to end, or as far as it is present.
func (g *Guest) arguments(start, end uint64) (args []byte, whole bool) {
	args = g.scratch[:min(end-start, maxCmdline)]
	n, err := g.user.ReadSome(start, args)
	return args[:n], err == nil
}

// joined puts spaces where one argument ends and the next begins.
func joined(args []byte) string {
	args = bytes.TrimRight(args, "\x00")
	for i, c := range args {
		if c == 0 {
			args[i] = ' '
		}
	}
	return event.Text(args)
}

func untilNUL(b []byte) []byte {
	if i := bytes.IndexByte(b, 0); i >= 0 {
		return b[:i]
	}
	return b
}
