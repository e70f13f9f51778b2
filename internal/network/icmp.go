package network

import (
	"encoding/binary"
	"net/netip"
)

// An echo request to the outside goes through an unprivileged ICMP socket of the host, where the host allows them
// (net.ipv4.ping_group_range). The kernel puts its own identifier in, so the guest's is put back into each answer.

const maxEcho = 65535 - 20

func (n *Network) ping(p *packet) {
	body := p.payload[p.header:]
	id := binary.BigEndian.Uint16(body[4:])
	far := netip.AddrFrom4(p.dst)
	key := flowKey{proto: protoICMP, near: netip.AddrPortFrom(n.guest, id), far: netip.AddrPortFrom(far, 0)}
	f := n.flows.get(key)
	if f == nil {
		v := n.decide("out", protoICMP, key.far)
		if !v.allow {
			n.deny(v.reason, v.detail, key)
			return
		}
		f = &flow{key: key, target: v.target}
		if why := n.openDatagram(f, "ping4", func(b []byte) { n.pong(far, id, b) }); why != allowed {
			n.deny(why, "", key)
			return
		}
	}
	f.sent(body)
}

// pong passes an echo reply to the guest under the identifier it knows.
func (n *Network) pong(from netip.Addr, id uint16, reply []byte) {
	if len(reply) < 8 || len(reply) > maxEcho || reply[0] != 0 {
		return
	}
	reply[2], reply[3] = 0, 0
	binary.BigEndian.PutUint16(reply[4:], id)
	binary.BigEndian.PutUint16(reply[2:], ^sumWords(0, reply))
	n.sendIP(from, protoICMP, reply)
}
