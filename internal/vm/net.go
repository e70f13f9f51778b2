package vm

import (
	"fmt"
	"net/netip"
	"slices"
	"strconv"
	"strings"
)

// Publish forwards a port of the host to a port of the guest.
type Publish struct {
	Host     netip.AddrPort `json:"host"` // port 0: any free one
	Guest    uint16         `json:"guest"`
	Protocol string         `json:"protocol"` // tcp or udp
}

func (p Publish) String() string {
	return fmt.Sprintf("%s:%d/%s", p.Host, p.Guest, p.Protocol)
}

// ParsePublish reads H:G or ADDRESS:H:G, with an optional /tcp or /udp. Without an address it means 127.0.0.1:
// a port is open to other hosts only where a person says so.
func ParsePublish(s string) (Publish, error) {
	bad := func(why string) (Publish, error) {
		return Publish{}, fmt.Errorf("%w: publish %q: %s: use HOST_PORT:GUEST_PORT or ADDRESS:HOST_PORT:GUEST_PORT, with /tcp or /udp", ErrInvalid, s, why)
	}
	p := Publish{Protocol: "tcp"}
	rest := s
	if i := strings.LastIndexByte(s, '/'); i >= 0 {
		p.Protocol, rest = s[i+1:], s[:i]
		if p.Protocol != "tcp" && p.Protocol != "udp" {
			return bad("unknown protocol")
		}
	}
	i := strings.LastIndexByte(rest, ':')
	if i < 0 {
		return bad("no ':'")
	}
	guest, err := strconv.ParseUint(rest[i+1:], 10, 16)
	if err != nil || guest == 0 {
		return bad("guest port is not 1 to 65535")
	}
	host := rest[:i]
	addr := "127.0.0.1"
	if j := strings.LastIndexByte(host, ':'); j >= 0 {
		addr, host = host[:j], host[j+1:]
	}
	port, err := strconv.ParseUint(host, 10, 16)
	if err != nil {
		return bad("host port is not 0 to 65535")
	}
	ip, err := netip.ParseAddr(strings.Trim(addr, "[]"))
	if err != nil {
		return bad("address is not an IP address")
	}
	p.Host, p.Guest = netip.AddrPortFrom(ip, uint16(port)), uint16(guest)
	return p, nil
}

// Net is a machine's network as asked for. The zero Net is off: no network device's frame goes anywhere.
type Net struct {
	Mode  string    `json:"mode"` // "off" or "" (no device), "nat"
	Rules []NetRule `json:"rules,omitempty"`
}

// NetOff and NetNAT are the modes of a machine's network.
const (
	NetOff = "off"
	NetNAT = "nat"
	// NetReplay is a card whose frames come from a recording. Nobody asks for it: a machine that replays another has it.
	NetReplay = "replay"
)

// Check reports the first thing wrong.
func (n *Net) Check() error {
	if !slices.Contains([]string{"", NetOff, NetNAT, NetReplay}, n.Mode) {
		return fmt.Errorf("%w: net %q: use nat or off", ErrInvalid, n.Mode)
	}
	for i := range n.Rules {
		if err := n.Rules[i].Check(); err != nil {
			return err
		}
	}
	return nil
}

// NetRule allows or denies flows. Rules are tried in order, the first that matches decides. After the last one,
// what a machine starts towards the internet is allowed (outbound NAT), everything else is denied; the host's own
// addresses (loopback, link-local) and other machines are never reached unless an allow rule names their address.
type NetRule struct {
	Allow     bool         `json:"allow"`
	Direction string       `json:"direction"`          // "out" (the guest begins) or "in"
	Protocol  string       `json:"protocol,omitempty"` // tcp, udp, icmp; empty: any
	Prefix    netip.Prefix `json:"prefix,omitzero"`    // of the far end; zero: any
	PortLow   uint16       `json:"port_low,omitempty"` // of the destination; 0: any
	PortHigh  uint16       `json:"port_high,omitempty"`
	Name      string       `json:"name,omitempty"` // a DNS name, or *.suffix: matches what the guest resolved through vigia
}

