package network

import (
	"testing"

	"github.com/gopacket/gopacket/layers"
)

func TestDHCPLease(t *testing.T) {
	w := newWorld(t, Config{MTU: 9000})
	wire := w.plug()
	send(t, wire, dhcpFrame(t, layers.DHCPMsgTypeDiscover))
	offer := dhcpReply(t, receive(t, wire))
	if offer.YourClientIP.String() != "10.77.0.2" || offer.Xid != 0xfeedbeef {
		t.Fatalf("offer: %v", offer)
	}
	send(t, wire, dhcpFrame(t, layers.DHCPMsgTypeRequest, layers.NewDHCPOption(layers.DHCPOptRequestIP, guestIP[:])))
	ack := dhcpReply(t, receive(t, wire))
	want := map[layers.DHCPOpt]string{
		layers.DHCPOptMessageType: "\x05", layers.DHCPOptSubnetMask: "\xff\xff\xff\x00", layers.DHCPOptRouter: "\x0a\x4d\x00\x01",
		layers.DHCPOptDNS: "\x0a\x4d\x00\x01", layers.DHCPOptHostname: "web", layers.DHCPOptInterfaceMTU: "\x23\x28",
		layers.DHCPOptServerID: "\x0a\x4d\x00\x01", layers.DHCPOptBroadcastAddr: "\x0a\x4d\x00\xff", layers.DHCPOptLeaseTime: "\x00\x01\x51\x80",
	}
	for _, o := range ack.Options {
		if v, ok := want[o.Type]; ok && v != string(o.Data) {
			t.Errorf("option %v is %x, want %x", o.Type, o.Data, v)
		}
		delete(want, o.Type)
	}
	if len(want) > 0 {
		t.Errorf("options missing: %v", want)
	}
}

func TestDHCPRefusesAnotherAddress(t *testing.T) {
	w := newWorld(t, Config{})
	wire := w.plug()
	send(t, wire, dhcpFrame(t, layers.DHCPMsgTypeRequest, layers.NewDHCPOption(layers.DHCPOptRequestIP, []byte{192, 168, 1, 9})))
	nak := dhcpReply(t, receive(t, wire))
	if nak.YourClientIP.String() != "0.0.0.0" || nak.Options[0].Data[0] != dhcpNAK {
		t.Errorf("reply: %v", nak)
	}
	// A request for another server's lease, and one in another card's name, are not ours to answer.
	send(t, wire, dhcpFrame(t, layers.DHCPMsgTypeRequest, layers.NewDHCPOption(layers.DHCPOptServerID, []byte{10, 77, 0, 9})))
	forged := dhcpFrame(t, layers.DHCPMsgTypeDiscover)
	forged[14+28+28+5] ^= 1
	send(t, wire, forged)
	send(t, wire, arpRequest(gatewayIP))
	if f := receive(t, wire); f[13] != 6 {
		t.Errorf("an answer to what deserves none: %x", f)
	}
}

func dhcpReply(t *testing.T, frame []byte) *layers.DHCPv4 {
	t.Helper()
	d, ok := parse(t, frame).Layer(layers.LayerTypeDHCPv4).(*layers.DHCPv4)
	if !ok {
		t.Fatalf("not a DHCP message: %x", frame)
	}
	return d
}
