package network

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"testing"

	"github.com/gopacket/gopacket/layers"
	"golang.org/x/sys/unix"

	"vigia/internal/event"
)

// tableCase: a machine with rules, a flow, what becomes of it.
func TestRules(t *testing.T) {
	hosts := func() ([]netip.Prefix, error) {
		return []netip.Prefix{netip.MustParsePrefix("192.0.2.1/24"), netip.MustParsePrefix("10.1.2.3/16"), netip.MustParsePrefix("::1/128")}, nil
	}
	for _, c := range []struct {
		rules   []string
		flow    string // direction, protocol, far end
		allowed bool
	}{
		{nil, "out tcp 198.51.100.7:80", true},
		{nil, "out udp 198.51.100.7:53", true},
		{nil, "out icmp 198.51.100.7:0", true},
		{nil, "out tcp 10.9.9.9:80", true},
		{nil, "in tcp 198.51.100.7:22", true}, // of a published port

		// Guarded by default.
		{nil, "out tcp 127.0.0.1:80", false},
		{nil, "out tcp 127.9.9.9:80", false},
		{nil, "out tcp 0.0.0.0:80", false},
		{nil, "out tcp 10.77.0.1:80", false},
		{nil, "out tcp 10.77.0.3:80", false},
		{nil, "out tcp 192.0.2.1:22", false},
		{nil, "out udp 192.0.2.255:137", false},
		{nil, "out tcp 10.1.2.3:22", false},
		{nil, "out tcp 169.254.169.254:80", false},
		{nil, "out tcp 169.254.1.1:80", false},
		{nil, "out udp 224.0.0.251:5353", false},
		{nil, "out udp 255.255.255.255:9", false},
		{nil, "out tcp 240.0.0.1:9", false},

		// Wide rules do not open what is guarded; narrow ones do.
		{[]string{"allow out any"}, "out tcp 192.0.2.1:22", false},
		{[]string{"allow out 192.0.2.0/24"}, "out tcp 192.0.2.1:22", false},
		{[]string{"allow out 192.0.2.1"}, "out tcp 192.0.2.1:22", true},
		{[]string{"allow out tcp 192.0.2.1:22"}, "out tcp 192.0.2.1:23", false},
		{[]string{"allow out 10.0.0.0/8"}, "out tcp 10.1.2.3:22", false},
		{[]string{"allow out 10.0.0.0/8"}, "out tcp 10.1.2.4:22", true},
		{[]string{"allow out 169.254.169.254"}, "out tcp 169.254.169.254:80", true},
		{[]string{"allow out 169.254.0.0/15"}, "out tcp 169.254.169.254:80", false},
		{[]string{"allow out tcp 127.0.0.1:80"}, "out tcp 10.77.0.1:80", true},
		{[]string{"allow out tcp 127.0.0.1:80"}, "out udp 10.77.0.1:80", false},
		{[]string{"allow out 224.0.0.0/4"}, "out udp 224.0.0.251:5353", false},
		{[]string{"allow out 10.77.0.0/24"}, "out tcp 10.77.0.3:80", false},

		// Each dimension.
		{[]string{"deny out any"}, "out tcp 198.51.100.7:80", false},
		{[]string{"deny out any"}, "in tcp 198.51.100.7:22", true},
		{[]string{"deny in any"}, "in tcp 198.51.100.7:22", false},
		{[]string{"deny in any"}, "out tcp 198.51.100.7:80", true},
		{[]string{"deny out udp any"}, "out tcp 198.51.100.7:80", true},
		{[]string{"deny out udp any"}, "out udp 198.51.100.7:80", false},
		{[]string{"deny out icmp any"}, "out icmp 198.51.100.7:0", false},
		{[]string{"deny out tcp any:25"}, "out tcp 198.51.100.7:25", false},
		{[]string{"deny out tcp any:25"}, "out tcp 198.51.100.7:26", true},
		{[]string{"deny out tcp any:20-25"}, "out tcp 198.51.100.7:20", false},
		{[]string{"deny out tcp any:20-25"}, "out tcp 198.51.100.7:19", true},
		{[]string{"deny out 198.51.100.0/24"}, "out tcp 198.51.100.255:1", false},
		{[]string{"deny out 198.51.100.0/24"}, "out tcp 198.51.101.0:1", true},
		{[]string{"allow in tcp 203.0.113.0/24:22", "deny in any"}, "in tcp 203.0.113.9:22", true},
		{[]string{"allow in tcp 203.0.113.0/24:22", "deny in any"}, "in tcp 203.0.113.9:23", false},
		{[]string{"allow in tcp 203.0.113.0/24:22", "deny in any"}, "in tcp 198.51.100.7:22", false},

		// The first that matches decides.
		{[]string{"allow out tcp any:80", "deny out any"}, "out tcp 198.51.100.7:80", true},
		{[]string{"deny out any", "allow out tcp any:80"}, "out tcp 198.51.100.7:80", false},
		{[]string{"deny out 10.1.2.3", "allow out 10.1.2.3"}, "out tcp 10.1.2.3:80", false},
	} {
		t.Run(fmt.Sprint(c.rules, c.flow), func(t *testing.T) {
			w := newWorld(t, Config{Rules: rules(t, c.rules...), HostAddrs: hosts})
			var dir, proto, far string
			fmt.Sscan(c.flow, &dir, &proto, &far)
			number := map[string]uint8{"tcp": protoTCP, "udp": protoUDP, "icmp": protoICMP}[proto]
			if v := w.n.decide(dir, number, netip.MustParseAddrPort(far)); v.allow != c.allowed {
				t.Errorf("allowed is %v, for %v %s", v.allow, v.reason, v.detail)
			}
		})
	}
}

