package network

import (
	"context"
	"encoding/binary"
	"fmt"
	"net"
	"net/netip"
	"runtime"
	"sync/atomic"
	"testing"
	"time"

	"github.com/gopacket/gopacket"
	"github.com/gopacket/gopacket/layers"

	"vigia/internal/event"
)

// expectAlive shows that the network still serves this wire, and has dealt with all that was sent before.
func expectAlive(t testing.TB, wire net.Conn) {
	t.Helper()
	send(t, wire, arpRequest(gatewayIP))
	for {
		if f := receive(t, wire); binary.BigEndian.Uint16(f[12:]) == etherARP {
			return
		}
	}
}

// Frames that are not the machine's own, or not for this network, are dropped, counted and reported by name.
func TestForgedFrames(t *testing.T) {
	otherMAC := net.HardwareAddr{0x52, 0x54, 0, 0x99, 0x99, 0x99}
	dialled := atomic.Int32{}
	dial := func(context.Context, string, netip.AddrPort) (net.Conn, error) {
		dialled.Add(1)
		return nil, fmt.Errorf("nothing may be dialled")
	}
	forge := func(frame []byte, at int, with ...byte) []byte {
		copy(frame[at:], with)
		return frame
	}
	for _, c := range []struct {
		name   string
		frame  []byte
		reason string
	}{
		{"source MAC", forge(synFrame(t, outside, 1000, 80), 6, otherMAC...), "not the machine's MAC address"},
		{"source IP", forge(synFrame(t, outside, 1000, 80), 26, 10, 77, 0, 3), "not the machine's IP address"},
		{"source IP of the gateway", forge(synFrame(t, outside, 1000, 80), 26, gatewayIP[:]...), "not the machine's IP address"},
		{"source IP zero", forge(udpFrame(t, outside, 80, nil), 26, 0, 0, 0, 0), "not the machine's IP address"},
		{"ARP as the gateway", forge(arpRequest(guestIP), 28, gatewayIP[:]...), "not the machine's IP address"},
		{"ARP with another MAC inside", forge(arpRequest(gatewayIP), 22, otherMAC...), "not the machine's MAC address"},
		{"to another machine's MAC", forge(synFrame(t, outside, 1000, 80), 0, otherMAC...), "no such neighbour"},
		{"multicast MAC", forge(synFrame(t, outside, 1000, 80), 0, 1, 0, 0x5e, 0, 0, 1), "multicast or broadcast"},
		{"IPv6", forge(synFrame(t, outside, 1000, 80), 12, 0x86, 0xdd), "ipv6"},
		{"VLAN", forge(synFrame(t, outside, 1000, 80), 12, 0x81, 0x00), "protocol"},
		{"SCTP", forge(synFrame(t, outside, 1000, 80), 23, 132), "protocol"},
		{"IGMP", forge(synFrame(t, outside, 1000, 80), 23, 2), "protocol"},
		{"runt", []byte{1, 2, 3}, "malformed"},
		{"short IPv4", synFrame(t, outside, 1000, 80)[:30], "malformed"},
		{"header longer than the packet", forge(synFrame(t, outside, 1000, 80), 14, 0x4f, 0, 0, 30), "malformed"},
		{"IPv4 length past the frame", forge(synFrame(t, outside, 1000, 80), 16, 0xff, 0xff), "malformed"},
		{"tiny fragment", forge(udpFrame(t, outside, 80, make([]byte, 64)), 20, 0x20, 0), "fragment"},
		{"fragment past 64 KiB", forge(udpFrame(t, outside, 80, make([]byte, 640)), 20, 0x1f, 0xff), "fragment"},
		{"ping in fragments", forge(echoFrame(t, outside), 20, 0x20, 0), "fragment"},
		{"ICMP redirect", forge(echoFrame(t, outside), 34, 5), "icmp"},
		{"ICMP unreachable to the gateway", forge(echoFrame(t, "10.77.0.1"), 34, 3), "icmp"},
		{"ping without a socket", echoFrame(t, outside), "host allows no unprivileged ping"},
		{"metadata", synFrame(t, "169.254.169.254", 1000, 80), "link-local or cloud metadata"},
		{"limited broadcast", udpFrame(t, "255.255.255.255", 9, nil), "not an address of the internet"},
		{"malformed DNS", udpFrame(t, "10.77.0.1", 53, []byte("?")), "malformed dns"},
		{"malformed DHCP", udpFrame(t, "10.77.0.1", 67, []byte("?")), "malformed"},
	} {
		t.Run(c.name, func(t *testing.T) {
			dialled.Store(0)
			w := newWorld(t, Config{Dial: dial})
			wire := w.plug()
			send(t, wire, c.frame)
			expectAlive(t, wire)
			w.await(event.NetDenied, c.reason)
			if w.n.Stats().Dropped[c.reason] != 1 {
				t.Errorf("counted: %v", w.n.Stats().Dropped)
			}
			if d := dialled.Load(); d > 0 && c.name != "ping without a socket" {
				t.Errorf("%d sockets were opened for it", d)
			}
		})
	}
}

