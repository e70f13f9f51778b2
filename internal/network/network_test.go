package network

import (
	"fmt"
	"io"
	"net"
	"net/netip"
	"testing"
	"time"

	"vigia/internal/event"
)

// A test's internet: 198.51.100.0/24 (TEST-NET-2) is somewhere out there, and is really the loopback.
const outside = "198.51.100.7"

func TestOutboundTCP(t *testing.T) {
	server := echoTCP(t, "hello\n")
	w := newWorld(t, Config{Dial: toLoopback(map[uint16]netip.AddrPort{80: server})})
	g := w.boot()
	c := g.mustDial(outside + ":80")
	hear(t, c, "hello\n")
	say(t, c, "ping")
	hear(t, c, "ping")
	c.Close()
	e := w.await(event.NetFlow, "closed")
	want := map[string]any{"protocol": "tcp", "direction": "out", "remote": outside + ":80", "bytes_out": int64(4), "bytes_in": int64(10)}
	for k, v := range want {
		if e.Fields[k] != v {
			t.Errorf("net.flow %s is %v, want %v", k, e.Fields[k], v)
		}
	}
	if e.Fields["packets_out"].(int64) < 3 || e.Fields["packets_in"].(int64) < 3 {
		t.Errorf("net.flow counts no packets: %v", e.Fields)
	}
}

func TestOutboundTCPRefusedByTheFarEnd(t *testing.T) {
	w := newWorld(t, Config{Dial: toLoopback(nil)})
	g := w.boot()
	if c, err := g.dial(outside + ":81"); err == nil {
		c.Close()
		t.Fatal("connected to a closed port")
	}
	w.await(event.NetFlow, "reset", outside+":81")
}

func TestHalfClose(t *testing.T) {
	server := echoTCP(t, "")
	w := newWorld(t, Config{Dial: toLoopback(map[uint16]netip.AddrPort{80: server})})
	c := w.boot().mustDial(outside + ":80")
	say(t, c, "the last words")
	c.(interface{ CloseWrite() error }).CloseWrite()
	b, err := io.ReadAll(c)
	if err != nil || string(b) != "the last words" {
		t.Fatalf("after its FIN the guest read %q, %v", b, err)
	}
}

// The loopback of the host is reached only where a rule names it, at the gateway's address or at its own.
func TestHostLoopback(t *testing.T) {
	server := echoTCP(t, "secret")
	port := server.Port()
	for _, c := range []struct {
		rules []string
		open  bool
	}{
		{nil, false},
		{[]string{"allow out any"}, false},
		{[]string{"allow out 0.0.0.0/0"}, false},
		{[]string{"allow out 0.0.0.0/1"}, false},
		{[]string{fmt.Sprintf("allow out tcp 127.0.0.1:%d", port)}, true},
		{[]string{"allow out udp 127.0.0.1"}, false},
		{[]string{"allow out 127.0.0.0/8"}, true},
		{[]string{"deny out tcp any", "allow out 127.0.0.0/8"}, false},
	} {
		t.Run(fmt.Sprint(c.rules), func(t *testing.T) {
			w := newWorld(t, Config{Rules: rules(t, c.rules...)})
			g := w.boot()
			conn, err := g.dial(fmt.Sprintf("10.77.0.1:%d", port))
			if (err == nil) != c.open {
				t.Fatalf("dial: %v; want open %v", err, c.open)
			}
			if err != nil {
				w.await(event.NetDenied, "10.77.0.1")
				return
			}
			defer conn.Close()
			hear(t, conn, "secret")
		})
	}
}

func TestOutboundUDP(t *testing.T) {
	s, err := net.ListenPacket("udp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	go func() {
		b := make([]byte, 64<<10)
		for {
			n, a, err := s.ReadFrom(b)
			if err != nil {
				return
			}
			s.WriteTo(b[:n], a)
		}
	}()
	w := newWorld(t, Config{Dial: toLoopback(map[uint16]netip.AddrPort{7: addrPortOf(s.LocalAddr())})})
	c := w.boot().dialUDP(outside + ":7")
	for _, size := range []int{1, 0, 1400, 9000, 60000} { // the longer ones in fragments, both ways
		msg := make([]byte, size)
		for i := range msg {
			msg[i] = byte(i * 7)
		}
		if _, err := c.Write(msg); err != nil {
			t.Fatal(err)
		}
		back := make([]byte, 64<<10)
		n, err := c.Read(back)
		if err != nil || string(back[:n]) != string(msg) {
			t.Fatalf("%d bytes came back as %d, %v", size, n, err)
		}
	}
	w.n.Close()
	e := w.await(event.NetFlow, "udp", "stopped", outside+":7")
	if e.Fields["bytes_out"] != int64(70401) || e.Fields["bytes_in"] != int64(70401) || e.Fields["packets_out"] != int64(5) {
		t.Errorf("net.flow: %v", e.Fields)
	}
}

func TestPublishedTCP(t *testing.T) {
	l, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	w := newWorld(t, Config{Listeners: []Listener{{TCP: l, Guest: 22}}})
	inside := w.boot().listen(22)
	c, err := net.Dial("tcp4", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	in, err := inside.Accept()
	if err != nil {
		t.Fatal(err)
	}
	if from := addrPortOf(in.RemoteAddr()); from.Addr() != netip.AddrFrom4(gatewayIP) {
		t.Errorf("a client on the loopback looks to the guest like %v", from)
	}
	say(t, in, "SSH-2.0")
	hear(t, c, "SSH-2.0")
	say(t, c, "root")
	hear(t, in, "root")
	in.Close()
	c.Close()
	e := w.await(event.NetFlow, "tcp", c.LocalAddr().String(), "direction:in", "10.77.0.2:22")
	if e.Fields["bytes_in"] != int64(4) || e.Fields["bytes_out"] != int64(7) {
		t.Errorf("net.flow: %v", e.Fields)
	}
}

func TestPublishedUDP(t *testing.T) {
	s, err := net.ListenPacket("udp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	w := newWorld(t, Config{Listeners: []Listener{{UDP: s, Guest: 53}}})
	g := w.boot()
	inside := g.listenUDP(53)
	w.waitAttached()
	for _, words := range []string{"first client", "second client"} {
		c, err := net.Dial("udp4", s.LocalAddr().String())
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		say(t, c, words)
		b := make([]byte, 100)
		n, from, err := inside.ReadFrom(b)
		if err != nil || string(b[:n]) != words {
			t.Fatalf("guest got %q, %v", b[:n], err)
		}
		inside.WriteTo([]byte("re: "+words), from)
		hear(t, c, "re: "+words)
	}
	w.n.Close()
	w.await(event.NetFlow, "udp", "direction:in", "127.0.0.1")
}

// A guest that never completes its handshakes, or never acknowledges an end, does not hold the network up.
func TestCloseWhileTheGuestIsSilent(t *testing.T) {
	server := echoTCP(t, "hello")
	w := newWorld(t, Config{Dial: toLoopback(map[uint16]netip.AddrPort{80: server})})
	wire := w.plug()
	send(t, wire, synFrame(t, outside, 1000, 80))
	if f := receive(t, wire); f[47] != 0x12 {
		t.Fatalf("flags %x, want SYN and ACK", f[47])
	}
	if s := w.n.Stats(); s.Open != 1 {
		t.Errorf("%d flows are open", s.Open)
	}
	done := make(chan struct{})
	go func() { w.n.Close(); close(done) }()
	select {
	case <-done:
	case <-time.After(patience):
		t.Fatal("Close waits for the guest")
	}
}
