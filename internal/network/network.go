// Package network is one machine's network: everything between the frames that QEMU sends and the sockets of the host.
//
//	QEMU ── frames over a unix socket ──► frame loop ──► stack ──► NAT ──► host sockets
//	                                      │ quarantine   gVisor    rules
//	                                      │ capture                flows, events
//	                                      │ anti-spoof
//	                                      └ ARP, DHCP, ping
//
// The guest sees a network of two: itself (10.77.0.2) and a gateway (10.77.0.1) that is its router, its DHCP server and its
// name server. Nothing else exists on the wire: no bridge, no other machine, no host. What the guest starts
// towards the internet ends in the gateway's TCP/IP stack and goes on as a socket of this process; what comes
// in does so only through ports that were published, on listeners that the daemon opened.
//
// The frame loop looks at each frame before anything else does. A quarantined machine's frames end there, both
// ways. A frame with another machine's MAC or IP address ends there, as does everything that is not ARP or IPv4 (see
// doc/network.md for IPv6). Each flow is then tried against the machine's rules (rules.go), counted, and
// reported once when it ends; refusals are reported with counts. All tables, queues and rates have a ceiling (Limits), and a
// flood costs the guest its own network only.
//
// Framing is QEMU's -netdev stream: a 4-byte big-endian length, then the Ethernet frame without its checksum
// (QEMU net/stream.c, net_fill_rstate in net/net.c).
//
// The package opens no file and, apart from the flows it was asked for, no socket. It runs in the gate, a process
// that holds nothing else.
package network

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"

	"gvisor.dev/gvisor/pkg/tcpip/stack"
	"gvisor.dev/gvisor/pkg/tcpip/transport/tcp"

	"vigia/internal/event"
	"vigia/internal/vm"
)

// ErrConfig is wrapped by New's errors, ErrAttached returned by Attach while a connection is being served, ErrClosed after
// Close.
var (
	ErrConfig   = errors.New("bad network configuration")
	ErrAttached = errors.New("network is already attached to a frame connection")
	ErrClosed   = errors.New("network is closed")
)

// Listener is a published port: a socket that the daemon bound, and the guest's port behind it. Exactly one of TCP
// and UDP is set. The Network closes it at the end.
type Listener struct {
	TCP   net.Listener
	UDP   net.PacketConn
	Guest uint16
}

// Dial opens a flow's socket on the host. Network is "tcp4", "udp4" or "ping4" (an unprivileged ICMP echo socket).
type Dial func(ctx context.Context, network string, to netip.AddrPort) (net.Conn, error)

// Config says what a machine's network is. Name and MAC are needed, all else has a default.
type Config struct {
	Name       string           // the machine's: it becomes the guest's host name by DHCP
	MAC        net.HardwareAddr // the guest's only one
	Guest      netip.Prefix     // the guest's address in its subnet; default 10.77.0.2/24
	Gateway    netip.Addr       // default 10.77.0.1
	GatewayMAC net.HardwareAddr // default 52:55:0a:4d:00:01
	MTU        int              // of the guest's interface, also told by DHCP; default 1500, at most 65520

	Rules       []vm.NetRule
	Listeners   []Listener
	Resolvers   []netip.AddrPort // the host's name servers
	Quarantined bool             // begin cut off

	HostAddrs   func() ([]netip.Prefix, error) // the host's own addresses; default: ask the kernel
	Dial        Dial                           // default: real sockets
	OnFirstDrop func(time.Time)                // called once in each quarantine, at the first frame it drops
	Limits      Limits
	// Stage answers in the world's place: no flow leaves. nil: the world does.
	Stage *Stage
	// Held is told how many events are counted and not told yet, whenever that changes; it must not block.
	Held func(int64)
}

// Limits are ceilings on what one guest, or the outside, can make the gate hold. A zero field means its default.
type Limits struct {
	Flows       int // open flows of all protocols (512)
	Pending     int // TCP flows being opened (128)
	DNSInFlight int // names being asked for (64)
	DNSRate     int // names asked for per second (200)
	Names       int // names remembered for rules and reports (2048)
	EventRate   int // events of each kind per second; the rest is counted (50)
}

