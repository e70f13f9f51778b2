package introspect

import (
	"fmt"
	"slices"
	"strings"
)

// The two ways in which a guest's sockets are found.
const (
	viewHeld   = "open files"    // what processes hold open
	viewTables = "socket tables" // where the kernel looks when a packet comes, and ss and /proc/net do
)

// socketsHidden compares them. What a process holds and can be spoken to through is in the kernel's tables: off them it is
// taken only to hide it. The other way round there are honest reasons (a descriptor on its way through a unix socket, one of
// the kernel's own), so that it is info.
func (c *Checker) socketsHidden() (res Result, err error) {
	g := c.guest
	err = g.view(func() error {
		l, err := g.socketLayout()
		if err != nil {
			return err
		}
		var held []Socket
		hashed := map[uint64]bool{}
		if err := g.heldSockets(l, &held); err != nil {
			return err
		}
		if err := g.hashedSockets(func(sk uint64, full bool) error { hashed[sk] = true; return nil }); err != nil {
			return err
		}
		res = Result{Views: []View{{Name: viewHeld, Count: len(held)}, {Name: viewTables, Count: len(hashed), Unknown: strings.Join(g.tableLayout().missing(), ", ")}}}
		seen := map[uint64]bool{}
		for _, s := range held {
			if seen[s.Sock] || hashed[s.Sock] || !inTables(&s) || g.tableLayout().unread(s.Protocol) {
				continue
			}
			seen[s.Sock] = true
			res.Findings = append(res.Findings, hiddenSocket(&s))
		}
		return nil
	})
	return res, err
}

// unread reports whether the kernel's table of a protocol can't be read.
func (l *tableLayout) unread(protocol string) bool {
	switch strings.TrimSuffix(protocol, "6") {
	case "tcp":
		return l.errTCP != nil
	case "udp":
		return l.errUDP != nil
	case "raw":
		return l.errRaw != nil
	case "unix":
		return l.errUnix != nil
	case "packet":
		return l.errPacket != nil
	}
	return true
}

// inTables reports whether a socket in this state is in the kernel's tables.
func inTables(s *Socket) bool {
	if len(s.Unknown) > 0 {
		return false
	}
	switch strings.TrimSuffix(s.Protocol, "6") {
	case "tcp":
		return slices.Contains([]string{"listen", "established", "fin-wait-1", "fin-wait-2", "close-wait", "last-ack", "closing"}, s.State)
	case "udp":
		return !strings.HasSuffix(s.Local, ":0")
	case "raw", "packet":
		return true
	case "unix":
		return s.Local != ""
	}
	return false
}

func hiddenSocket(s *Socket) Finding {
	subject := strings.TrimSpace(fmt.Sprintf("%s %s %s", s.Protocol, s.Local, s.Remote))
	return Finding{Kind: KindSocketHidden, Severity: High, Subject: subject, Listed: []string{viewHeld}, Missing: []string{viewTables},
		Process:  &Process{PID: s.PID, Comm: s.Comm},
		Detail:   fmt.Sprintf("the socket that %s holds open is missing from the kernel's tables of sockets", nameTask(s.Comm, s.PID)),
		Key:      fmt.Sprintf("%x %d", s.Sock, s.Inode),
		Evidence: []Evidence{{Address: s.Sock, Note: "struct sock"}}}
}
