package network

import (
	"net"
	"net/netip"
	"testing"
	"time"

	"golang.org/x/net/dns/dnsmessage"

	"vigia/internal/event"
)

// nameServer is a host's name server that knows some names, over UDP and TCP at one port.
func nameServer(t testing.TB, zone map[string]string) netip.AddrPort {
	t.Helper()
	u, err := net.ListenPacket("udp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("tcp4", u.LocalAddr().String())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { u.Close(); l.Close() })
	go func() {
		b := make([]byte, 4096)
		for {
			n, from, err := u.ReadFrom(b)
			if err != nil {
				return
			}
			u.WriteTo(reply(b[:n], zone, false), from)
		}
	}()
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			if q, err := readDNS(c, 4096); err == nil {
				sendDNS(c, "tcp", reply(q, zone, true))
			}
			c.Close()
		}
	}()
	return addrPortOf(u.LocalAddr())
}

func reply(query []byte, zone map[string]string, stream bool) []byte {
	q, err := parseQuery(query)
	if err != nil {
		return nil
	}
	a, known := zone[q.name]
	h := dnsmessage.Header{ID: q.id, Response: true, Truncated: !stream && q.name == "long.example.org"}
	if !known {
		h.RCode = dnsmessage.RCodeNameError
	}
	b := dnsmessage.NewBuilder(nil, h)
	b.StartQuestions()
	b.Question(q.q)
	b.StartAnswers()
	if known && q.q.Type == dnsmessage.TypeA && !h.Truncated {
		alias := dnsmessage.MustNewName("alias.example.net.")
		b.CNAMEResource(dnsmessage.ResourceHeader{Name: q.q.Name, Class: dnsmessage.ClassINET, TTL: 60}, dnsmessage.CNAMEResource{CNAME: alias})
		b.AResource(dnsmessage.ResourceHeader{Name: alias, Class: dnsmessage.ClassINET, TTL: 60}, dnsmessage.AResource{A: netip.MustParseAddr(a).As4()})
	}
	m, _ := b.Finish()
	return m
}

func queryFor(t testing.TB, name string) []byte {
	t.Helper()
	b := dnsmessage.NewBuilder(nil, dnsmessage.Header{ID: 0x1234, RecursionDesired: true})
	b.StartQuestions()
	b.Question(dnsmessage.Question{Name: dnsmessage.MustNewName(name), Type: dnsmessage.TypeA, Class: dnsmessage.ClassINET})
	m, err := b.Finish()
	if err != nil {
		t.Fatal(err)
	}
	return m
}

// lookup asks the gateway, as a resolver in the guest does: by UDP, then by TCP if the answer was cut.
func (g *guest) lookup(name string) answer {
	g.t.Helper()
	query := queryFor(g.t, name)
	q, _ := parseQuery(query)
	for _, network := range []string{"udp", "tcp"} {
		var c net.Conn
		if network == "udp" {
			c = g.dialUDP("10.77.0.1:53")
		} else {
			c = g.mustDial("10.77.0.1:53")
		}
		sendDNS(c, network, query)
		m, err := receiveDNS(c, network)
		c.Close()
		if err != nil {
			g.t.Fatalf("lookup of %s by %s: %v", name, network, err)
		}
		a, err := parseReply(m, &q)
		if err != nil || m[0] != 0x12 || m[1] != 0x34 {
			g.t.Fatalf("lookup of %s: %x, %v", name, m, err)
		}
		if !a.cut {
			return a
		}
	}
	g.t.Fatal("an answer by TCP was cut")
	return answer{}
}

func TestDNS(t *testing.T) {
	servers := []netip.AddrPort{nameServer(t, map[string]string{"www.example.org": "198.51.100.7", "long.example.org": "198.51.100.8"})}
	w := newWorld(t, Config{Resolvers: servers})
	g := w.boot()
	for name, want := range map[string]string{"www.example.org.": "[198.51.100.7]", "LONG.example.org.": "[198.51.100.8]"} {
		if a := g.lookup(name); len(a.addrs) != 1 || "["+a.addrs[0].String()+"]" != want {
			t.Errorf("%s is %v, want %s", name, a.addrs, want)
		}
	}
	if a := g.lookup("nowhere.example.org."); a.rcode != dnsmessage.RCodeNameError {
		t.Errorf("an unknown name gave %v", a)
	}
	w.await(event.NetDNS, "name:www.example.org", "type:A", "NOERROR", "198.51.100.7", "alias.example.net")
	w.await(event.NetDNS, "name:nowhere.example.org", "NXDOMAIN")
}

func TestDNSWithoutServer(t *testing.T) {
	w := newWorld(t, Config{})
	if a := w.boot().lookup("www.example.org."); a.rcode != dnsmessage.RCodeServerFailure {
		t.Errorf("got %v", a)
	}
	w.await(event.NetDNS, "SERVFAIL")
}

// Rules by name hold for the addresses that the guest was given under that name.
func TestRulesByName(t *testing.T) {
	server := echoTCP(t, "hello")
	servers := []netip.AddrPort{nameServer(t, map[string]string{"www.debian.org": "198.51.100.7", "evil.example": "198.51.100.66", "rebind.debian.org": "127.0.0.1"})}
	ports := map[uint16]netip.AddrPort{80: server, servers[0].Port(): servers[0]}
	w := newWorld(t, Config{Resolvers: servers, Dial: toLoopback(ports), Rules: rules(t, "allow out *.debian.org", "deny out any")})
	g := w.boot()
	if c, err := g.dial("198.51.100.7:80"); err == nil {
		c.Close()
		t.Fatal("an address without a name was reached")
	}
	g.lookup("www.debian.org.")
	hear(t, g.mustDial("198.51.100.7:80"), "hello")
	w.n.Stats()
	if a := g.lookup("evil.example."); a.rcode != dnsmessage.RCodeRefused {
		t.Errorf("a name that no rule allows: %v", a)
	}
	w.await(event.NetDenied, "name:evil.example", "deny out any")
	g.lookup("rebind.debian.org.")
	if c, err := g.dial("10.77.0.1:80"); err == nil {
		c.Close()
		t.Fatal("a name server opened the host's loopback")
	}
}

func TestNameTable(t *testing.T) {
	now := time.Unix(1e9, 0)
	n := newNameTable(100)
	n.setRuled(rules(t, "deny out evil.example"))
	evil := netip.MustParseAddr("198.51.100.66")
	n.learn("evil.example", evil, time.Hour, now)
	for i := range 10000 { // a guest that tries to make the table forget
		n.learn("x"+utoa(uint16(i))+".example", netip.AddrFrom4([4]byte{10, 0, byte(i >> 8), byte(i)}), time.Hour, now)
	}
	if n.count > 100 || len(n.addrs) > 100 {
		t.Errorf("%d names of %d addresses are remembered", n.count, len(n.addrs))
	}
	if !n.has("evil.example", evil, now) {
		t.Error("a flood of names pushed out one that a rule needs")
	}
	if n.has("evil.example", evil, now.Add(2*time.Hour)) {
		t.Error("a name outlives its time")
	}
	for i := range 100 {
		n.learn("y"+utoa(uint16(i))+".example", evil, time.Hour, now)
	}
	if len(n.addrs[evil]) > namesOfAddress || !n.has("evil.example", evil, now) {
		t.Errorf("one address has %d names", len(n.addrs[evil]))
	}
}
