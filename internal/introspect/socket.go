package introspect

import (
	"fmt"
	"net/netip"

	"vigia/internal/event"
)

// Socket is one of the guest's sockets: a row for each process that holds it open, or one for none.
type Socket struct {
	Protocol string `json:"protocol"` // tcp, udp, icmp, raw, unix, packet, netlink, …; tcp6 and so on over IPv6
	Local    string `json:"local"`    // address:port, or the path of a unix socket, @ before an abstract one
	Remote   string `json:"remote"`   // address:port; empty where there is none
	State    string `json:"state"`    // TCP's states, listen, established, unconnected
	PID      int64  `json:"pid"`
	Comm     string `json:"comm"`
	FD       int    `json:"fd"`
	Inode    uint64 `json:"inode"`
	Owner    string `json:"owner"`         // process; kernel; none: a closed connection's last packets, one not yet accepted; unknown
	UID      uint32 `json:"uid"`           // of its maker, in the first user namespace
	Net      uint64 `json:"net_namespace"` // inode number

	Unknown []string `json:"unknown,omitempty"`

	Sock uint64 `json:"-"` // address of the struct sock
}

// Owners of a socket that is in no process's table of files.
const (
	heldByProcess = "process"
	heldByKernel  = "kernel" // the kernel's own use
	heldByNone    = "none"
	heldUnknown   = "unknown" // it has a file, which no process on the list holds: on its way to another, say
)

type socketLayout struct {
	sk                                              uint64
	family, state, num, dport, saddr, daddr         uint64
	saddr6, daddr6, typ, protocol                   uint64
	unixAddr, unixPeer, unixLen, unixName, backlink uint64
	net, netInum, uid, back                         uint64
	packetNum, packetIndex, substate                uint64
}

func (g *Guest) socketLayout() (*socketLayout, error) {
	if g.sockets != nil {
		return g.sockets, nil
	}
	r, l := &resolver{p: g.profile}, &socketLayout{}
	l.sk, l.backlink = r.field("socket", "sk"), r.field("socket", "file")
	l.family, l.state = r.field("sock", "__sk_common.skc_family"), r.field("sock", "__sk_common.skc_state")
	l.num, l.dport = r.field("sock", "__sk_common.skc_num"), r.field("sock", "__sk_common.skc_dport")
	l.saddr, l.daddr = r.field("sock", "__sk_common.skc_rcv_saddr"), r.field("sock", "__sk_common.skc_daddr")
	l.saddr6, l.daddr6 = r.optional("sock", "__sk_common.skc_v6_rcv_saddr"), r.optional("sock", "__sk_common.skc_v6_daddr")
	l.typ, l.protocol = r.field("sock", "sk_type"), r.field("sock", "sk_protocol")
	l.net, l.netInum = r.optional("sock", "__sk_common.skc_net.net"), r.optional("net", "ns.inum")
	l.uid, l.back = r.optional("sock", "sk_uid"), r.optional("sock", "sk_socket")
	l.packetNum, l.packetIndex = r.optional("packet_sock", "num"), r.optional("packet_sock", "ifindex")
	l.substate = r.optional("inet_timewait_sock", "tw_substate")
	// AF_UNIX may be a module: without it there are no such sockets either.
	l.unixAddr, l.unixPeer = r.optional("unix_sock", "addr"), r.optional("unix_sock", "peer")
	l.unixLen, l.unixName = r.optional("unix_address", "len"), r.optional("unix_address", "name")
	if r.err != nil {
		return nil, r.err
	}
	g.sockets = l
	g.profile.Trim()
	return l, nil
}

// Address families, protocols and types (socket.h, in.h, net.h).
const (
	familyUnix    = 1
	familyIPv4    = 2
	familyIPv6    = 10
	familyNetlink = 16
	familyPacket  = 17
	familyVsock   = 40

	protoICMP   = 1
	protoTCP    = 6
	protoUDP    = 17
	protoICMPv6 = 58
	protoMPTCP  = 262
	sockRaw     = 3

	stateListen      = 10
	stateEstablished = 1
	stateClose       = 7
)

var tcpStates = [...]string{"unknown", "established", "syn-sent", "syn-recv", "fin-wait-1", "fin-wait-2", "time-wait", "close", "close-wait", "last-ack", "listen", "closing", "new-syn-recv"}

// Sockets lists all sockets: those that processes hold open, from their tables of files, and those that are only in the
// kernel's own tables (SocketsByTables), for each of which Owner says what is known. A socket that several hold is listed for
// each.
func (g *Guest) Sockets() ([]Socket, error) {
	return g.socketView(func(l *socketLayout, list *[]Socket) error {
		if err := g.heldSockets(l, list); err != nil {
			return err
		}
		held := make(map[uint64]bool, len(*list))
		for i := range *list {
			held[(*list)[i].Sock] = true
		}
		return g.hashedSockets(func(sk uint64, full bool) error {
			if held[sk] {
				return nil
			}
			s := Socket{FD: -1, Sock: sk}
			g.describe(l, &s, full)
			s.Owner = g.owner(l, &s, full)
			return appendSocket(list, s)
		})
	})
}

