package network

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"
	"golang.org/x/sys/unix"
	"gvisor.dev/gvisor/pkg/buffer"
	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/adapters/gonet"
	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/link/channel"
	"gvisor.dev/gvisor/pkg/tcpip/link/ethernet"
	"gvisor.dev/gvisor/pkg/tcpip/network/arp"
	"gvisor.dev/gvisor/pkg/tcpip/network/ipv4"
	"gvisor.dev/gvisor/pkg/tcpip/stack"
	"gvisor.dev/gvisor/pkg/tcpip/transport/icmp"
	"gvisor.dev/gvisor/pkg/tcpip/transport/tcp"
	"gvisor.dev/gvisor/pkg/tcpip/transport/udp"

	"vigia/internal/event"
	"vigia/internal/vm"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

var (
	guestMAC   = net.HardwareAddr{0x52, 0x54, 0, 0x12, 0x34, 0x56}
	guestIP    = [4]byte{10, 77, 0, 2}
	gatewayIP  = [4]byte{10, 77, 0, 1}
	gatewayMAC = net.HardwareAddr{0x52, 0x55, 0x0a, 0x4d, 0, 1}
)

const patience = 20 * time.Second // how long a test waits for what must happen

// world is a Network and what a test sees of it.
type world struct {
	t      testing.TB
	n      *Network
	mu     sync.Mutex
	events []event.Event
	news   chan struct{}
}

// newWorld makes a network. The host in it has the address 192.0.2.1 only, whatever the test runs on.
func newWorld(t testing.TB, cfg Config) *world {
	t.Helper()
	w := &world{t: t, news: make(chan struct{}, 1)}
	cfg.Name = "web"
	cfg.MAC = guestMAC
	if cfg.HostAddrs == nil {
		cfg.HostAddrs = func() ([]netip.Prefix, error) { return []netip.Prefix{netip.MustParsePrefix("192.0.2.1/24")}, nil }
	}
	n, err := New(cfg, w.emit)
	if err != nil {
		t.Fatal(err)
	}
	w.n = n
	t.Cleanup(func() { n.Close() })
	return w
}

func (w *world) emit(k event.Kind, f event.Fields) {
	e := event.Event{ID: event.MakeID("test", 1), Machine: "web", Time: time.Now(), Kind: k, Fields: f}
	if _, err := e.Marshal(); err != nil {
		w.t.Errorf("event %v: %v", e, err)
	}
	w.mu.Lock()
	w.events = append(w.events, e)
	w.mu.Unlock()
	select {
	case w.news <- struct{}{}:
	default:
	}
}

// await waits for an event of a kind whose fields, printed, hold all the words.
func (w *world) await(kind event.Kind, words ...string) event.Event {
	w.t.Helper()
	deadline := time.After(patience)
	for {
		if e, ok := w.find(kind, words...); ok {
			return e
		}
		select {
		case <-w.news:
		case <-deadline:
			w.t.Fatalf("no %s event with %q; there are: %v", kind, words, w.all())
		}
	}
}

func (w *world) find(kind event.Kind, words ...string) (event.Event, bool) {
	for _, e := range w.all() {
		text := fmt.Sprint(e.Fields)
		if e.Kind == kind && !slices.ContainsFunc(words, func(s string) bool { return !strings.Contains(text, s) }) {
			return e, true
		}
	}
	return event.Event{}, false
}

func (w *world) all() []event.Event {
	w.mu.Lock()
	defer w.mu.Unlock()
	return slices.Clone(w.events)
}

// socketpair returns the two ends of a unix stream, as QEMU and the gate have them.
func socketpair(t testing.TB) (a, b net.Conn) {
	t.Helper()
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	var conns [2]net.Conn
	for i, fd := range fds {
		f := os.NewFile(uintptr(fd), "pair")
		if conns[i], err = net.FileConn(f); err != nil {
			t.Fatal(err)
		}
		f.Close()
	}
	return conns[0], conns[1]
}

// plug attaches a wire and returns the guest's end of it. The wire is unplugged at the end of the test.
func (w *world) plug() net.Conn {
	w.t.Helper()
	gate, guest := socketpair(w.t)
	done := make(chan struct{})
	go func() {
		defer close(done)
		if err := w.n.Attach(gate); err != nil && !errors.Is(err, io.ErrUnexpectedEOF) && !errors.Is(err, unix.ECONNRESET) && !errors.Is(err, unix.EPIPE) {
			w.t.Errorf("Attach: %v", err)
		}
	}()
	w.t.Cleanup(func() { guest.Close(); <-done })
	return guest
}

// guest is a machine with a TCP/IP stack of its own.
type guest struct {
	t    testing.TB
	s    *stack.Stack
	card *channel.Endpoint
	conn net.Conn
	seen chan []byte // every frame that came in, when somebody looks
}

