package network

import (
	"context"
	"fmt"
	"net"
	"net/netip"
	"os"

	"golang.org/x/sys/unix"
)

// dialHost is the default Dial: real sockets.
func dialHost(ctx context.Context, network string, to netip.AddrPort) (net.Conn, error) {
	if network == "ping4" {
		return dialPing(to.Addr())
	}
	d := net.Dialer{KeepAlive: keepIdle}
	return d.DialContext(ctx, network, to.String())
}

// dialPing opens an unprivileged ICMP echo socket. Its reads and writes are whole ICMP messages.
func dialPing(to netip.Addr) (net.Conn, error) {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, unix.IPPROTO_ICMP)
	if err != nil {
		return nil, fmt.Errorf("unprivileged ICMP socket: %w: see net.ipv4.ping_group_range", err)
	}
	file := os.NewFile(uintptr(fd), "icmp")
	defer file.Close()
	if err := unix.Connect(fd, &unix.SockaddrInet4{Addr: to.As4()}); err != nil {
		return nil, fmt.Errorf("ICMP to %s: %w", to, err)
	}
	return net.FileConn(file)
}
