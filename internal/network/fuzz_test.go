package network

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"io"
	"net"
	"net/netip"
	"os"
	"testing"

	"github.com/gopacket/gopacket/pcapgo"
	"gvisor.dev/gvisor/pkg/tcpip/stack/gro"

	"vigia/internal/event"
)

// bootFrames are the frames of a real guest (Debian 12, virtio-net) that got a lease by udhcpc, pinged, asked for names and opened
// connections, with the answers it got: testdata/boot.pcapng, made by Network.Capture.
func bootFrames(t testing.TB) (all [][]byte) {
	t.Helper()
	f, err := os.Open("testdata/boot.pcapng")
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	r, err := pcapgo.NewNgReader(f, pcapgo.NgReaderOptions{})
	if err != nil {
		t.Fatal(err)
	}
	for {
		data, _, err := r.ReadPacketData()
		if err == io.EOF {
			return all
		}
		if err != nil {
			t.Fatal(err)
		}
		all = append(all, data)
	}
}

func testWire() wire {
	return wire{guestMAC: [6]byte(guestMAC), gatewayMAC: [6]byte(gatewayMAC), guest: guestIP, gateway: gatewayIP}
}

// What a real guest sent at boot must be understood.
func TestBootFrames(t *testing.T) {
	w := testWire()
	seen := map[class]int{}
	for _, f := range bootFrames(t) {
		if bytes.Equal(f[6:12], guestMAC) {
			p := w.classify(f)
			seen[p.class]++
			if p.class == classDrop && p.reason != reasonIPv6 {
				t.Errorf("dropped as %v: %x", p.reason, f)
			}
		}
	}
	for c, name := range map[class]string{classARP: "ARP", classDHCP: "DHCP", classPing: "ping", classStack: "for the stack"} {
		if seen[c] == 0 {
			t.Errorf("no frame was taken as %s: %v", name, seen)
		}
	}
}

func FuzzFraming(f *testing.F) {
	var stream []byte
	for _, b := range bootFrames(f) {
		stream = append(binary.BigEndian.AppendUint32(stream, uint32(len(b))), b...)
	}
	f.Add(stream[:min(len(stream), 4096)], 7)
	f.Add([]byte{0, 1, 0x10, 0, 1}, 1)
	f.Fuzz(func(t *testing.T, b []byte, chunk int) {
		r := newFrameReader(&chunks{b, 1 + int(uint(chunk)%1000)})
		at := 0
		for {
			frame, err := r.next()
			if err != nil {
				if err == io.EOF && at != len(b) {
					t.Fatalf("a clean end after %d of %d bytes", at, len(b))
				}
				return
			}
			if len(frame) == 0 || len(frame) > maxFrame || !bytes.Equal(frame, b[at+4:at+4+len(frame)]) {
				t.Fatalf("a frame of %d bytes at %d is not the stream's", len(frame), at)
			}
			at += 4 + len(frame)
		}
	})
}

// chunks is a reader that gives a few bytes at a time.
type chunks struct {
	b    []byte
	size int
}

func (c *chunks) Read(p []byte) (int, error) {
	n := copy(p, c.b[:min(len(c.b), c.size)])
	c.b = c.b[n:]
	if n == 0 {
		return 0, io.EOF
	}
	return n, nil
}

func FuzzClassify(f *testing.F) {
	for _, b := range bootFrames(f) {
		f.Add(b)
	}
	w := testWire()
	f.Fuzz(func(t *testing.T, b []byte) {
		p := w.classify(b)
		if p.class == classDrop {
			if p.reason == allowed {
				t.Fatal("dropped without a reason")
			}
			return
		}
		if !bytes.Equal(b[6:12], guestMAC) {
			t.Fatal("another machine's frame passed")
		}
		if p.class == classARP {
			w.answerARP(p.payload)
			return
		}
		if p.src != guestIP && (p.class != classDHCP || p.src != [4]byte{}) {
			t.Fatalf("a packet from %v passed", p.src)
		}
		if p.header < 20 || p.header > len(p.payload) || len(p.payload) > len(b) {
			t.Fatalf("header %d of %d bytes", p.header, len(p.payload))
		}
		p.flow().fields("")
	})
}