func (l *Limits) fill() {
	for _, f := range []struct {
		p *int
		v int
	}{{&l.Flows, 512}, {&l.Pending, 128}, {&l.DNSInFlight, 64}, {&l.DNSRate, 200}, {&l.Names, 2048}, {&l.EventRate, 50}} {
		if *f.p <= 0 {
			*f.p = f.v
		}
	}
}

// maxMTU is what a frame of QEMU's stream socket can carry: NET_BUFSIZE is 4096+65536, and an IPv4 packet 65535; 65520 leaves room
// for the Ethernet header and is a multiple of 8, as passt found.
const maxMTU = 65520

func (c *Config) fill() error {
	bad := func(format string, a ...any) error {
		return fmt.Errorf("%w: "+format, append([]any{ErrConfig}, a...)...)
	}
	if !c.Guest.IsValid() {
		c.Guest = netip.MustParsePrefix("10.77.0.2/24")
	}
	if !c.Gateway.IsValid() {
		c.Gateway = c.Guest.Masked().Addr().Next()
	}
	if len(c.GatewayMAC) == 0 {
		c.GatewayMAC = net.HardwareAddr{0x52, 0x55, 0x0a, 0x4d, 0x00, 0x01}
	}
	if c.MTU == 0 {
		c.MTU = 1500
	}
	if c.HostAddrs == nil {
		c.HostAddrs = interfaceAddrs
	}
	if c.Stage != nil {
		c.Dial, c.Resolvers = c.Stage.Dial, nil
		c.HostAddrs = func() ([]netip.Prefix, error) { return nil, nil } // it has none to guard
		if len(c.Listeners) > 0 {
			return bad("a stage has no ports")
		}
	}
	if c.Dial == nil {
		c.Dial = dialHost
	}
	c.Limits.fill()
	switch {
	case len(c.MAC) != 6 || c.MAC[0]&1 != 0:
		return bad("machine's MAC %q is not a unicast Ethernet address", c.MAC)
	case len(c.GatewayMAC) != 6 || c.GatewayMAC[0]&1 != 0:
		return bad("gateway's MAC %q is not a unicast Ethernet address", c.GatewayMAC)
	case !c.Guest.Addr().Is4() || c.Guest.Bits() > 30:
		return bad("guest address %v is not an IPv4 address in a subnet of at least 4", c.Guest)
	case !c.Guest.Contains(c.Gateway) || c.Gateway == c.Guest.Addr():
		return bad("gateway %v is not another address of %v", c.Gateway, c.Guest.Masked())
	case c.MTU < 576 || c.MTU > maxMTU:
		return bad("MTU %d is not 576 to %d", c.MTU, maxMTU)
	}
	for _, l := range c.Listeners {
		if (l.TCP == nil) == (l.UDP == nil) || l.Guest == 0 {
			return bad("a listener has no socket or no guest port")
		}
	}
	for i := range c.Rules {
		if err := c.Rules[i].Check(); err != nil {
			return fmt.Errorf("%w: %w", ErrConfig, err)
		}
	}
	return nil
}

// Network is one machine's. All methods may be called at any time from any goroutine.
type Network struct {
	cfg    Config
	guest  netip.Addr
	wire   wire
	report *reporter
	rules  atomic.Pointer[[]vm.NetRule]
	// hostName is what DHCP tells the guest its name is.
	hostName atomic.Pointer[string]
	names    *nameTable
	hosts    *hostAddrs
	flows    *flowTable
	out      *egress
	dns      *dnsProxy
	taps     taps
	stats    counters

	stack *stack.Stack
	link  *link
	tcpin *tcp.Forwarder

	inputs atomic.Pointer[Inputs] // nil: what enters is not kept

	closing chan struct{} // a slot per endpoint that waits for the guest's last word

	quarantine quarantine
	ctx        context.Context // ends with Close
	stop       context.CancelFunc
	work       sync.WaitGroup // every goroutine of the package

	mu     sync.Mutex
	conn   net.Conn // being served
	closed bool
}

// SetName changes the name that DHCP gives the guest from now on.
func (n *Network) SetName(name string) { n.hostName.Store(&name) }

