package network

import (
	"encoding/binary"
	"net"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"time"

	"vigia/internal/vm"
)

// verdict is what the rules say of a flow.
type verdict struct {
	allow  bool
	reason reason
	detail string         // the rule, where one refused
	target netip.AddrPort // where an allowed outbound flow goes
}

// decide tries a flow against the machine's rules. The first rule that matches decides; but an address that is guarded (see
// guard) is opened only by an allow rule that names it, and a wider one is passed over. A flow to the gateway
// itself, where nothing listens but DHCP and DNS, stands for one to the host's loopback: a guest can't address that
// directly.
func (n *Network) decide(direction string, proto uint8, far netip.AddrPort) verdict {
	target := far
	if direction == "out" && far.Addr() == n.cfg.Gateway {
		target = netip.AddrPortFrom(netip.AddrFrom4([4]byte{127, 0, 0, 1}), far.Port())
	}
	why := allowed
	if direction == "out" {
		why = n.guarded(target.Addr())
	}
	for _, r := range *n.rules.Load() {
		if !n.matches(&r, direction, proto, target) {
			continue
		}
		if !r.Allow {
			return verdict{reason: reasonRule, detail: describe(&r)}
		}
		if why == allowed || n.opens(&r, why, target.Addr()) {
			return verdict{allow: true, target: target}
		}
	}
	if why != allowed {
		return verdict{reason: why}
	}
	return verdict{allow: true, target: target}
}

func (n *Network) matches(r *vm.NetRule, direction string, proto uint8, far netip.AddrPort) bool {
	switch {
	case r.Direction != direction:
	case r.Protocol != "" && r.Protocol != protoName(proto):
	case r.PortHigh != 0 && (far.Port() < r.PortLow || far.Port() > r.PortHigh):
	case r.Prefix.IsValid() && !r.Prefix.Contains(far.Addr()):
	case r.Name != "" && !n.names.has(r.Name, far.Addr(), time.Now()):
	default:
		return true
	}
	return false
}

// decideFlow tries an open flow again.
func (n *Network) decideFlow(f *flow) verdict {
	if f.key.in {
		return n.decideIn(f.key.proto, f.client.Addr(), f.key.near.Port())
	}
	return n.decide("out", f.key.proto, f.key.far)
}

// decideIn tries an inbound flow, whose destination port is the guest's.
func (n *Network) decideIn(proto uint8, client netip.Addr, guestPort uint16) verdict {
	return n.decide("in", proto, netip.AddrPortFrom(client, guestPort))
}

// decideName tries a question for a name: rules without a port or protocol that are about that name, or about any far
// end. A machine that may talk to *.debian.org only is told of no other name.
func (n *Network) decideName(name string) verdict {
	for _, r := range *n.rules.Load() {
		if r.Direction != "out" || r.Protocol != "" || r.PortHigh != 0 || r.Prefix.IsValid() {
			continue
		}
		if r.Name != "" && !nameMatches(r.Name, name) {
			continue
		}
		if r.Allow {
			break
		}
		return verdict{reason: reasonRule, detail: describe(&r)}
	}
	return verdict{allow: true}
}

// nameMatches reports whether a rule's name, perhaps *.suffix, covers a name. Both are lower case without the last dot.
func nameMatches(rule, name string) bool {
	if suffix, ok := strings.CutPrefix(rule, "*."); ok {
		return strings.HasSuffix(name, "."+suffix)
	}
	return rule == name
}

// guard ranges: addresses that no default and no wide rule opens.
var (
	rangeLoopback  = netip.MustParsePrefix("127.0.0.0/8")
	rangeThis      = netip.MustParsePrefix("0.0.0.0/8") // the host takes 0.0.0.0 for itself
	rangeLinkLocal = netip.MustParsePrefix("169.254.0.0/16")
	rangeMulticast = netip.MustParsePrefix("224.0.0.0/4")
	rangeReserved  = netip.MustParsePrefix("240.0.0.0/4") // with 255.255.255.255
)