func TestHostAddressesUnknown(t *testing.T) {
	w := newWorld(t, Config{HostAddrs: func() ([]netip.Prefix, error) { return nil, errors.New("netlink is forbidden") }})
	if w.n.decide("out", protoTCP, netip.MustParseAddrPort("198.51.100.7:80")).allow {
		t.Error("an address was allowed though any could be the host's")
	}
}

// An address that the host got after it was last asked is noticed when the kernel connects it to itself.
func TestNewHostAddress(t *testing.T) {
	server := echoTCP(t, "secret")
	real := netip.AddrPortFrom(netip.MustParseAddr("127.0.0.1"), server.Port())
	w := newWorld(t, Config{})
	f := &flow{target: real}
	conn, err := net.Dial("tcp4", real.String())
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	// The list knows loopback, so a rule had to open it; an address unknown to the list must not pass.
	if why := w.n.reached(conn, f.target.Addr()); why != allowed {
		t.Errorf("a loopback that a rule opened: %v", why)
	}
	if why := w.n.reached(fakeConn{conn, "198.51.100.9:5"}, netip.MustParseAddr("198.51.100.9")); why != reasonHost {
		t.Errorf("a flow to the host's new address: %v", why)
	}
}

type fakeConn struct {
	net.Conn
	local string
}

func (c fakeConn) LocalAddr() net.Addr {
	return net.TCPAddrFromAddrPort(netip.MustParseAddrPort(c.local))
}

func TestDeniedFlowIsRefusedAtOnce(t *testing.T) {
	w := newWorld(t, Config{Rules: rules(t, "deny out tcp any:25")})
	if c, err := w.boot().dial(outside + ":25"); err == nil {
		c.Close()
		t.Fatal("connected")
	}
	e := w.await(event.NetDenied, "deny out tcp any:25")
	if e.Fields["count"] != int64(1) || e.Fields["remote"] != outside+":25" || e.Fields["direction"] != "out" {
		t.Errorf("net.denied: %v", e.Fields)
	}
}

func TestInboundRuleByClient(t *testing.T) {
	l, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	w := newWorld(t, Config{Listeners: []Listener{{TCP: l, Guest: 22}}, Rules: rules(t, "deny in tcp 127.0.0.0/8:22")})
	w.boot().listen(22)
	c, err := net.Dial("tcp4", l.Addr().String())
	if err == nil {
		defer c.Close()
		if _, err = c.Read(make([]byte, 1)); !errors.Is(err, unix.ECONNRESET) {
			t.Errorf("a denied client saw %v", err)
		}
	}
	w.await(event.NetDenied, "direction:in", "127.0.0.1", "deny in tcp")
}

// New rules hold for the flows that are open.
func TestSetRulesCutsOpenFlows(t *testing.T) {
	server := echoTCP(t, "hello")
	w := newWorld(t, Config{Dial: toLoopback(map[uint16]netip.AddrPort{80: server, 81: server})})
	g := w.boot()
	cut, kept := g.mustDial(outside+":80"), g.mustDial(outside+":81")
	hear(t, cut, "hello")
	hear(t, kept, "hello")
	if err := w.n.SetRules(rules(t, "deny out tcp any:80")); err != nil {
		t.Fatal(err)
	}
	if _, err := cut.Read(make([]byte, 1)); err == nil {
		t.Error("a flow that is denied now goes on")
	}
	w.await(event.NetFlow, "denied", outside+":80")
	say(t, kept, "still here")
	hear(t, kept, "still here")
}

// A client's real address is what the guest sees, where that can be.
func TestClientAddressIsShown(t *testing.T) {
	w := newWorld(t, Config{})
	wire := w.plug()
	w.waitAttached()
	client := netip.MustParseAddrPort("203.0.113.5:4321")
	go func() {
		ep, _, err := w.n.dialGuest(w.n.ctx, client, 22)
		if err == nil {
			ep.Close()
		}
	}()
	p := parse(t, receive(t, wire))
	ip, tcp := p.Layer(layers.LayerTypeIPv4).(*layers.IPv4), p.Layer(layers.LayerTypeTCP).(*layers.TCP)
	if ip.SrcIP.String() != "203.0.113.5" || tcp.SrcPort != 4321 || tcp.DstPort != 22 || !tcp.SYN {
		t.Errorf("the guest is called by %v:%v", ip.SrcIP, tcp.SrcPort)
	}
	for addr, want := range map[string]bool{"203.0.113.5": true, "127.0.0.1": false, "10.77.0.9": false, "0.0.0.0": false, "::1": false, "224.0.0.1": false} {
		if w.n.visible(netip.MustParseAddr(addr)) != want {
			t.Errorf("visible(%s) is not %v", addr, want)
		}
	}
}
