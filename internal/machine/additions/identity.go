package additions

import (
	"context"
	"fmt"
	"strings"
)

// Identity is what a guest shall call itself and be called; what is empty stays as it is.
type Identity struct {
	OldMAC, MAC      string
	Address, Gateway string // the address with its prefix
	Hostname         string
}

// identify finds the card by its address, old or new, so that it can be done again. What it is given comes as its arguments: nothing of
// it is read as shell.
const identify = `
old=$1 mac=$2 address=$3 gateway=$4 name=$5
if [ -n "$name" ]; then
	echo "$name" >/proc/sys/kernel/hostname && echo "$name" >/etc/hostname || exit 1
fi
[ -n "$mac$address" ] || exit 0
for d in /sys/class/net/*; do
	has=$(cat "$d/address")
	[ "$has" = "$old" ] || [ "$has" = "$mac" ] && card=${d##*/}
done
[ -n "$card" ] || { echo "no network card has the address $old" >&2; exit 1; }
[ -z "$mac" ] || ip link set dev "$card" address "$mac" || exit 1
[ -n "$address" ] || exit 0
ip -4 addr flush dev "$card" && ip addr add "$address" dev "$card" && ip route replace default via "$gateway" dev "$card"
`

// Identify gives the guest a name and addresses of its own.
func (a *Agent) Identify(ctx context.Context, i Identity) error {
	r, err := a.Exec(ctx, []string{"/bin/sh", "-c", identify, "identify", i.OldMAC, i.MAC, i.Address, i.Gateway, i.Hostname}, nil)
	if err == nil && r.ExitCode != 0 {
		why, _, _ := strings.Cut(string(r.Stderr), "\n")
		err = fmt.Errorf("the guest could not take its new name and addresses: exit code %d: %.200q", r.ExitCode, why)
	}
	return err
}
