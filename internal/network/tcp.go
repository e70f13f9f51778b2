package network

import (
	"context"
	"net"
	"net/netip"
	"time"

	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/adapters/gonet"
	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/stack"
	"gvisor.dev/gvisor/pkg/tcpip/transport/tcp"
	"gvisor.dev/gvisor/pkg/waiter"
)

const (
	dialTimeout = 20 * time.Second
	openTimeout = 2 * time.Minute // no opening takes as long: socket, then handshake
	timeWait    = time.Second
	finWait     = 30 * time.Second
	keepIdle    = 5 * time.Minute
)

// handleTCP sees the segments that belong to no endpoint of the stack. False makes the stack answer with a reset, so a guest
// that is refused learns it at once, as it does of connections that a former gate had.
func (n *Network) handleTCP(id stack.TransportEndpointID, pkt *stack.PacketBuffer) bool {
	h := header.TCP(pkt.TransportHeader().Slice())
	if len(h) < header.TCPMinimumSize || h.Flags()&(header.TCPFlagSyn|header.TCPFlagAck|header.TCPFlagRst) != header.TCPFlagSyn {
		return false
	}
	f := &flow{key: flowKey{proto: protoTCP, near: addrPort(id.RemoteAddress, id.RemotePort), far: addrPort(id.LocalAddress, id.LocalPort)}}
	if old := n.flows.get(f.key); old != nil {
		if time.Since(old.began) < openTimeout {
			return true // asked again while its socket is being opened
		}
		n.cut(old, endReset) // left over: its endpoint would have taken this segment
	}
	if f.key.far == n.dnsAddr() {
		f.internal = true
	} else {
		v := n.decide("out", protoTCP, f.key.far)
		if !v.allow {
			n.deny(v.reason, v.detail, f.key)
			return false
		}
		f.target = v.target
	}
	if why := n.begin(f, true); why != allowed {
		n.deny(why, "", f.key)
		return why == reasonTooManyOpening // stay silent: it will try again
	}
	return n.tcpin.HandlePacket(id, pkt)
}

// acceptTCP runs in a goroutine of its own for each flow that handleTCP let begin.
func (n *Network) acceptTCP(r *tcp.ForwarderRequest) {
	id := r.ID()
	f := n.flows.get(flowKey{proto: protoTCP, near: addrPort(id.RemoteAddress, id.RemotePort), far: addrPort(id.LocalAddress, id.LocalPort)})
	if f == nil || !n.enter() {
		r.Complete(true)
		return
	}
	defer n.work.Done()
	if f.internal {
		n.acceptDNS(f, r)
		return
	}
	conn, err := n.dialFor(f, "tcp4", dialTimeout)
	if err != nil {
		r.Complete(true)
		n.finish(f, endReset)
		return
	}
	ep, wq, ok := n.shake(f, r)
	if !ok {
		abort(conn)
		n.finish(f, endReset)
		return
	}
	n.relay(f, ep, wq, conn)
}

// enter counts the calling goroutine, which the stack began, among the network's own; false after Close.
func (n *Network) enter() bool {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.closed {
		return false
	}
	n.work.Add(1)
	return true
}

// shake completes the handshake with the guest.
func (n *Network) shake(f *flow, r *tcp.ForwarderRequest) (tcpip.Endpoint, *waiter.Queue, bool) {
	wq := new(waiter.Queue)
	ep, err := r.CreateEndpoint(wq)
	r.Complete(err != nil)
	if err != nil {
		return nil, nil, false
	}
	n.tune(ep, n.flows.opened(f))
	return ep, wq, true
}

// tune sets an endpoint's buffers, and makes it notice that the guest is gone.
func (n *Network) tune(ep tcpip.Endpoint, open int) {
	o := ep.SocketOptions()
	if open > bigFlows {
		o.SetReceiveBufferSize(smallBuffer, true)
		o.SetSendBufferSize(smallBuffer, true)
	}
	o.SetDelayOption(false)
	o.SetKeepAlive(true)
	idle := tcpip.KeepaliveIdleOption(keepIdle)
	ep.SetSockOpt(&idle)
}

// dialFor opens a flow's socket on the host. A cut of the flow ends the attempt.
func (n *Network) dialFor(f *flow, network string, within time.Duration) (net.Conn, error) {
	ctx, cancel := context.WithTimeout(n.ctx, within)
	defer cancel()
	if !f.onCut(cancel) {
		return nil, context.Canceled
	}
	conn, err := n.cfg.Dial(ctx, network, f.target)
	if err != nil {
		return nil, err
	}
	if why := n.reached(conn, f.target.Addr()); why != allowed {
		abort(conn)
		n.deny(why, "", f.key)
		return nil, context.Canceled
	}
	return conn, nil
}

// reached is the second look at an address, now that the kernel has chosen a way to it: a socket whose two ends are one
// address has reached the host itself, whatever the list of its addresses said.
func (n *Network) reached(conn net.Conn, to netip.Addr) reason {
	near, ok := netip.ParseAddrPort(conn.LocalAddr().String())
	if ok != nil || near.Addr().Unmap() != to {
		return allowed
	}
	if n.guarded(to) != allowed {
		return allowed // known, so a rule had opened it
	}
	return reasonHost
}

// abort closes a host socket with a reset where it can.
func abort(conn net.Conn) {
	if c, ok := conn.(*net.TCPConn); ok {
		c.SetLinger(0)
	}
	conn.Close()
}

// dialGuest opens a TCP connection to a port of the guest, from the address given or, if that is not valid, from the gateway's.
func (n *Network) dialGuest(ctx context.Context, from netip.AddrPort, port uint16) (tcpip.Endpoint, *waiter.Queue, error) {
	wq := new(waiter.Queue)
	ep, terr := n.stack.NewEndpoint(tcp.ProtocolNumber, header.IPv4ProtocolNumber, wq)
	if terr != nil {
		return nil, nil, stackError("endpoint", terr)
	}
	entry, ready := waiter.NewChannelEntry(waiter.WritableEvents | waiter.EventHUp | waiter.EventErr)
	wq.EventRegister(&entry)
	defer wq.EventUnregister(&entry)
	if terr := ep.Bind(tcpip.FullAddress{NIC: nicID, Addr: tcpip.AddrFrom4(from.Addr().As4()), Port: from.Port()}); terr != nil {
		ep.Close()
		return nil, nil, stackError("bind "+from.String(), terr)
	}
	terr = ep.Connect(tcpip.FullAddress{NIC: nicID, Addr: tcpip.AddrFrom4(n.wire.guest), Port: port})
	if _, started := terr.(*tcpip.ErrConnectStarted); started {
		select {
		case <-ctx.Done():
			ep.Close()
			return nil, nil, ctx.Err()
		case <-ready:
		}
		terr = ep.LastError()
	}
	if terr != nil {
		ep.Close()
		return nil, nil, stackError("connect", terr)
	}
	return ep, wq, nil
}

// gonetConn wraps an endpoint that a service of the gateway itself reads.
func gonetConn(ep tcpip.Endpoint, wq *waiter.Queue) net.Conn { return gonet.NewTCPConn(wq, ep) }
