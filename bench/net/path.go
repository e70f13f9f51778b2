package main

import (
	"errors"
	"flag"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"runtime/pprof"
	"strconv"
	"syscall"
	"time"

	"vigia/internal/event"
	"vigia/internal/gate"
	"vigia/internal/inputs"
	"vigia/internal/network"
	"vigia/internal/vm"
)

// path is one way from the guest to the host's loopback.
type path struct {
	name    string
	netdev  string // QEMU's -netdev
	mac     string
	address string // of the guest
	gateway string // stands for the host's loopback
	mtu     int
	port    int // of its iperf3 server
	own     *exec.Cmd
	server  *exec.Cmd
}

type paths []*path

func (ps paths) close() {
	for _, p := range ps {
		for _, c := range []*exec.Cmd{p.own, p.server} {
			if c != nil && c.Process != nil {
				c.Process.Signal(syscall.SIGTERM)
				c.Wait()
			}
		}
	}
}

// openPaths starts what each path needs before QEMU.
func openPaths(o *options, dir string) (paths, error) {
	ps := paths{
		{name: "slirp", netdev: "user,id=slirp", address: "10.0.2.15/24", gateway: "10.0.2.2", mtu: 1500},
		{name: "vigia", netdev: "stream,id=vigia,server=off,addr.type=unix,addr.path=" + dir + "/vigia", address: "10.77.0.2/24", gateway: "10.77.0.1", mtu: o.mtu},
		{name: "vigia1500", netdev: "stream,id=vigia1500,server=off,addr.type=unix,addr.path=" + dir + "/vigia1500", address: "10.78.0.2/24", gateway: "10.78.0.1", mtu: 1500},
	}
	if o.keep {
		ps = append(ps, &path{name: "kept", netdev: "stream,id=kept,server=off,addr.type=unix,addr.path=" + dir + "/kept", address: "10.79.0.2/24", gateway: "10.79.0.1", mtu: o.mtu})
	}
	for _, p := range ps[1:] {
		args := []string{"gate", "-socket", dir + "/" + p.name, "-address", p.address, "-mac", macOf(p.name), "-mtu", strconv.Itoa(p.mtu)}
		if o.profile != "" {
			args = append(args, "-profile", o.profile+"."+p.name)
		}
		if p.name == "kept" {
			args = append(args, "-keep", dir)
		}
		p.own = exec.Command(self(), args...)
	}
	if bin, err := exec.LookPath("passt"); err == nil {
		p := &path{name: "passt", netdev: "stream,id=passt,server=off,addr.type=unix,addr.path=" + dir + "/passt", address: "10.88.0.2/24", gateway: "10.88.0.1", mtu: o.mtu}
		p.own = exec.Command(bin, "-f", "-q", "-s", dir+"/passt", "-a", "10.88.0.2", "-n", "24", "-g", p.gateway, "-m", strconv.Itoa(o.mtu), "-4")
		ps = append(ps, p)
	} else {
		fmt.Fprintln(os.Stderr, "bench/net: passt is not installed: left out")
	}
	for _, p := range ps {
		if err := p.open(dir); err != nil {
			return ps, fmt.Errorf("%s: %w", p.name, err)
		}
	}
	return ps, nil
}

func (p *path) open(dir string) error {
	p.mac = macOf(p.name)
	l, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		return err
	}
	p.port = l.Addr().(*net.TCPAddr).Port
	l.Close()
	p.server = exec.Command("iperf3", "-s", "-B", "127.0.0.1", "-p", strconv.Itoa(p.port))
	if err := p.server.Start(); err != nil {
		return err
	}
	if p.own == nil {
		return nil
	}
	p.own.Stderr = os.Stderr
	if err := p.own.Start(); err != nil {
		return err
	}
	for range 500 {
		if _, err := os.Stat(dir + "/" + p.name); err == nil {
			return nil
		}
		time.Sleep(10 * time.Millisecond)
	}
	return errors.New("its socket did not appear")
}

func macOf(name string) string {
	sum := 0
	for _, c := range name {
		sum = sum*31 + int(c)
	}
	return fmt.Sprintf("52:54:00:%02x:%02x:%02x", byte(sum>>16), byte(sum>>8), byte(sum))
}

func self() string {
	exe, err := os.Executable()
	if err != nil {
		return os.Args[0]
	}
	return exe
}

// serveGate is vigia's network in a process of its own. It lets the guest reach the loopback, where iperf3 listens.
func serveGate(args []string) {
	f := flag.NewFlagSet("gate", flag.ExitOnError)
	socket, address, mac := f.String("socket", "", ""), f.String("address", "", ""), f.String("mac", "", "")
	mtu, profile, keep := f.Int("mtu", 1500, ""), f.String("profile", "", ""), f.String("keep", "", "")
	f.Parse(args)
	hw, err := net.ParseMAC(*mac)
	check(err)
	n, err := network.New(network.Config{
		Name: "bench", MAC: hw, MTU: *mtu, Guest: netip.MustParsePrefix(*address),
		Rules: []vm.NetRule{{Allow: true, Direction: "out", Prefix: netip.MustParsePrefix("127.0.0.0/8")}},
	}, func(event.Kind, event.Fields) {})
	check(err)
	if *keep != "" {
		n.KeepInputs(gate.Kept(keepIn(*keep)))
	}
	l, err := net.Listen("unix", *socket)
	check(err)
	if *profile != "" {
		out, err := os.Create(*profile)
		check(err)
		check(pprof.StartCPUProfile(out))
	}
	stop := make(chan os.Signal, 1)
	signal.Notify(stop, syscall.SIGTERM, os.Interrupt)
	go func() {
		<-stop
		pprof.StopCPUProfile()
		os.Exit(0)
	}()
	for {
		conn, err := l.Accept()
		check(err)
		if err := n.Attach(conn); err != nil {
			fmt.Fprintln(os.Stderr, "bench/net: gate:", err)
		}
	}
}

// keepIn is the log of a gate as the daemon gives it.
func keepIn(dir string) *inputs.Log {
	var files []*os.File
	for i := range 14 {
		f, err := os.Create(filepath.Join(dir, "inputs."+strconv.Itoa(i)))
		check(err)
		files = append(files, f)
	}
	log, err := inputs.Open(files, inputs.Bounds{Bytes: 56 << 20})
	check(err)
	return log
}

func check(err error) {
	if err != nil {
		fmt.Fprintln(os.Stderr, "bench/net: gate:", err)
		os.Exit(1)
	}
}
