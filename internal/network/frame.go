package network

import (
	"encoding/binary"
	"net/netip"
)

// wire holds the addresses of the two ends.
type wire struct {
	guestMAC, gatewayMAC [6]byte
	guest, gateway       [4]byte
}

const (
	ethernetHeader = 14
	etherIPv4      = 0x0800
	etherARP       = 0x0806
	etherIPv6      = 0x86dd

	protoICMP = 1
	protoTCP  = 6
	protoUDP  = 17
)

var broadcastMAC = [6]byte{0xff, 0xff, 0xff, 0xff, 0xff, 0xff}

// class says what a frame from the guest is, and so who answers it.
type class int

const (
	classDrop  class = iota // for the reason given
	classARP                // answered in the frame loop
	classDHCP               // answered in the frame loop
	classPing               // an echo request to the outside
	classStack              // for the stack
)

// packet is what the classifier read of a frame.
type packet struct {
	class    class
	reason   reason // with classDrop
	ipv4     bool   // the fields below are set
	proto    uint8
	src, dst [4]byte
	srcPort  uint16 // of TCP and UDP, when the frame holds them
	dstPort  uint16
	payload  []byte // of the Ethernet frame; of IPv4 without padding
	header   int    // length of the IPv4 header
}

func drop(r reason) packet { return packet{class: classDrop, reason: r} }

// classify reads the headers of a frame from the guest and decides where it goes. It trusts nothing in it.
func (w *wire) classify(frame []byte) packet {
	if len(frame) < ethernetHeader {
		return drop(reasonMalformed)
	}
	if [6]byte(frame[6:12]) != w.guestMAC {
		return drop(reasonSpoofedMAC)
	}
	to := [6]byte(frame[:6])
	payload := frame[ethernetHeader:]
	switch etherType := binary.BigEndian.Uint16(frame[12:]); {
	case etherType == etherIPv6:
		return drop(reasonIPv6)
	case etherType == etherARP:
		return w.classifyARP(payload)
	case etherType != etherIPv4:
		return drop(reasonProtocol)
	}
	p := w.classifyIPv4(payload)
	switch {
	case p.class == classDrop || p.class == classDHCP:
	case to == w.gatewayMAC:
	case to[0]&1 != 0:
		p.class, p.reason = classDrop, reasonMulticast
	default:
		p.class, p.reason = classDrop, reasonNeighbour
	}
	return p
}

// classifyARP lets the guest ask, and announce only itself.
func (w *wire) classifyARP(b []byte) packet {
	switch {
	case len(b) < 28, binary.BigEndian.Uint16(b) != 1, binary.BigEndian.Uint16(b[2:]) != etherIPv4, b[4] != 6, b[5] != 4:
		return drop(reasonMalformed)
	case [6]byte(b[8:14]) != w.guestMAC:
		return drop(reasonSpoofedMAC)
	case [4]byte(b[14:18]) != w.guest && [4]byte(b[14:18]) != [4]byte{}: // all zero: a probe, RFC 5227
		return drop(reasonSpoofedIP)
	}
	return packet{class: classARP, payload: b}
}

func (w *wire) classifyIPv4(b []byte) packet {
	if len(b) < 20 || b[0]>>4 != 4 {
		return drop(reasonMalformed)
	}
	header, total := int(b[0]&15)*4, int(binary.BigEndian.Uint16(b[2:]))
	if header < 20 || total < header || total > len(b) {
		return drop(reasonMalformed)
	}
	b = b[:total]
	p := packet{ipv4: true, proto: b[9], src: [4]byte(b[12:16]), dst: [4]byte(b[16:20]), payload: b, header: header}
	fragment := binary.BigEndian.Uint16(b[6:])
	offset, more := int(fragment&0x1fff)*8, fragment&0x2000 != 0
	body := b[header:]
	if (p.proto == protoTCP || p.proto == protoUDP) && offset == 0 && len(body) >= 4 {
		p.srcPort, p.dstPort = binary.BigEndian.Uint16(body), binary.BigEndian.Uint16(body[2:])
	}
	p.class, p.reason = w.place(&p, body, offset, more)
	return p
}

// place decides about a well-formed IPv4 header.
func (w *wire) place(p *packet, body []byte, offset int, more bool) (class, reason) {
	fragment := offset != 0 || more
	if p.src != w.guest {
		if p.src == [4]byte{} && w.isDHCP(p, fragment) {
			return classDHCP, allowed
		}
		return classDrop, reasonSpoofedIP
	}
	switch {
	case w.isDHCP(p, fragment):
		return classDHCP, allowed
	case fragment && (more && len(body) < minFragment || offset+len(body) > 65535):
		return classDrop, reasonFragment
	case p.proto == protoTCP, p.proto == protoUDP:
		return classStack, allowed
	case p.proto != protoICMP:
		return classDrop, reasonProtocol
	case p.dst == w.gateway:
		if len(body) >= 8 && offset == 0 && body[0] != 8 {
			return classDrop, reasonICMP
		}
		return classStack, allowed
	case fragment:
		return classDrop, reasonFragment
	case len(body) < 8 || body[0] != 8 || body[1] != 0:
		return classDrop, reasonICMP
	}
	return classPing, allowed
}

// minFragment is the least that a fragment with more to follow carries: smaller ones only serve to hide headers or to
// make the reassembler hold much for little. RFC 791 lets every network carry 576 bytes.
const minFragment = 256

func (w *wire) isDHCP(p *packet, fragment bool) bool {
	if p.proto != protoUDP || p.dstPort != 67 || fragment {
		return false
	}
	return p.dst == w.gateway || p.dst == [4]byte{255, 255, 255, 255}
}

// flow names the packet's ends for a report.
func (p *packet) flow() flowKey {
	if !p.ipv4 {
		return flowKey{}
	}
	return flowKey{
		proto: p.proto,
		near:  netip.AddrPortFrom(netip.AddrFrom4(p.src), p.srcPort),
		far:   netip.AddrPortFrom(netip.AddrFrom4(p.dst), p.dstPort),
	}
}

// ethernet writes the header of a frame to the guest.
func (w *wire) ethernet(b []byte, etherType uint16) {
	copy(b, w.guestMAC[:])
	copy(b[6:], w.gatewayMAC[:])
	binary.BigEndian.PutUint16(b[12:], etherType)
}

// answerARP returns the gateway's answer to a who-has that asks for it, else nil. No other address exists on the wire,
// the guest's own least of all: it must find it free.
func (w *wire) answerARP(b []byte) []byte {
	if binary.BigEndian.Uint16(b[6:]) != 1 || [4]byte(b[24:28]) != w.gateway {
		return nil
	}
	frame := make([]byte, ethernetHeader+28)
	w.ethernet(frame, etherARP)
	r := frame[ethernetHeader:]
	copy(r, b[:6])
	r[7] = 2
	copy(r[8:], w.gatewayMAC[:])
	copy(r[14:], w.gateway[:])
	copy(r[18:], b[8:18])
	return frame
}
