package network

import (
	"bytes"
	"errors"
	"net"
	"os"
	"testing"
	"time"

	"github.com/gopacket/gopacket"
	"github.com/gopacket/gopacket/layers"
)

// Hand-made frames: the attacker's view of the wire. They are built by another implementation than the one under test.

func build(t testing.TB, parts ...gopacket.SerializableLayer) []byte {
	t.Helper()
	buf := gopacket.NewSerializeBuffer()
	for i, p := range parts {
		if ip, ok := p.(*layers.IPv4); ok && i+1 < len(parts) {
			switch next := parts[i+1].(type) {
			case *layers.TCP:
				next.SetNetworkLayerForChecksum(ip)
			case *layers.UDP:
				next.SetNetworkLayerForChecksum(ip)
			}
		}
	}
	if err := gopacket.SerializeLayers(buf, gopacket.SerializeOptions{FixLengths: true, ComputeChecksums: true}, parts...); err != nil {
		t.Fatal(err)
	}
	return bytes.Clone(buf.Bytes())
}

func eth(t layers.EthernetType) *layers.Ethernet {
	return &layers.Ethernet{SrcMAC: guestMAC, DstMAC: gatewayMAC, EthernetType: t}
}

func ip4(proto layers.IPProtocol, dst string) *layers.IPv4 {
	return &layers.IPv4{Version: 4, TTL: 64, Protocol: proto, SrcIP: net.IP(guestIP[:]), DstIP: net.ParseIP(dst).To4()}
}

func synFrame(t testing.TB, dst string, from, port uint16) []byte {
	return build(t, eth(layers.EthernetTypeIPv4), ip4(layers.IPProtocolTCP, dst),
		&layers.TCP{SrcPort: layers.TCPPort(from), DstPort: layers.TCPPort(port), SYN: true, Seq: 1, Window: 1000})
}

func udpFrame(t testing.TB, dst string, port uint16, data []byte) []byte {
	return build(t, eth(layers.EthernetTypeIPv4), ip4(layers.IPProtocolUDP, dst),
		&layers.UDP{SrcPort: 5000, DstPort: layers.UDPPort(port)}, gopacket.Payload(data))
}

func echoFrame(t testing.TB, dst string) []byte {
	return build(t, eth(layers.EthernetTypeIPv4), ip4(layers.IPProtocolICMPv4, dst),
		&layers.ICMPv4{TypeCode: layers.CreateICMPv4TypeCode(8, 0), Id: 7, Seq: 1}, gopacket.Payload("abcdefgh"))
}

func arpRequest(ip [4]byte) []byte {
	f := make([]byte, 42)
	copy(f, broadcastMAC[:])
	copy(f[6:], guestMAC)
	copy(f[12:], []byte{8, 6, 0, 1, 8, 0, 6, 4, 0, 1})
	copy(f[22:], guestMAC)
	copy(f[28:], guestIP[:])
	copy(f[38:], ip[:])
	return f
}

func dhcpFrame(t testing.TB, kind layers.DHCPMsgType, options ...layers.DHCPOption) []byte {
	d := &layers.DHCPv4{Operation: layers.DHCPOpRequest, HardwareType: layers.LinkTypeEthernet, HardwareLen: 6, Xid: 0xfeedbeef, ClientHWAddr: guestMAC}
	d.Options = append(layers.DHCPOptions{layers.NewDHCPOption(layers.DHCPOptMessageType, []byte{byte(kind)})}, options...)
	return build(t,
		&layers.Ethernet{SrcMAC: guestMAC, DstMAC: broadcastMAC[:], EthernetType: layers.EthernetTypeIPv4},
		&layers.IPv4{Version: 4, TTL: 64, Protocol: layers.IPProtocolUDP, SrcIP: net.IPv4zero.To4(), DstIP: net.IPv4bcast.To4()},
		&layers.UDP{SrcPort: 68, DstPort: 67}, d)
}

func send(t testing.TB, wire net.Conn, frame []byte) {
	t.Helper()
	wire.SetWriteDeadline(time.Now().Add(patience))
	if err := sendFrame(wire, frame); err != nil {
		t.Fatal(err)
	}
}

func receive(t testing.TB, wire net.Conn) []byte {
	t.Helper()
	wire.SetReadDeadline(time.Now().Add(patience))
	b := make([]byte, 4)
	for i := range 4 {
		if _, err := wire.Read(b[i : i+1]); err != nil {
			t.Fatal(err)
		}
	}
	frame := make([]byte, int(b[0])<<24|int(b[1])<<16|int(b[2])<<8|int(b[3]))
	for at := 0; at < len(frame); {
		n, err := wire.Read(frame[at:])
		if err != nil {
			t.Fatal(err)
		}
		at += n
	}
	return frame
}

// expectSilence fails if a frame has come. Whatever should have provoked one must have been dealt with already.
func expectSilence(t testing.TB, wire net.Conn) {
	t.Helper()
	wire.SetReadDeadline(time.Now().Add(20 * time.Millisecond))
	b := make([]byte, 2048)
	if n, err := wire.Read(b); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Fatalf("the wire is not silent: %x, %v", b[:n], err)
	}
	wire.SetReadDeadline(time.Time{})
}

func parse(t testing.TB, frame []byte) gopacket.Packet {
	t.Helper()
	p := gopacket.NewPacket(frame, layers.LayerTypeEthernet, gopacket.Default)
	if e := p.ErrorLayer(); e != nil {
		t.Fatalf("frame %x: %v", frame, e.Error())
	}
	return p
}