// Check reports the first thing wrong.
func (r *NetRule) Check() error {
	switch {
	case r.Direction != "in" && r.Direction != "out":
		return fmt.Errorf("%w: net rule: direction %q: use in or out", ErrInvalid, r.Direction)
	case !slices.Contains([]string{"", "tcp", "udp", "icmp"}, r.Protocol):
		return fmt.Errorf("%w: net rule: protocol %q: use tcp, udp or icmp", ErrInvalid, r.Protocol)
	case r.PortHigh < r.PortLow:
		return fmt.Errorf("%w: net rule: ports %d-%d: the first is above the last", ErrInvalid, r.PortLow, r.PortHigh)
	case r.Name != "" && r.Prefix.IsValid():
		return fmt.Errorf("%w: net rule: has both a name and an address", ErrInvalid)
	case r.Name != "" && r.Direction == "in":
		return fmt.Errorf("%w: net rule: a name can only be matched outbound", ErrInvalid)
	case len(r.Name) > 253:
		return fmt.Errorf("%w: net rule: name is longer than 253 bytes", ErrInvalid)
	}
	return nil
}

// ParseNetRule reads "allow|deny in|out [tcp|udp|icmp] [ADDRESS[/BITS] | NAME | any][:PORT[-PORT]]", as in
// "deny out tcp any:25", "allow out tcp 10.0.0.0/8:443", "allow out *.debian.org".
// An IPv6 address with a port stands in brackets.
func ParseNetRule(s string) (NetRule, error) {
	bad := func(why string) (NetRule, error) {
		return NetRule{}, fmt.Errorf("%w: net rule %q: %s: use 'allow|deny in|out [tcp|udp|icmp] [any|ADDRESS[/BITS]|NAME][:PORT[-PORT]]'", ErrInvalid, s, why)
	}
	words := strings.Fields(s)
	if len(words) < 2 || len(words) > 4 {
		return bad("wrong number of words")
	}
	var r NetRule
	switch words[0] {
	case "allow":
		r.Allow = true
	case "deny":
	default:
		return bad("begins with neither allow nor deny")
	}
	r.Direction = words[1]
	words = words[2:]
	if len(words) > 0 && slices.Contains([]string{"tcp", "udp", "icmp"}, words[0]) {
		r.Protocol, words = words[0], words[1:]
	}
	if len(words) > 1 {
		return bad("words left over")
	}
	if len(words) == 1 {
		if err := r.parseFarEnd(words[0]); err != nil {
			return bad(err.Error())
		}
	}
	if err := r.Check(); err != nil {
		return NetRule{}, fmt.Errorf("%q: %w", s, err)
	}
	return r, nil
}

func (r *NetRule) parseFarEnd(s string) error {
	host, ports := s, ""
	if h, p, ok := strings.Cut(s, "]:"); ok {
		host, ports = h, p
	} else if strings.Count(s, ":") == 1 {
		host, ports, _ = strings.Cut(s, ":")
	}
	host = strings.Trim(host, "[]")
	if ports != "" {
		low, high, ranged := strings.Cut(ports, "-")
		if !ranged {
			high = low
		}
		l, err1 := strconv.ParseUint(low, 10, 16)
		h, err2 := strconv.ParseUint(high, 10, 16)
		if err1 != nil || err2 != nil || l == 0 {
			return fmt.Errorf("port %q is not 1 to 65535", ports)
		}
		r.PortLow, r.PortHigh = uint16(l), uint16(h)
	}
	if host == "any" || host == "" {
		return nil
	}
	if p, err := netip.ParsePrefix(host); err == nil {
		r.Prefix = p.Masked()
		return nil
	}
	if a, err := netip.ParseAddr(host); err == nil {
		r.Prefix = netip.PrefixFrom(a, a.BitLen())
		return nil
	}
	if strings.ContainsAny(host, "/: ") {
		return fmt.Errorf("%q is neither an address nor a name", host)
	}
	r.Name = strings.ToLower(strings.TrimSuffix(host, "."))
	return nil
}

// String writes the rule as ParseNetRule reads it.
func (r NetRule) String() string {
	words := []string{"deny", r.Direction}
	if r.Allow {
		words[0] = "allow"
	}
	if r.Protocol != "" {
		words = append(words, r.Protocol)
	}
	far := "any"
	switch {
	case r.Name != "":
		far = r.Name
	case r.Prefix.IsValid() && r.Prefix.IsSingleIP():
		far = r.Prefix.Addr().String()
	case r.Prefix.IsValid():
		far = r.Prefix.String()
	}
	if r.PortLow != 0 {
		if strings.Contains(far, ":") {
			far = "[" + far + "]"
		}
		far += ":" + strconv.Itoa(int(r.PortLow))
		if r.PortHigh != r.PortLow {
			far += "-" + strconv.Itoa(int(r.PortHigh))
		}
	}
	return strings.Join(append(words, far), " ")
}
