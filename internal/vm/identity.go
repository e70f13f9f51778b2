package vm

import (
	"fmt"
	"net/netip"
	"regexp"
)

// Identity is what a machine calls itself and is called on its network, where that is not what its hardware and image give: a clone's,
// that is not to be taken for the machine it comes from. The zero Identity changes nothing.
type Identity struct {
	Hostname string     `json:"hostname,omitempty"`
	MAC      string     `json:"mac,omitempty"`
	Address  netip.Addr `json:"address,omitzero"`
}

// Subnet is every machine's network, of its own and its gate's, which has the first address.
var Subnet = netip.MustParsePrefix("10.77.0.0/24")

// macPattern is the text form of an address of one card, not of a group.
var macPattern = regexp.MustCompile(`^[0-9a-f][02468ace](:[0-9a-f]{2}){5}$`)

// Check reports the first thing wrong.
func (i *Identity) Check() error {
	if i.Hostname != "" {
		if _, err := ParseName(i.Hostname); err != nil {
			return fmt.Errorf("host name: %w", err)
		}
	}
	if i.MAC != "" {
		if !macPattern.MatchString(i.MAC) {
			return fmt.Errorf("%w: MAC %.40q: use 6 bytes as in 52:54:00:12:34:56, the first of them even", ErrInvalid, i.MAC)
		}
	}
	if a := i.Address; a.IsValid() {
		gateway := Subnet.Addr().Next()
		if b := a.As16(); !a.Is4() || !Subnet.Contains(a) || a == Subnet.Addr() || a == gateway || b[15] == 255 {
			return fmt.Errorf("%w: address %v: use one of %v, but %v, which is the gate's, and the first and the last", ErrInvalid, a, Subnet, gateway)
		}
	}
	return nil
}