// SocketsByFiles lists the sockets that processes hold open.
func (g *Guest) SocketsByFiles() ([]Socket, error) {
	return g.socketView(g.heldSockets)
}

// SocketsByTables lists the sockets that are in the tables by which the kernel finds them when a packet comes: TCP's of
// connections, of what is left of them, and of listeners, UDP's, the raw ones', the packet ones' and the unix ones'. They
// have no owner here. A socket that is not bound is in none of them.
func (g *Guest) SocketsByTables() ([]Socket, error) {
	return g.socketView(func(l *socketLayout, list *[]Socket) error {
		return g.hashedSockets(func(sk uint64, full bool) error {
			s := Socket{FD: -1, Sock: sk, Owner: heldUnknown}
			g.describe(l, &s, full)
			return appendSocket(list, s)
		})
	})
}

func (g *Guest) socketView(fill func(*socketLayout, *[]Socket) error) ([]Socket, error) {
	list := []Socket{}
	err := g.view(func() error {
		list = list[:0]
		l, err := g.socketLayout()
		if err != nil {
			return err
		}
		return fill(l, &list)
	})
	if err != nil {
		return nil, err
	}
	return list, nil
}

func appendSocket(list *[]Socket, s Socket) error {
	if len(*list) == maxFiles {
		return fmt.Errorf("%w: more than %d sockets", ErrEndless, maxFiles)
	}
	*list = append(*list, s)
	return nil
}

func (g *Guest) heldSockets(l *socketLayout, list *[]Socket) error {
	return g.eachFile(0, func(f openFile) error {
		s, ok := g.heldSocket(l, f)
		if !ok {
			return nil
		}
		g.describe(l, &s, true)
		return appendSocket(list, s)
	})
}

// heldSocket reads a file that is a socket: its inode says so, and the socket points back at the file.
func (g *Guest) heldSocket(l *socketLayout, f openFile) (Socket, bool) {
	r := reader{s: g.space}
	inode := r.u64(f.file + g.files.inode)
	if mode := r.u16(inode + g.files.mode); r.err != nil || fileTypes[uint32(mode)>>12] != "socket" {
		return Socket{}, false
	}
	sock := r.u64(f.file + g.files.private)
	if back := r.u64(sock + l.backlink); r.err != nil || back != f.file {
		return Socket{}, false // a socket's name in a file system, opened as a path
	}
	s := Socket{PID: f.pid, Comm: f.comm, FD: f.fd, Owner: heldByProcess, Inode: r.u64(inode + g.files.number)}
	s.Sock = r.u64(sock + l.sk)
	return s, true
}

// owner says what is known of the holder of a socket that no process holds.
func (g *Guest) owner(l *socketLayout, s *Socket, full bool) string {
	if !full {
		return heldByNone
	}
	if l.back == noField {
		return heldUnknown
	}
	r := reader{s: g.space}
	sock := r.u64(s.Sock + l.back)
	if r.err == nil && sock == 0 {
		return heldByNone
	}
	file := r.u64(sock + l.backlink)
	if r.err == nil && file == 0 {
		return heldByKernel
	}
	inode := r.u64(file + g.files.inode)
	if number := r.u64(inode + g.files.number); r.err == nil {
		s.Inode = number
	}
	return heldUnknown
}

// describe fills in what a struct sock says. One that is not full is a small stand-in for a connection that is closed, or not
// open yet: it begins like a sock, and has no more.
func (g *Guest) describe(l *socketLayout, s *Socket, full bool) {
	r := reader{s: g.space}
	sk := s.Sock
	family, state := r.u16(sk+l.family), r.u8(sk+l.state)
	typ, protocol := uint16(0), uint16(protoTCP)
	if full {
		typ, protocol = r.u16(sk+l.typ), r.u16(sk+l.protocol)
	}
	if r.err != nil {
		s.Unknown = []string{"protocol", "local", "remote", "state", "uid", "net_namespace"}
		return
	}
	switch family {
	case familyIPv4, familyIPv6:
		if !full {
			state = g.standIn(l, sk, state)
		}
		g.inet(l, s, sk, family == familyIPv6, typ, protocol, state)
	case familyUnix:
		g.unix(l, s, sk, state)
	case familyNetlink:
		s.Protocol = "netlink"
	case familyPacket:
		g.packet(l, s, sk)
	case familyVsock:
		s.Protocol = "vsock"
	default:
		s.Protocol = fmt.Sprintf("family-%d", family)
	}
	g.socketSpace(l, s, sk)
	var err error
	if full {
		s.UID, err = g.field32(sk, l.uid)
	}
	if !full || err != nil {
		s.Unknown = append(s.Unknown, "uid")
	}
}

