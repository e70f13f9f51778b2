package main

import (
	"encoding/binary"
	"io"
	"math/rand/v2"
	"net"
	"time"
)

var gatewayMAC = [6]byte{0x52, 0x55, 0x0a, 0x4d, 0x00, 0x01}

const guestIP, gatewayIP = "\x0a\x4d\x00\x02", "\x0a\x4d\x00\x01"

func (s *stub) ethernet(to [6]byte, kind uint16, payload []byte) []byte {
	b := binary.BigEndian.AppendUint32(nil, uint32(14+len(payload)))
	b = append(append(b, to[:]...), s.mac[:]...)
	return append(binary.BigEndian.AppendUint16(b, kind), payload...)
}

func (s *stub) ip(proto byte, to string, payload []byte) []byte {
	h := make([]byte, 20, 20+len(payload))
	h[0], h[8], h[9] = 0x45, 64, proto
	binary.BigEndian.PutUint16(h[2:], uint16(20+len(payload)))
	copy(h[12:], guestIP)
	copy(h[16:], to)
	binary.BigEndian.PutUint16(h[10:], sum(h))
	return s.ethernet(gatewayMAC, 0x0800, append(h, payload...))
}

func sum(b []byte) uint16 {
	var n uint32
	for i := 0; i+1 < len(b); i += 2 {
		n += uint32(b[i])<<8 | uint32(b[i+1])
	}
	for n>>16 != 0 {
		n = n&0xffff + n>>16
	}
	return ^uint16(n)
}

func (s *stub) udp(to string, from, port uint16, payload []byte) []byte {
	b := binary.BigEndian.AppendUint16(nil, from)
	b = binary.BigEndian.AppendUint16(b, port)
	b = binary.BigEndian.AppendUint16(b, uint16(8+len(payload)))
	return s.ip(17, to, append(append(b, 0, 0), payload...))
}

func (s *stub) syn(to string, from, port uint16) []byte {
	b := make([]byte, 20)
	binary.BigEndian.PutUint16(b, from)
	binary.BigEndian.PutUint16(b[2:], port)
	binary.BigEndian.PutUint32(b[4:], rand.Uint32())
	b[12], b[13] = 0x50, 0x02
	binary.BigEndian.PutUint16(b[14:], 0xffff)
	pseudo := append([]byte(guestIP+to), 0, 6, 0, 20)
	binary.BigEndian.PutUint16(b[16:], sum(append(pseudo, b...)))
	return s.ip(6, to, b)
}

func (s *stub) arp() []byte {
	b := []byte{0, 1, 8, 0, 6, 4, 0, 1}
	b = append(append(b, s.mac[:]...), guestIP...)
	b = append(append(b, make([]byte, 6)...), gatewayIP...)
	return s.ethernet([6]byte{0xff, 0xff, 0xff, 0xff, 0xff, 0xff}, 0x0806, b)
}

// card is the honest network: it asks who the gateway is for ever, and says on the console how long that took.
func (s *stub) card(c net.Conn) {
	<-s.going
	for round := 0; ; round++ {
		began := time.Now()
		c.SetDeadline(began.Add(20 * time.Second))
		if _, err := c.Write(s.arp()); err != nil {
			return
		}
		var size [4]byte
		if _, err := io.ReadFull(c, size[:]); err != nil {
			return
		}
		io.CopyN(io.Discard, c, int64(binary.BigEndian.Uint32(size[:])))
		s.say("net %d %d", round, time.Since(began).Milliseconds())
		time.Sleep(200 * time.Millisecond)
	}
}

// frames floods the gate with what next gives, once the guest is let go.
func (s *stub) frames(next func() []byte) func(net.Conn) {
	return func(c net.Conn) {
		<-s.going
		go drain(c)
		flood(c, next)
	}
}

// benchNet is an address of 198.18.0.0/15, which leads nowhere (RFC 2544).
func benchNet() string {
	var b [4]byte
	binary.BigEndian.PutUint32(b[:], 0xc6120000|rand.Uint32N(1<<17))
	return string(b[:])
}

// storm mixes all that a guest can send that costs a gate something.
func (s *stub) storm() []byte {
	port := uint16(1024 + rand.Uint32N(60000))
	switch rand.Uint32N(12) {
	case 0:
		return s.syn(benchNet(), port, 80)
	case 1:
		return s.syn(gatewayIP, port, uint16(rand.Uint32()))
	case 2:
		return s.udp(benchNet(), port, 9, []byte("x"))
	case 3:
		return s.udp(gatewayIP, port, uint16(rand.Uint32()), make([]byte, 1000))
	case 4: // DHCP, whole and cut
		b := make([]byte, 240+rand.Uint32N(400))
		b[0], b[1], b[2] = 1, 1, 6
		copy(b[28:], s.mac[:])
		copy(b[236:], "\x63\x82\x53\x63\x35\x01\x01\xff")
		return s.udp("\xff\xff\xff\xff", 68, 67, b)
	case 5: // a fragment that nothing completes
		f := s.udp(benchNet(), port, 9, make([]byte, 1400))
		binary.BigEndian.PutUint16(f[4+14+4:], uint16(rand.Uint32()))
		f[4+14+6] = 0x20
		binary.BigEndian.PutUint16(f[4+14+10:], 0)
		binary.BigEndian.PutUint16(f[4+14+10:], sum(f[4+14:4+34]))
		return f
	case 6:
		return s.ip(byte(rand.Uint32()), benchNet(), make([]byte, rand.Uint32N(1400)))
	case 7:
		return s.ethernet(gatewayMAC, uint16(rand.Uint32()), make([]byte, 1+rand.Uint32N(9000)))
	case 8:
		return s.arp()
	case 9: // garbage behind a right header
		f := s.ip(17, gatewayIP, make([]byte, 64))
		for i := 18; i < len(f); i++ {
			f[i] = byte(rand.Uint32())
		}
		return f
	case 10: // echo
		return s.ip(1, gatewayIP, append([]byte{8, 0, 0, 0}, make([]byte, 1000)...))
	}
	return s.ethernet([6]byte{1, 0, 0x5e, 1, 2, 3}, 0x86dd, make([]byte, 60))
}

// names asks for names that do not exist.
func (s *stub) names() func() []byte {
	slow := until(3 * time.Second)
	return func() []byte {
		if slow() {
			time.Sleep(time.Millisecond) // the host's name server did nothing wrong
		} else {
			time.Sleep(100 * time.Millisecond)
		}
		q := []byte{byte(rand.Uint32()), byte(rand.Uint32()), 1, 0, 0, 1, 0, 0, 0, 0, 0, 0, 8}
		for range 8 {
			q = append(q, 'a'+byte(rand.Uint32N(26)))
		}
		q = append(q, "\x07invalid\x00\x00\x01\x00\x01"...)
		return s.udp(gatewayIP, uint16(1024+rand.Uint32N(60000)), 53, q)
	}
}
