package network

import (
	"encoding/binary"
	"errors"
	"net/netip"
	"time"
)

// A DHCP server with one lease to give, for ever the same (RFC 2131, options of RFC 2132). It keeps no state.

var (
	errDHCPShort = errors.New("dhcp: message is too short")
	errDHCPKind  = errors.New("dhcp: not a request of an Ethernet client")
	errDHCPMagic = errors.New("dhcp: no options")
	errDHCPCut   = errors.New("dhcp: an option runs past the end")
)

const (
	dhcpFixed = 236 // bytes before the magic cookie
	leaseTime = 24 * time.Hour

	dhcpDiscover = 1
	dhcpOffer    = 2
	dhcpRequest  = 3
	dhcpACK      = 5
	dhcpNAK      = 6
	dhcpInform   = 8

	optMask      = 1
	optRouter    = 3
	optDNS       = 6
	optHostName  = 12
	optMTU       = 26
	optBroadcast = 28
	optAddress   = 50
	optLease     = 51
	optType      = 53
	optServer    = 54
	optEnd       = 255
)

// dhcpMessage is what a client said.
type dhcpMessage struct {
	xid       [4]byte
	flags     [2]byte
	client    [4]byte // the address it says it has
	mac       [6]byte
	kind      byte
	requested [4]byte
	server    [4]byte // it speaks to this server only
}

func parseDHCP(b []byte) (dhcpMessage, error) {
	var m dhcpMessage
	if len(b) < dhcpFixed+4 {
		return m, errDHCPShort
	}
	if b[0] != 1 || b[1] != 1 || b[2] != 6 {
		return m, errDHCPKind
	}
	if [4]byte(b[dhcpFixed:]) != [4]byte{99, 130, 83, 99} {
		return m, errDHCPMagic
	}
	m.xid, m.flags, m.client, m.mac = [4]byte(b[4:]), [2]byte(b[10:]), [4]byte(b[12:]), [6]byte(b[28:])
	for b = b[dhcpFixed+4:]; len(b) > 0 && b[0] != optEnd; {
		if b[0] == 0 {
			b = b[1:]
			continue
		}
		if len(b) < 2 || len(b) < 2+int(b[1]) {
			return dhcpMessage{}, errDHCPCut
		}
		m.option(b[0], b[2:2+int(b[1])])
		b = b[2+int(b[1]):]
	}
	return m, nil
}

func (m *dhcpMessage) option(code byte, v []byte) {
	switch {
	case code == optType && len(v) == 1:
		m.kind = v[0]
	case code == optAddress && len(v) == 4:
		m.requested = [4]byte(v)
	case code == optServer && len(v) == 4:
		m.server = [4]byte(v)
	}
}

// dhcp answers a frame of class DHCP.
func (n *Network) dhcp(p *packet) {
	body := p.payload[p.header:]
	if len(body) < 8 {
		n.deny(reasonMalformed, "", p.flow())
		return
	}
	m, err := parseDHCP(body[8:])
	if err != nil || m.mac != n.wire.guestMAC {
		n.deny(reasonMalformed, "", p.flow())
		return
	}
	if reply := n.lease().answer(&m); reply != nil {
		n.out.offer(n.wire.dhcpFrame(&m, reply))
	}
}

// lease is what the server has to give.
type lease struct {
	wire
	mask      [4]byte
	broadcast [4]byte
	mtu       uint16
	hostName  string
}

func (n *Network) lease() *lease {
	l := &lease{wire: n.wire, mtu: uint16(n.cfg.MTU), hostName: *n.hostName.Load()}
	binary.BigEndian.PutUint32(l.mask[:], ^uint32(0)<<(32-n.cfg.Guest.Bits()))
	l.broadcast = broadcastOf(netip.PrefixFrom(n.guest, n.cfg.Guest.Bits())).As4()
	return l
}

// answer returns the DHCP message to send, or nil for none.
func (l *lease) answer(m *dhcpMessage) []byte {
	if m.server != [4]byte{} && m.server != l.gateway {
		return nil
	}
	wants := m.requested
	if wants == [4]byte{} {
		wants = m.client
	}
	switch m.kind {
	case dhcpDiscover:
		return l.message(m, dhcpOffer)
	case dhcpRequest:
		if wants != l.guest {
			return l.message(m, dhcpNAK)
		}
		return l.message(m, dhcpACK)
	case dhcpInform:
		return l.message(m, dhcpACK)
	}
	return nil
}

func (l *lease) message(m *dhcpMessage, kind byte) []byte {
	b := make([]byte, dhcpFixed, 400)
	b[0], b[1], b[2] = 2, 1, 6
	copy(b[4:], m.xid[:])
	copy(b[10:], m.flags[:])
	copy(b[28:], m.mac[:])
	if kind != dhcpNAK {
		copy(b[12:], m.client[:])
		copy(b[20:], l.gateway[:])
		if m.kind != dhcpInform {
			copy(b[16:], l.guest[:])
		}
	}
	b = append(b, 99, 130, 83, 99)
	option := func(code byte, v ...byte) {
		b = append(append(b, code, byte(len(v))), v...)
	}
	option(optType, kind)
	option(optServer, l.gateway[:]...)
	if kind != dhcpNAK {
		if m.kind != dhcpInform {
			option(optLease, binary.BigEndian.AppendUint32(nil, uint32(leaseTime/time.Second))...)
		}
		option(optMask, l.mask[:]...)
		option(optRouter, l.gateway[:]...)
		option(optDNS, l.gateway[:]...)
		option(optBroadcast, l.broadcast[:]...)
		option(optMTU, binary.BigEndian.AppendUint16(nil, l.mtu)...)
		if l.hostName != "" && len(l.hostName) < 64 {
			option(optHostName, []byte(l.hostName)...)
		}
	}
	b = append(b, optEnd)
	for len(b) < 300 { // old clients drop less than a BOOTP message
		b = append(b, 0)
	}
	return b
}

// dhcpFrame wraps a message for a client that has no address yet.
func (w *wire) dhcpFrame(m *dhcpMessage, message []byte) []byte {
	frame := make([]byte, ethernetHeader+20+8, ethernetHeader+28+len(message))
	w.ethernet(frame, etherIPv4)
	to := w.guest
	if m.flags[0]&0x80 != 0 || message[16] == 0 {
		to = [4]byte{255, 255, 255, 255}
		copy(frame, broadcastMAC[:])
	}
	ip := frame[ethernetHeader:]
	ip[0], ip[8], ip[9] = 0x45, 64, protoUDP
	binary.BigEndian.PutUint16(ip[2:], uint16(28+len(message)))
	copy(ip[12:], w.gateway[:])
	copy(ip[16:], to[:])
	binary.BigEndian.PutUint16(ip[10:], ^sumWords(0, ip[:20]))
	udp := ip[20:]
	binary.BigEndian.PutUint16(udp, 67)
	binary.BigEndian.PutUint16(udp[2:], 68)
	binary.BigEndian.PutUint16(udp[4:], uint16(8+len(message)))
	sum := sumWords(0, w.gateway[:], to[:], []byte{0, protoUDP}, udp[4:6], udp[:8], message)
	binary.BigEndian.PutUint16(udp[6:], ^sum)
	return append(frame, message...)
}
