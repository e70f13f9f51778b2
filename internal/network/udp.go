package network

import (
	"encoding/binary"
	"errors"
	"net"
	"net/netip"
	"syscall"
	"time"

	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/stack"
)

// How long a datagram flow stays without traffic: RFC 4787 asks for two minutes at least once it is a conversation.
const (
	datagramIdle = 3 * time.Minute
	oneWayIdle   = 30 * time.Second
)

// handleUDP sees every datagram of the guest, put together if it came in fragments. No endpoint of the stack is needed for UDP:
// a flow is a host socket. False makes the stack answer "port unreachable".
func (n *Network) handleUDP(id stack.TransportEndpointID, pkt *stack.PacketBuffer) bool {
	h := header.UDP(pkt.TransportHeader().Slice())
	data := pkt.Data().AsRange().ToSlice()
	if len(h) < header.UDPMinimumSize || int(h.Length()) < header.UDPMinimumSize || int(h.Length())-header.UDPMinimumSize > len(data) {
		n.deny(reasonMalformed, "", flowKey{proto: protoUDP})
		return true
	}
	data = data[:int(h.Length())-header.UDPMinimumSize]
	near, far := addrPort(id.RemoteAddress, id.RemotePort), addrPort(id.LocalAddress, id.LocalPort)
	if far == n.dnsAddr() {
		n.dns.datagram(near, data)
		return true
	}
	return n.fromGuest(near, far, data)
}

func (n *Network) fromGuest(near, far netip.AddrPort, data []byte) bool {
	key := flowKey{proto: protoUDP, near: near, far: far}
	f := n.flows.get(key)
	if f == nil {
		key.in = true
		f = n.flows.get(key)
		key.in = false
	}
	if f == nil {
		v := n.decide("out", protoUDP, far)
		if !v.allow {
			n.deny(v.reason, v.detail, key)
			return false
		}
		f = &flow{key: key, target: v.target}
		if why := n.openDatagram(f, "udp4", func(b []byte) { n.sendUDP(far, near.Port(), b) }); why != allowed {
			n.deny(why, "", key)
			return false
		}
	}
	f.sent(data)
	return true
}

// sent passes on a datagram of the guest.
func (f *flow) sent(data []byte) {
	if f.send == nil {
		return
	}
	f.touch()
	f.packetsOut.Add(1)
	f.bytesOut.Add(int64(len(data)))
	f.send(data)
}

// openDatagram begins a datagram flow and opens its socket; what comes in on it goes to deliver.
func (n *Network) openDatagram(f *flow, network string, deliver func([]byte)) reason {
	if why := n.begin(f, false); why != allowed {
		return why
	}
	conn, err := n.dialFor(f, network, dialTimeout)
	if err != nil {
		n.abandon(f)
		if network == "ping4" {
			return reasonNoPing
		}
		return reasonUnreachable
	}
	f.keep.Load().opened()
	f.send = func(b []byte) { conn.Write(b) }
	if !f.onCut(func() { conn.Close() }) || !n.start(func() { n.readDatagrams(f, conn, deliver) }) {
		conn.Close()
		n.finish(f, endStopped)
	}
	return allowed
}

func (n *Network) readDatagrams(f *flow, conn net.Conn, deliver func([]byte)) {
	defer conn.Close()
	for {
		conn.SetReadDeadline(f.expires())
		buf, size, err := readPooled(conn)
		if err == nil {
			f.keep.Load().data(f.packetsOut.Load(), (*buf)[:size])
			f.got(size)
			deliver((*buf)[:size])
		}
		if buf != nil {
			buffers.Put(buf)
		}
		var late net.Error
		switch {
		case err == nil:
		case errors.As(err, &late) && late.Timeout():
			if time.Now().After(f.expires()) {
				n.finish(f, endIdle)
				return
			}
		case errors.Is(err, syscall.ECONNREFUSED):
			n.finish(f, endReset)
			return
		default:
			n.finish(f, endClosed)
			return
		}
	}
}

func (f *flow) got(size int) {
	f.touch()
	f.packetsIn.Add(1)
	f.bytesIn.Add(int64(size))
}

func (f *flow) expires() time.Time {
	idle := oneWayIdle
	if f.packetsIn.Load() > 0 && f.packetsOut.Load() > 0 {
		idle = datagramIdle
	}
	return time.Unix(0, f.last.Load()).Add(idle)
}

// sendUDP sends the guest a datagram.
func (n *Network) sendUDP(from netip.AddrPort, port uint16, data []byte) {
	if len(data) > 65535-20-header.UDPMinimumSize {
		return
	}
	var h [header.UDPMinimumSize]byte
	binary.BigEndian.PutUint16(h[0:], from.Port())
	binary.BigEndian.PutUint16(h[2:], port)
	binary.BigEndian.PutUint16(h[4:], uint16(len(h)+len(data)))
	sum := sumWords(0, from.Addr().AsSlice(), n.wire.guest[:], []byte{0, protoUDP}, h[4:6], h[:], data)
	if sum == 0xffff { // its complement, 0, would mean: no checksum
		sum = 0
	}
	binary.BigEndian.PutUint16(h[6:], ^sum)
	n.sendIP(from.Addr(), protoUDP, h[:], data)
}

// sumWords is the Internet checksum's sum over parts of which all but the last have an even length.
func sumWords(start uint32, parts ...[]byte) uint16 {
	sum := start
	for _, p := range parts {
		for ; len(p) >= 2; p = p[2:] {
			sum += uint32(p[0])<<8 | uint32(p[1])
			sum = sum&0xffff + sum>>16
		}
		if len(p) == 1 {
			sum += uint32(p[0]) << 8
		}
	}
	for sum>>16 != 0 {
		sum = sum&0xffff + sum>>16
	}
	return uint16(sum)
}