// guarded says why an address is not the internet, or allowed.
func (n *Network) guarded(a netip.Addr) reason {
	switch {
	case !a.Is4():
		return reasonIPv6
	case rangeLoopback.Contains(a), rangeThis.Contains(a):
		return reasonHost
	case rangeLinkLocal.Contains(a):
		return reasonLinkLocal
	case rangeMulticast.Contains(a):
		return reasonMulticast
	case rangeReserved.Contains(a):
		return reasonReserved
	case n.cfg.Guest.Contains(a):
		return reasonNeighbour
	}
	return n.hosts.guards(a)
}

// opens reports whether an allow rule names a guarded address: by a prefix no wider than the guarded range, or the address alone
// where it is one of the host's. Names never do, or a name server could point into the host.
func (n *Network) opens(r *vm.NetRule, why reason, a netip.Addr) bool {
	if !r.Prefix.IsValid() {
		return false
	}
	switch why {
	case reasonHost:
		return r.Prefix.IsSingleIP() || rangeLoopback.Contains(a) && r.Prefix.Bits() >= rangeLoopback.Bits()
	case reasonLinkLocal:
		return r.Prefix.Bits() >= rangeLinkLocal.Bits()
	}
	return false
}

// describe writes a rule as a person would have given it.
func describe(r *vm.NetRule) string {
	words := []string{"deny", r.Direction}
	if r.Allow {
		words[0] = "allow"
	}
	if r.Protocol != "" {
		words = append(words, r.Protocol)
	}
	far := "any"
	if r.Name != "" {
		far = r.Name
	} else if r.Prefix.IsValid() {
		far = r.Prefix.String()
	}
	if r.PortHigh != 0 {
		far += ":" + portRange(r.PortLow, r.PortHigh)
	}
	return strings.Join(append(words, far), " ")
}

func portRange(low, high uint16) string {
	if low == high {
		return utoa(low)
	}
	return utoa(low) + "-" + utoa(high)
}

// hostAddrs knows the host's own addresses, and asks for them again when it has not for a while and somebody wants to
// know.
type hostAddrs struct {
	ask  func() ([]netip.Prefix, error)
	mu   sync.Mutex
	at   time.Time
	all  []netip.Prefix
	good bool // asked at least once without an error
}

const hostAddrsAge = 10 * time.Second

func newHostAddrs(ask func() ([]netip.Prefix, error)) *hostAddrs {
	return &hostAddrs{ask: ask}
}

// guards says whether a is the host's, or the broadcast address of one of its networks. While the host's addresses can't be
// had it keeps to those it knew; if it never knew any, every address is guarded.
func (h *hostAddrs) guards(a netip.Addr) reason {
	h.mu.Lock()
	defer h.mu.Unlock()
	if now := time.Now(); h.at.IsZero() || now.Sub(h.at) > hostAddrsAge {
		h.at = now
		if all, err := h.ask(); err == nil {
			h.all, h.good = all, true
		}
	}
	if !h.good {
		return reasonHost
	}
	if slices.ContainsFunc(h.all, func(p netip.Prefix) bool { return p.Addr().Unmap() == a }) {
		return reasonHost
	}
	if slices.ContainsFunc(h.all, func(p netip.Prefix) bool { return broadcastOf(p) == a }) {
		return reasonMulticast
	}
	return allowed
}

func broadcastOf(p netip.Prefix) netip.Addr {
	if !p.Addr().Is4() || p.Bits() > 30 {
		return netip.Addr{}
	}
	b := p.Addr().As4()
	binary.BigEndian.PutUint32(b[:], binary.BigEndian.Uint32(b[:])|(1<<(32-p.Bits())-1))
	return netip.AddrFrom4(b)
}

func interfaceAddrs() ([]netip.Prefix, error) {
	addrs, err := net.InterfaceAddrs()
	if err != nil {
		return nil, err
	}
	var all []netip.Prefix
	for _, a := range addrs {
		ipnet, ok := a.(*net.IPNet)
		if !ok {
			continue
		}
		ip, _ := netip.AddrFromSlice(ipnet.IP)
		ones, _ := ipnet.Mask.Size()
		all = append(all, netip.PrefixFrom(ip.Unmap(), ones))
	}
	return all, nil
}