// standIn returns the state of the connection that a small stand-in is for: FIN_WAIT_2 waits in the same form as TIME_WAIT.
func (g *Guest) standIn(l *socketLayout, sk uint64, state uint8) uint8 {
	if state == stateNewSynRecv {
		return stateSynRecv
	}
	if l.substate != noField {
		if sub, err := g.space.U8(sk + l.substate); err == nil && sub == stateFinWait2 {
			return sub
		}
	}
	return state
}

func (g *Guest) socketSpace(l *socketLayout, s *Socket, sk uint64) {
	if l.net == noField || l.netInum == noField {
		s.Unknown = append(s.Unknown, "net_namespace")
		return
	}
	r := reader{s: g.space}
	if s.Net = uint64(r.u32(r.u64(sk+l.net) + l.netInum)); r.err != nil {
		s.Net = 0
		s.Unknown = append(s.Unknown, "net_namespace")
	}
}

// packet reads which frames a packet socket takes: their type, and after a % the number of the network card.
func (g *Guest) packet(l *socketLayout, s *Socket, sk uint64) {
	s.Protocol = "packet"
	if l.packetNum == noField || l.packetIndex == noField {
		s.Unknown = append(s.Unknown, "local")
		return
	}
	r := reader{s: g.space}
	num, index := r.u16(sk+l.packetNum), r.u32(sk+l.packetIndex)
	if r.err != nil {
		s.Unknown = append(s.Unknown, "local")
		return
	}
	s.Local = fmt.Sprintf("0x%04x", num<<8|num>>8)
	if index != 0 {
		s.Local += fmt.Sprintf("%%%d", index)
	}
}

func (g *Guest) inet(l *socketLayout, s *Socket, sk uint64, six bool, typ, protocol uint16, state uint8) {
	switch {
	case typ == sockRaw:
		s.Protocol = "raw"
	case protocol == protoTCP:
		s.Protocol = "tcp"
	case protocol == protoMPTCP:
		s.Protocol = "mptcp"
	case protocol == protoUDP:
		s.Protocol = "udp"
	case protocol == protoICMP || protocol == protoICMPv6:
		s.Protocol = "icmp"
	default:
		s.Protocol = fmt.Sprintf("ip-%d-v", protocol)
		if !six {
			s.Protocol += "4"
		}
	}
	if (protocol == protoTCP || protocol == protoMPTCP) && int(state) < len(tcpStates) {
		s.State = tcpStates[state]
	} else {
		s.State = datagramState(state)
	}
	local, remote := l.saddr, l.daddr
	size := 4
	if six {
		s.Protocol += "6" // tcp6, udp6, ip-132-v6
		local, remote, size = l.saddr6, l.daddr6, 16
	}
	r := reader{s: g.space}
	num, dport := r.u16(sk+l.num), r.u16(sk+l.dport)
	from, to := g.scratch[:size], g.scratch[size:2*size]
	r.bytes(sk+local, from)
	r.bytes(sk+remote, to)
	if r.err != nil || local == noField {
		s.Unknown = append(s.Unknown, "local", "remote")
		return
	}
	s.Local = endpoint(from, num)
	if dport != 0 {
		s.Remote = endpoint(to, dport<<8|dport>>8)
	}
}

func endpoint(addr []byte, port uint16) string {
	ip, _ := netip.AddrFromSlice(addr)
	return netip.AddrPortFrom(ip, port).String()
}

func datagramState(state uint8) string {
	switch state {
	case stateEstablished:
		return "established"
	case stateListen:
		return "listen"
	case stateClose:
		return "unconnected"
	}
	return "unknown"
}

// unix reads a unix socket's own name and its peer's.
func (g *Guest) unix(l *socketLayout, s *Socket, sk uint64, state uint8) {
	s.Protocol, s.State = "unix", datagramState(state)
	if l.unixAddr == noField || l.unixPeer == noField || l.unixLen == noField || l.unixName == noField {
		s.Unknown = append(s.Unknown, "local", "remote")
		return
	}
	var err error
	if s.Local, err = g.unixName(l, sk); err != nil {
		s.Unknown = append(s.Unknown, "local")
	}
	peer, err := g.space.U64(sk + l.unixPeer)
	if err == nil && peer != 0 {
		s.Remote, err = g.unixName(l, peer)
	}
	if err != nil {
		s.Unknown = append(s.Unknown, "remote")
	}
}

// unixName reads struct unix_address: the length of a sockaddr_un, and that.
func (g *Guest) unixName(l *socketLayout, sk uint64) (string, error) {
	r := reader{s: g.space}
	addr := r.u64(sk + l.unixAddr)
	if r.err != nil || addr == 0 {
		return "", r.err
	}
	n := int(r.u32(addr+l.unixLen)) - 2 // less the family
	if r.err != nil || n <= 0 || n > 108 {
		return "", r.err
	}
	path := g.scratch[:n]
	r.bytes(addr+l.unixName+2, path)
	if r.err != nil {
		return "", r.err
	}
	if path[0] == 0 { // abstract: every byte counts
		return "@" + event.Text(path[1:]), nil
	}
	return event.Text(untilNUL(path)), nil
}