func TestARP(t *testing.T) {
	w := newWorld(t, Config{})
	wire := w.plug()
	for _, ip := range [][4]byte{guestIP, {10, 77, 0, 3}, {192, 0, 2, 1}} { // its own address must look free
		send(t, wire, arpRequest(ip))
	}
	send(t, wire, arpRequest(gatewayIP))
	a, ok := parse(t, receive(t, wire)).Layer(layers.LayerTypeARP).(*layers.ARP)
	if !ok || a.Operation != layers.ARPReply || net.IP(a.SourceProtAddress).String() != "10.77.0.1" || net.HardwareAddr(a.SourceHwAddress).String() != gatewayMAC.String() {
		t.Errorf("ARP answer: %+v", a)
	}
}

func TestGatewayAnswersPing(t *testing.T) {
	w := newWorld(t, Config{})
	wire := w.plug()
	send(t, wire, echoFrame(t, "10.77.0.1"))
	e, ok := parse(t, receive(t, wire)).Layer(layers.LayerTypeICMPv4).(*layers.ICMPv4)
	if !ok || e.TypeCode.Type() != 0 || e.Id != 7 || string(e.Payload) != "abcdefgh" {
		t.Errorf("echo: %+v", e)
	}
}

// A ping to the outside goes through a socket whose identifier is the kernel's; the guest sees its own.
func TestPingOutside(t *testing.T) {
	gate, far := net.Pipe()
	defer far.Close()
	w := newWorld(t, Config{Dial: func(_ context.Context, network string, to netip.AddrPort) (net.Conn, error) {
		if network != "ping4" || to.Addr() != netip.MustParseAddr(outside) {
			t.Errorf("dialled %s %v", network, to)
		}
		return gate, nil
	}})
	wire := w.plug()
	go func() {
		b := make([]byte, 100)
		n, _ := far.Read(b)
		b[0], b[4], b[5] = 0, 0xab, 0xcd
		far.Write(b[:n])
	}()
	send(t, wire, echoFrame(t, outside))
	p := parse(t, receive(t, wire))
	e, ok := p.Layer(layers.LayerTypeICMPv4).(*layers.ICMPv4)
	if !ok || e.TypeCode.Type() != 0 || e.Id != 7 || e.Seq != 1 || sumWords(0, e.Contents, e.Payload) != 0xffff {
		t.Errorf("echo: %+v", e)
	}
	w.n.Close()
	w.await(event.NetFlow, "icmp", outside)
}

// A flood of SYNs, of each kind of address, holds no more than the limits say, and costs a bounded number of events.
func TestSYNFlood(t *testing.T) {
	stuck := func(ctx context.Context, _ string, _ netip.AddrPort) (net.Conn, error) {
		<-ctx.Done()
		return nil, ctx.Err()
	}
	w := newWorld(t, Config{Dial: stuck, Limits: Limits{Flows: 50, Pending: 20, EventRate: 10}})
	wire := w.plug()
	before := runtime.NumGoroutine()
	go drain(wire.(*net.UnixConn))
	for i := range 20000 {
		dst := netip.AddrFrom4([4]byte{198, 51, byte(i >> 8), byte(i)}).String()
		sendFrame(wire, synFrame(t, dst, uint16(1024+i%50000), uint16(1+i%1000)))
	}
	w.settled(20000)
	if open := w.n.Stats().Open; open > 20 {
		t.Errorf("%d flows are being opened, the limit is 20", open)
	}
	if extra := runtime.NumGoroutine() - before; extra > 60 {
		t.Errorf("%d goroutines more than before", extra)
	}
	if n := len(w.all()); n > 400 {
		t.Errorf("%d events", n)
	}
	w.await(event.NetDenied, "too many flows being opened")
	if cut := w.n.Quarantine(true); cut.Flows != 20 {
		t.Errorf("quarantine cut %d, want the 20 being opened", cut.Flows)
	}
}

