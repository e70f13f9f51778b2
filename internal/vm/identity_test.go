package vm

import (
	"errors"
	"net/netip"
	"testing"
)

func TestIdentity(t *testing.T) {
	for _, good := range []Identity{{}, {Hostname: "web-2", MAC: "52:54:00:12:34:56", Address: netip.MustParseAddr("10.77.0.254")}} {
		if err := good.Check(); err != nil {
			t.Errorf("%+v: %v", good, err)
		}
	}
	for _, bad := range []Identity{{Hostname: "a b"}, {Hostname: "$(x)"}, {MAC: "53:54:00:12:34:56"}, {MAC: "52:54:00"}, {MAC: "52-54-00-12-34-56"},
		{Address: netip.MustParseAddr("10.77.0.1")}, {Address: netip.MustParseAddr("10.77.0.0")}, {Address: netip.MustParseAddr("10.77.0.255")},
		{Address: netip.MustParseAddr("192.168.0.2")}, {Address: netip.MustParseAddr("fd00::2")}, {Address: netip.MustParseAddr("::ffff:10.77.0.9")}} {
		if err := bad.Check(); !errors.Is(err, ErrInvalid) {
			t.Errorf("%+v: %v", bad, err)
		}
	}
}
