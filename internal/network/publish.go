package network

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"sync"
	"time"
)

// publish serves a published port until Close.
func (n *Network) publish(l Listener) {
	if l.TCP != nil {
		n.start(func() { n.publishTCP(l) })
		return
	}
	p := &udpPort{n: n, guest: l.Guest, sock: l.UDP, flows: map[netip.AddrPort]*flow{}}
	n.start(p.serve)
}

func (n *Network) publishTCP(l Listener) {
	for {
		conn, err := l.TCP.Accept()
		if errors.Is(err, net.ErrClosed) || n.ctx.Err() != nil {
			if err == nil {
				conn.Close()
			}
			return
		}
		if err != nil { // out of descriptors, or a caller that hung up: go on, but not in a spin
			select {
			case <-time.After(50 * time.Millisecond):
			case <-n.ctx.Done():
			}
			continue
		}
		n.admit(conn, l.Guest)
	}
}

// admit begins an inbound flow, or resets the connection.
func (n *Network) admit(conn net.Conn, guestPort uint16) {
	client := addrPortOf(conn.RemoteAddr())
	f := &flow{
		key:    flowKey{proto: protoTCP, in: true, near: netip.AddrPortFrom(n.guest, guestPort), far: client},
		client: client,
	}
	v := n.decideIn(protoTCP, client.Addr(), guestPort)
	why := v.reason
	if v.allow {
		why = n.begin(f, true)
	}
	if why != allowed {
		abort(conn)
		n.deny(why, v.detail, f.key)
		return
	}
	if !n.start(func() { n.inbound(f, conn, guestPort) }) {
		abort(conn)
		n.finish(f, endStopped)
	}
}

func (n *Network) inbound(f *flow, conn net.Conn, guestPort uint16) {
	ctx, cancel := context.WithTimeout(n.ctx, dialTimeout)
	defer cancel()
	if !f.onCut(func() { cancel(); abort(conn) }) {
		abort(conn)
		return
	}
	gateway := netip.AddrPortFrom(n.cfg.Gateway, 0)
	from := gateway
	if n.visible(f.client.Addr()) {
		from = f.client
	}
	ep, wq, err := n.dialGuest(ctx, from, guestPort)
	if err != nil && from != gateway && ctx.Err() == nil {
		ep, wq, err = n.dialGuest(ctx, gateway, guestPort)
	}
	if err != nil {
		abort(conn)
		n.finish(f, endReset)
		return
	}
	n.tune(ep, n.flows.opened(f))
	n.relay(f, ep, wq, conn)
}

// visible reports whether the guest can be shown a client's own address: one that it would answer through the gateway.
func (n *Network) visible(a netip.Addr) bool {
	return a.Is4() && a.IsGlobalUnicast() && !a.IsLoopback() && !n.cfg.Guest.Contains(a)
}

// addrPortOf reads a socket address as IPv4 where it is one.
func addrPortOf(a net.Addr) netip.AddrPort {
	ap, err := netip.ParseAddrPort(a.String())
	if err != nil {
		return netip.AddrPort{}
	}
	return netip.AddrPortFrom(ap.Addr().Unmap(), ap.Port())
}

// udpPort is a published UDP port. Each client is a flow; one whose address the guest can't be shown gets a port of the
// gateway as its stand-in.
type udpPort struct {
	n     *Network
	guest uint16
	sock  net.PacketConn

	mu    sync.Mutex
	flows map[netip.AddrPort]*flow // by client
	next  uint16
}

func (p *udpPort) serve() {
	buf := make([]byte, 64<<10)
	for {
		size, from, err := p.sock.ReadFrom(buf)
		if errors.Is(err, net.ErrClosed) || p.n.ctx.Err() != nil {
			return
		}
		if err != nil {
			continue // an ICMP error for an earlier answer
		}
		client := addrPortOf(from)
		if f := p.flow(client, from); f != nil {
			f.keep.Load().data(f.packetsOut.Load(), buf[:size])
			f.got(size)
			p.n.sendUDP(f.key.far, p.guest, buf[:size])
		}
	}
}

// flow finds or begins a client's flow; nil where it is refused.
func (p *udpPort) flow(client netip.AddrPort, to net.Addr) *flow {
	p.mu.Lock()
	f := p.flows[client]
	p.mu.Unlock()
	if f != nil {
		return f
	}
	key := flowKey{proto: protoUDP, in: true, near: netip.AddrPortFrom(p.n.guest, p.guest), far: client}
	v := p.n.decideIn(protoUDP, client.Addr(), p.guest)
	if !v.allow {
		p.n.deny(v.reason, v.detail, key)
		return nil
	}
	if !p.n.visible(client.Addr()) {
		key.far = p.standIn()
	}
	f = &flow{key: key, client: client}
	f.send = func(b []byte) { p.sock.WriteTo(b, to) }
	idle := make(chan struct{})
	f.onCut(func() { p.forget(client); close(idle) })
	p.mu.Lock()
	p.flows[client] = f // before it can be cut, so that a cut takes it out again
	p.mu.Unlock()
	if why := p.n.begin(f, false); why != allowed {
		p.forget(client)
		p.n.deny(why, "", key)
		return nil
	}
	p.n.start(func() { p.expire(f, idle) })
	return f
}

// standIn returns a port of the gateway that no flow uses.
func (p *udpPort) standIn() netip.AddrPort {
	for {
		p.next = p.next%20000 + 1
		far := netip.AddrPortFrom(p.n.cfg.Gateway, 40000+p.next)
		key := flowKey{proto: protoUDP, in: true, near: netip.AddrPortFrom(p.n.guest, p.guest), far: far}
		if p.n.flows.get(key) == nil { // there are fewer flows than ports
			return far
		}
	}
}

func (p *udpPort) forget(client netip.AddrPort) {
	p.mu.Lock()
	defer p.mu.Unlock()
	delete(p.flows, client)
}

// expire ends a flow when it has been idle.
func (p *udpPort) expire(f *flow, cut chan struct{}) {
	for {
		left := time.Until(f.expires())
		if left <= 0 {
			p.forget(f.client)
			p.n.finish(f, endIdle)
			return
		}
		t := time.NewTimer(left)
		select {
		case <-t.C:
		case <-cut:
			t.Stop()
			return
		}
	}
}