func (w *world) boot() *guest {
	w.t.Helper()
	g := &guest{t: w.t, conn: w.plug(), seen: make(chan []byte, 4096)}
	g.card = channel.New(1024, 1500, tcpip.LinkAddress(guestMAC))
	g.s = stack.New(stack.Options{
		NetworkProtocols:   []stack.NetworkProtocolFactory{ipv4.NewProtocol, arp.NewProtocol},
		TransportProtocols: []stack.TransportProtocolFactory{tcp.NewProtocol, udp.NewProtocol, icmp.NewProtocol4},
	})
	g.s.CreateNIC(1, ethernet.New(g.card))
	g.s.AddProtocolAddress(1, tcpip.ProtocolAddress{Protocol: ipv4.ProtocolNumber, AddressWithPrefix: tcpip.AddressWithPrefix{Address: tcpip.AddrFrom4(guestIP), PrefixLen: 24}}, stack.AddressProperties{})
	subnet, _ := tcpip.NewSubnet(tcpip.AddrFrom4([4]byte{10, 77, 0, 0}), tcpip.MaskFromBytes([]byte{255, 255, 255, 0}))
	g.s.SetRouteTable([]tcpip.Route{{Destination: subnet, NIC: 1}, {Destination: header.IPv4EmptySubnet, Gateway: tcpip.AddrFrom4(gatewayIP), NIC: 1}})
	ctx, cancel := context.WithCancel(context.Background())
	var work sync.WaitGroup
	work.Add(2)
	go func() { defer work.Done(); g.send(ctx) }()
	go func() { defer work.Done(); g.receive() }()
	w.t.Cleanup(func() {
		cancel()
		g.conn.Close()
		work.Wait()
		g.s.Close()
		g.s.Wait()
	})
	return g
}

func (g *guest) send(ctx context.Context) {
	for {
		pkt := g.card.ReadContext(ctx)
		if pkt == nil {
			return
		}
		b := pkt.ToView().ToSlice()
		pkt.DecRef()
		if sendFrame(g.conn, b) != nil {
			return
		}
	}
}

func (g *guest) receive() {
	r := newFrameReader(g.conn)
	for {
		frame, err := r.next()
		if err != nil {
			return
		}
		select {
		case g.seen <- bytes.Clone(frame):
		default:
		}
		pkt := stack.NewPacketBuffer(stack.PacketBufferOptions{Payload: buffer.MakeWithData(frame)})
		g.card.InjectInbound(0, pkt)
		pkt.DecRef()
	}
}

func sendFrame(w io.Writer, frame []byte) error {
	_, err := w.Write(append(binary.BigEndian.AppendUint32(nil, uint32(len(frame))), frame...))
	return err
}

func full(a netip.AddrPort) tcpip.FullAddress {
	return tcpip.FullAddress{Addr: tcpip.AddrFrom4(a.Addr().As4()), Port: a.Port()}
}

func (g *guest) dial(to string) (net.Conn, error) {
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	return gonet.DialContextTCP(ctx, g.s, full(netip.MustParseAddrPort(to)), ipv4.ProtocolNumber)
}

func (g *guest) mustDial(to string) net.Conn {
	g.t.Helper()
	c, err := g.dial(to)
	if err != nil {
		g.t.Fatalf("dial %s: %v", to, err)
	}
	g.t.Cleanup(func() { c.Close() })
	c.SetDeadline(time.Now().Add(patience))
	return c
}

func (g *guest) dialUDP(to string) net.Conn {
	g.t.Helper()
	a := full(netip.MustParseAddrPort(to))
	c, err := gonet.DialUDP(g.s, nil, &a, ipv4.ProtocolNumber)
	if err != nil {
		g.t.Fatal(err)
	}
	g.t.Cleanup(func() { c.Close() })
	c.SetDeadline(time.Now().Add(patience))
	return c
}

func (g *guest) listen(port uint16) net.Listener {
	g.t.Helper()
	l, err := gonet.ListenTCP(g.s, tcpip.FullAddress{Port: port}, ipv4.ProtocolNumber)
	if err != nil {
		g.t.Fatal(err)
	}
	g.t.Cleanup(func() { l.Close() })
	return l
}

func rule(t testing.TB, s string) vm.NetRule {
	t.Helper()
	r, err := vm.ParseNetRule(s)
	if err != nil {
		t.Fatal(err)
	}
	return r
}

func rules(t testing.TB, lines ...string) (all []vm.NetRule) {
	for _, l := range lines {
		all = append(all, rule(t, l))
	}
	return all
}

// echoTCP is a server on the host's loopback that sends back what it gets, after its greeting.
func echoTCP(t testing.TB, greeting string) netip.AddrPort {
	t.Helper()
	l, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	var work sync.WaitGroup
	work.Add(1)
	go func() {
		defer work.Done()
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			work.Add(1)
			go func() {
				defer work.Done()
				defer c.Close()
				io.WriteString(c, greeting)
				io.Copy(c, c)
			}()
		}
	}()
	t.Cleanup(func() { l.Close(); work.Wait() })
	return netip.MustParseAddrPort(l.Addr().String())
}

// toLoopback dials every address at its port on the loopback: the internet of a test.
func toLoopback(ports map[uint16]netip.AddrPort) Dial {
	return func(ctx context.Context, network string, to netip.AddrPort) (net.Conn, error) {
		real, ok := ports[to.Port()]
		if !ok {
			return nil, unix.ECONNREFUSED
		}
		return dialHost(ctx, network, real)
	}
}

func say(t testing.TB, c net.Conn, words string) {
	t.Helper()
	if _, err := io.WriteString(c, words); err != nil {
		t.Fatalf("write %q: %v", words, err)
	}
}

func hear(t testing.TB, c net.Conn, words string) {
	t.Helper()
	buf := make([]byte, len(words))
	if _, err := io.ReadFull(c, buf); err != nil || string(buf) != words {
		t.Fatalf("read %q, %v; want %q", buf, err, words)
	}
}

func (g *guest) listenUDP(port uint16) net.PacketConn {
	g.t.Helper()
	c, err := gonet.DialUDP(g.s, &tcpip.FullAddress{Port: port}, nil, ipv4.ProtocolNumber)
	if err != nil {
		g.t.Fatal(err)
	}
	g.t.Cleanup(func() { c.Close() })
	c.SetDeadline(time.Now().Add(patience))
	return c
}