// New makes a network and begins to accept on its listeners. The callback receives net.flow, net.denied, net.dns and
// vigia.lost events; it must not block and must not call the Network.
func New(cfg Config, emit func(event.Kind, event.Fields)) (*Network, error) {
	if err := cfg.fill(); err != nil {
		return nil, err
	}
	n := &Network{cfg: cfg, guest: cfg.Guest.Addr()}
	n.SetName(cfg.Name)
	n.closing = make(chan struct{}, maxClosing)
	n.ctx, n.stop = context.WithCancel(context.Background())
	n.wire = wire{guestMAC: [6]byte(cfg.MAC), gatewayMAC: [6]byte(cfg.GatewayMAC), guest: n.guest.As4(), gateway: cfg.Gateway.As4()}
	n.report = newReporter(emit, cfg.Limits.EventRate)
	n.report.held = cfg.Held
	n.names = newNameTable(cfg.Limits.Names)
	n.hosts = newHostAddrs(cfg.HostAddrs)
	n.flows = newFlowTable(cfg.Limits.Flows, cfg.Limits.Pending)
	n.out = newEgress(&n.stats, &n.taps)
	n.dns = newDNSProxy(n)
	n.storeRules(cfg.Rules)
	if cfg.Stage != nil {
		cfg.Stage.n = n
	}
	if err := n.openStack(); err != nil {
		return nil, fmt.Errorf("TCP/IP stack: %w", err)
	}
	if cfg.Quarantined {
		n.Quarantine(true)
	}
	for _, l := range cfg.Listeners {
		n.publish(l)
	}
	return n, nil
}

// SetRules replaces the machine's rules. Open flows that they deny are cut.
func (n *Network) SetRules(rules []vm.NetRule) error {
	for i := range rules {
		if err := rules[i].Check(); err != nil {
			return err
		}
	}
	n.storeRules(rules)
	for _, f := range n.flows.list() {
		if !f.internal && !n.decideFlow(f).allow {
			n.cut(f, endDenied)
		}
	}
	return nil
}

func (n *Network) storeRules(rules []vm.NetRule) {
	copied := append([]vm.NetRule(nil), rules...)
	n.rules.Store(&copied)
	n.names.setRuled(copied)
}

// Attach serves a frame connection until it ends, and closes it. Flows outlive it: another connection may follow. The error says why the
// connection ended; it is nil after Close or when the far end hung up between two frames.
func (n *Network) Attach(conn net.Conn) error {
	defer conn.Close()
	if err := n.adopt(conn); err != nil {
		return err
	}
	defer n.work.Done()
	n.out.attach(conn)
	writer := make(chan error, 1)
	go func() { writer <- n.out.serve(conn) }()
	err := n.readFrames(conn)
	n.out.detach(conn)
	conn.Close()
	if werr := <-writer; err == nil {
		err = werr
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	n.conn = nil
	if n.closed {
		return nil
	}
	return err
}

func (n *Network) adopt(conn net.Conn) error {
	n.mu.Lock()
	defer n.mu.Unlock()
	switch {
	case n.closed:
		return ErrClosed
	case n.conn != nil:
		return ErrAttached
	}
	n.conn = conn
	n.work.Add(1)
	return nil
}

// Close ends all flows, listeners and the frame connection, and returns when nothing of the network runs.
func (n *Network) Close() error {
	n.mu.Lock()
	if n.closed {
		n.mu.Unlock()
		return nil
	}
	n.closed = true
	conn := n.conn
	n.mu.Unlock()

	n.stop()
	for _, l := range n.cfg.Listeners {
		if l.TCP != nil {
			l.TCP.Close()
		} else {
			l.UDP.Close()
		}
	}
	n.out.close()
	if conn != nil {
		conn.Close()
	}
	n.cutAll(endStopped)
	n.taps.stop()
	n.stack.Close()
	n.work.Wait()
	n.stack.Wait()
	n.report.close()
	return nil
}

// start runs f as one of the network's goroutines; false after Close.
func (n *Network) start(f func()) bool {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.closed {
		return false
	}
	n.work.Add(1)
	go func() {
		defer n.work.Done()
		f()
	}()
	return true
}