// A UDP flood to many places is held to the flow limit.
func TestUDPFlood(t *testing.T) {
	sink, err := net.ListenPacket("udp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer sink.Close()
	opened := atomic.Int32{}
	dial := func(ctx context.Context, network string, _ netip.AddrPort) (net.Conn, error) {
		opened.Add(1)
		return dialHost(ctx, network, addrPortOf(sink.LocalAddr()))
	}
	w := newWorld(t, Config{Dial: dial, Limits: Limits{Flows: 30, EventRate: 10}})
	wire := w.plug()
	go drain(wire.(*net.UnixConn))
	for i := range 5000 {
		sendFrame(wire, udpFrame(t, outside, uint16(1+i), []byte("x")))
	}
	w.settled(5000)
	if s := w.n.Stats(); s.Open > 30 || s.Dropped["too many flows"] == 0 {
		t.Errorf("%d flows are open, the limit is 30; dropped: %v", s.Open, s.Dropped)
	}
	if n := opened.Load(); n > 30 {
		t.Errorf("%d sockets were opened", n)
	}
}

// Floods of DHCP and DNS are answered at a bounded rate and remembered nowhere.
func TestServiceFloods(t *testing.T) {
	silent, err := net.ListenPacket("udp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer silent.Close()
	w := newWorld(t, Config{Resolvers: []netip.AddrPort{addrPortOf(silent.LocalAddr())}, Limits: Limits{DNSInFlight: 8, EventRate: 10}})
	wire := w.plug()
	before := runtime.NumGoroutine()
	go drain(wire.(*net.UnixConn))
	query := udpFrame(t, "10.77.0.1", 53, queryFor(t, "a.example.org."))
	discover := dhcpFrame(t, layers.DHCPMsgTypeDiscover)
	for range 5000 {
		sendFrame(wire, query)
		sendFrame(wire, discover)
	}
	w.settled(10000)
	if extra := runtime.NumGoroutine() - before; extra > 40 {
		t.Errorf("%d goroutines more than before", extra)
	}
	if s := w.n.Stats(); s.Dropped["flood"] < 4000 {
		t.Errorf("dropped: %v", s.Dropped)
	}
	if n := len(w.all()); n > 200 {
		t.Errorf("%d events", n)
	}
}

// Fragments that never become whole are held to the reassembler's limit.
func TestFragmentFlood(t *testing.T) {
	w := newWorld(t, Config{})
	wire := w.plug()
	go drain(wire.(*net.UnixConn))
	var before, after runtime.MemStats
	runtime.GC()
	runtime.ReadMemStats(&before)
	frame := udpFrame(t, outside, 80, make([]byte, minFragment))
	copy(frame[20:], []byte{0x20, 0})
	for i := range 20000 {
		binary.BigEndian.PutUint16(frame[18:], uint16(i))
		sendFrame(wire, frame)
	}
	w.settled(20000)
	runtime.GC()
	runtime.ReadMemStats(&after)
	if grown := int64(after.HeapAlloc) - int64(before.HeapAlloc); grown > 24<<20 {
		t.Errorf("fragments hold %d MiB", grown>>20)
	}
}

// settled waits until the frame loop has seen so many frames.
func (w *world) settled(frames int64) {
	w.t.Helper()
	for deadline := time.Now().Add(patience); w.n.Stats().FramesOut < frames; time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			w.t.Fatalf("only %d frames of %d were seen", w.n.Stats().FramesOut, frames)
		}
	}
}

func drain(c *net.UnixConn) {
	b := make([]byte, 64<<10)
	for {
		if _, err := c.Read(b); err != nil {
			return
		}
	}
}

// A guest that sends but never reads harms nobody but itself: the network can still be asked, cut and closed.
func TestGuestThatDoesNotRead(t *testing.T) {
	server := echoTCP(t, "")
	w := newWorld(t, Config{Dial: toLoopback(map[uint16]netip.AddrPort{80: server})})
	wire := w.plug()
	for range 30000 { // each asks for an answer, until the frame loop waits for room
		wire.SetWriteDeadline(time.Now().Add(300 * time.Millisecond))
		if err := sendFrame(wire, build(t, eth(layers.EthernetTypeIPv4), ip4(layers.IPProtocolICMPv4, "10.77.0.1"),
			&layers.ICMPv4{TypeCode: layers.CreateICMPv4TypeCode(8, 0)}, gopacket.Payload(make([]byte, 1400)))); err != nil {
			break
		}
	}
	done := make(chan struct{})
	go func() { w.n.Quarantine(true); w.n.Close(); close(done) }()
	select {
	case <-done:
	case <-time.After(patience):
		t.Fatal("a guest that does not read holds the network up")
	}
}

func TestFramingErrors(t *testing.T) {
	for name, c := range map[string]struct{ bytes, want string }{
		"zero length":   {"\x00\x00\x00\x00", "out of step"},
		"huge length":   {"\xff\xff\xff\xff", "out of step"},
		"one too long":  {"\x00\x01\x10\x01", "out of step"},
		"cut in length": {"\x00\x00", "unexpected EOF"},
		"cut in frame":  {"\x00\x00\x00\x05abc", "unexpected EOF"},
		"end":           {"", ""},
	} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t, Config{})
			gate, wire := socketpair(t)
			defer wire.Close()
			wire.Write([]byte(c.bytes))
			wire.(*net.UnixConn).CloseWrite()
			err := w.n.Attach(gate)
			if got := fmt.Sprint(err); (c.want == "" && err != nil) || (c.want != "" && !contains(got, c.want)) {
				t.Errorf("Attach: %v, want %q", err, c.want)
			}
		})
	}
}