func FuzzDHCP(f *testing.F) {
	w := testWire()
	for _, b := range bootFrames(f) {
		if p := w.classify(b); p.class == classDHCP {
			f.Add(p.payload[p.header+8:])
		}
	}
	l := &lease{wire: w, mask: [4]byte{255, 255, 255, 0}, mtu: 1500, hostName: "web"}
	f.Fuzz(func(t *testing.T, b []byte) {
		m, err := parseDHCP(b)
		if err != nil {
			if m != (dhcpMessage{}) {
				t.Fatal("an error came with a value")
			}
			return
		}
		if reply := l.answer(&m); reply != nil {
			if len(reply) < 300 || len(reply) > 576 || [4]byte(reply[4:8]) != m.xid {
				t.Fatalf("reply: %x", reply)
			}
			if a := [4]byte(reply[16:20]); a != guestIP && a != [4]byte{} {
				t.Fatalf("gave away %v", a)
			}
			l.dhcpFrame(&m, reply)
		}
	})
}

// dnsSeeds are the DNS messages of the boot frames.
func dnsSeeds(t testing.TB, fromServer bool) (all [][]byte) {
	for _, b := range bootFrames(t) {
		if len(b) < 54 || b[23] != protoUDP {
			continue
		}
		from, to := binary.BigEndian.Uint16(b[34:]), binary.BigEndian.Uint16(b[36:])
		if from == 53 && fromServer || to == 53 && !fromServer {
			all = append(all, b[42:])
		}
	}
	return all
}

func FuzzDNSQuery(f *testing.F) {
	for _, b := range dnsSeeds(f, false) {
		f.Add(b)
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		q, err := parseQuery(b)
		if err != nil {
			return
		}
		if r := emptyReply(&q, 5); r != nil {
			if a, err := parseReply(r, &q); err != nil || a.rcode != 5 {
				t.Fatalf("our own refusal of %q is not read: %v", q.name, err)
			}
		}
	})
}

func FuzzDNSReply(f *testing.F) {
	for _, b := range dnsSeeds(f, true) {
		f.Add(b)
	}
	queries := dnsSeeds(f, false)
	f.Fuzz(func(t *testing.T, b []byte) {
		for _, raw := range queries {
			q, err := parseQuery(raw)
			if err != nil {
				t.Fatal(err)
			}
			if a, err := parseReply(b, &q); err == nil && (len(a.addrs) > maxAnswers || len(a.addrs) != len(a.ttls)) {
				t.Fatalf("%d addresses", len(a.addrs))
			}
		}
	})
}

// FuzzNetwork feeds whole frames, as many as the input holds, to a network: nothing panics, no table outgrows its limit, every
// event keeps to its kind, and no socket is opened for a guarded address.
func FuzzNetwork(f *testing.F) {
	frames := bootFrames(f)
	for i := range frames {
		var stream []byte
		for _, b := range frames[i:min(i+4, len(frames))] {
			stream = append(binary.BigEndian.AppendUint16(stream, uint16(len(b))), b...)
		}
		f.Add(stream)
	}
	f.Add(append([]byte{0, 54}, synFrame(f, outside, 1, 80)...))
	f.Add(append([]byte{0, 50}, udpFrame(f, outside, 80, make([]byte, 8))...))
	f.Fuzz(func(t *testing.T, stream []byte) {
		w := newWorld(t, Config{Limits: Limits{Flows: 16, Pending: 8}})
		w.n.cfg.Dial = func(_ context.Context, _ string, to netip.AddrPort) (net.Conn, error) {
			if w.n.guarded(to.Addr()) != allowed {
				t.Errorf("a socket for %v", to)
			}
			return nil, errors.New("no internet here")
		}
		gate, guest := net.Pipe()
		w.n.out.attach(gate)
		go io.Copy(io.Discard, guest)
		go w.n.out.serve(gate)
		var merge gro.GRO
		merge.Init(true)
		merge.Dispatcher = w.n.link
		for len(stream) >= 2 {
			size := min(int(binary.BigEndian.Uint16(stream)), len(stream)-2)
			w.n.frame(stream[2:2+size], &merge)
			stream = stream[2+size:]
		}
		flush(&merge)
		if open := w.n.Stats().Open; open > 16 {
			t.Errorf("%d flows", open)
		}
		w.n.out.detach(gate)
		gate.Close()
		guest.Close()
		w.n.Close()
		for _, e := range w.all() {
			if e.Kind == event.NetFlow && e.Fields["local"] == "" {
				t.Errorf("event without its end: %v", e)
			}
		}
	})
}
