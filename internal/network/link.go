package network

import (
	"errors"
	"fmt"
	"net/netip"

	"gvisor.dev/gvisor/pkg/buffer"
	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/network/ipv4"
	"gvisor.dev/gvisor/pkg/tcpip/stack"
	"gvisor.dev/gvisor/pkg/tcpip/transport/tcp"
	"gvisor.dev/gvisor/pkg/tcpip/transport/udp"
)

const nicID = 1

// link is the stack's network card. It knows the only neighbour's MAC address, so the stack resolves none.
type link struct {
	n   *Network
	nic stack.NetworkDispatcher
}

func (l *link) DeliverNetworkPacket(p tcpip.NetworkProtocolNumber, pkt *stack.PacketBuffer) {
	if nic := l.nic; nic != nil {
		nic.DeliverNetworkPacket(p, pkt)
	}
}

func (l *link) DeliverLinkPacket(tcpip.NetworkProtocolNumber, *stack.PacketBuffer) {}

// WritePackets queues what the stack has for the guest. A TCP sender waits here when the guest does not read.
func (l *link) WritePackets(pkts stack.PacketBufferList) (int, tcpip.Error) {
	out := l.n.out
	var ethernet [ethernetHeader]byte
	l.n.wire.ethernet(ethernet[:], etherIPv4)
	out.mu.Lock()
	defer out.mu.Unlock()
	for _, pkt := range pkts.AsSlice() {
		out.room()
		out.appendPacket(ethernet[:], pkt)
	}
	return pkts.Len(), nil
}

func (e *egress) appendPacket(ethernet []byte, pkt *stack.PacketBuffer) {
	var room [6][]byte
	parts := append(append(room[:0], ethernet), pkt.AsSlices()...)
	e.append(len(ethernet)+pkt.Size(), parts...)
}

func (l *link) MTU() uint32                      { return uint32(l.n.cfg.MTU) }
func (l *link) SetMTU(uint32)                    {}
func (l *link) MaxHeaderLength() uint16          { return 0 }
func (l *link) LinkAddress() tcpip.LinkAddress   { return tcpip.LinkAddress(l.n.wire.gatewayMAC[:]) }
func (l *link) SetLinkAddress(tcpip.LinkAddress) {}
func (l *link) Capabilities() stack.LinkEndpointCapabilities {
	return stack.CapabilityRXChecksumOffload
}
func (l *link) Attach(nic stack.NetworkDispatcher)      { l.nic = nic }
func (l *link) IsAttached() bool                        { return l.nic != nil }
func (l *link) Wait()                                   {}
func (l *link) ARPHardwareType() header.ARPHardwareType { return header.ARPHardwareNone }
func (l *link) AddHeader(*stack.PacketBuffer)           {}
func (l *link) ParseHeader(*stack.PacketBuffer) bool    { return true }
func (l *link) Close()                                  {}
func (l *link) SetOnCloseAction(func())                 {}

// GSOMaxSize and SupportedGSO let TCP build segments of many packets at once; it splits them before they come here.
func (l *link) GSOMaxSize() uint32               { return 1 << 16 }
func (l *link) SupportedGSO() stack.SupportedGSO { return stack.GVisorGSOSupported }

// Sizes of TCP's buffers towards the guest. A flow begins small; the first of them, bigFlows, may grow.
const (
	tcpBuffer    = 128 << 10
	tcpBufferMax = 2 << 20
	bigFlows     = 32
	smallBuffer  = 64 << 10
)

func (n *Network) openStack() error {
	n.stack = stack.New(stack.Options{
		NetworkProtocols:   []stack.NetworkProtocolFactory{ipv4.NewProtocol},
		TransportProtocols: []stack.TransportProtocolFactory{tcp.NewProtocol, udp.NewProtocol},
	})
	n.link = &link{n: n}
	err := errors.Join(
		stackError("nic", n.stack.CreateNIC(nicID, n.link)),
		stackError("address", n.stack.AddProtocolAddress(nicID, tcpip.ProtocolAddress{
			Protocol:          ipv4.ProtocolNumber,
			AddressWithPrefix: tcpip.AddressWithPrefix{Address: tcpip.AddrFrom4(n.wire.gateway), PrefixLen: n.cfg.Guest.Bits()},
		}, stack.AddressProperties{})),
		stackError("promiscuous", n.stack.SetPromiscuousMode(nicID, true)),
		stackError("spoofing", n.stack.SetSpoofing(nicID, true)),
		n.setTCPOptions(),
	)
	n.stack.SetRouteTable([]tcpip.Route{{Destination: header.IPv4EmptySubnet, NIC: nicID}})
	n.tcpin = tcp.NewForwarder(n.stack, tcpBuffer, 2*n.cfg.Limits.Pending, n.acceptTCP)
	n.stack.SetTransportProtocolHandler(tcp.ProtocolNumber, n.handleTCP)
	n.stack.SetTransportProtocolHandler(udp.ProtocolNumber, n.handleUDP)
	return err
}

func (n *Network) setTCPOptions() error {
	sack, moderate := tcpip.TCPSACKEnabled(true), tcpip.TCPModerateReceiveBufferOption(true)
	timeWait, linger, syns := tcpip.TCPTimeWaitTimeoutOption(timeWait), tcpip.TCPLingerTimeoutOption(finWait), tcpip.TCPSynRetriesOption(3)
	options := []tcpip.SettableTransportProtocolOption{
		&sack, &moderate, &timeWait, &linger, &syns,
		&tcpip.TCPReceiveBufferSizeRangeOption{Min: 4 << 10, Default: tcpBuffer, Max: tcpBufferMax},
		&tcpip.TCPSendBufferSizeRangeOption{Min: 4 << 10, Default: tcpBuffer, Max: tcpBufferMax},
	}
	var errs []error
	for _, o := range options {
		errs = append(errs, stackError(fmt.Sprintf("%T", o), n.stack.SetTransportProtocolOption(tcp.ProtocolNumber, o)))
	}
	return errors.Join(errs...)
}

func stackError(what string, err tcpip.Error) error {
	if err == nil {
		return nil
	}
	return fmt.Errorf("%s: %s", what, err)
}

// sendIP sends the guest one IPv4 packet, in fragments where it is longer than the MTU. It waits for no room.
func (n *Network) sendIP(from netip.Addr, proto uint8, parts ...[]byte) {
	if !from.Is4() || n.out.full() {
		n.stats.overflow.Add(1)
		return
	}
	route, err := n.stack.FindRoute(nicID, tcpip.AddrFrom4(from.As4()), tcpip.AddrFrom4(n.wire.guest), ipv4.ProtocolNumber, false)
	if err != nil {
		return
	}
	defer route.Release()
	var body buffer.Buffer
	for _, p := range parts {
		body.Append(buffer.NewViewWithData(p))
	}
	pkt := stack.NewPacketBuffer(stack.PacketBufferOptions{ReserveHeaderBytes: int(route.MaxHeaderLength()), Payload: body})
	defer pkt.DecRef()
	route.WritePacket(stack.NetworkHeaderParams{Protocol: tcpip.TransportProtocolNumber(proto), TTL: 64}, pkt)
}

func (e *egress) full() bool {
	e.mu.Lock()
	defer e.mu.Unlock()
	return len(e.pending) > egressLimit
}

func addrPort(a tcpip.Address, port uint16) netip.AddrPort {
	return netip.AddrPortFrom(netip.AddrFrom4(a.As4()), port)
}
