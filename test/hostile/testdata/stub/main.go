// Command stub stands in QEMU's place, in QEMU's jail and with QEMU's command line, and does to guard and gate what a guest
// could that has taken QEMU over; under the name qemu-img it stands in that one's place (tool.go). The machine's name says what: the part before the first digit is one of attacks; any
// other name is a machine that behaves.
package main

import (
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"time"
)

// stub is one machine.
type stub struct {
	attack string
	mac    [6]byte
	nbd    string         // path of the disk's socket
	fds    map[string]int // listening sockets by the name of their character device
	going  chan struct{}  // closed when the guest is let go
	once   sync.Once

	mu   sync.Mutex
	line []byte // of the serial line, what waits to be written
	more chan struct{}
}

// parts is what a machine does on each of its channels; each is called with every new connection.
type parts struct {
	qmp, console, net, agent func(net.Conn)
	disk                     func() // once, when the guest is let go
}

func main() {
	all := strings.Join(os.Args[1:], " ")
	switch {
	case filepath.Base(os.Args[0]) == "qemu-img":
		tool()
	case strings.Contains(all, "-version"):
		fmt.Println("QEMU emulator version 7.2.22 (a stub)")
		return
	case strings.Contains(all, "help"):
		for _, d := range []string{"virtio-blk-pci", "virtio-net-pci", "virtio-serial-pci", "virtio-rng-pci", "virtserialport"} {
			fmt.Printf("name %q\n", d)
		}
		return
	}
	s := &stub{fds: map[string]int{}, going: make(chan struct{}), more: make(chan struct{}, 1)}
	if err := s.parse(os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	p := parts{qmp: s.monitor, console: s.serial, net: s.card, agent: s.noAgent, disk: s.useDisk}
	if f := attacks[s.attack]; f != nil {
		f(s, &p)
	}
	s.serve("qmp", p.qmp)
	s.serve("console", p.console)
	s.serve("net", p.net)
	s.serve("agent", p.agent)
	<-s.going
	p.disk()
	select {}
}

// parse reads what package machine writes.
func (s *stub) parse(args []string) error {
	for i := 0; i+1 < len(args); i++ {
		v := args[i+1]
		switch args[i] {
		case "-name":
			s.attack = strings.TrimRight(option(v, "guest"), "0123456789")
		case "-chardev":
			s.fds[option(v, "id")], _ = strconv.Atoi(option(v, "fd"))
		case "-netdev":
			s.fds["net"], _ = strconv.Atoi(option(v, "addr.str"))
		case "-device":
			if mac, err := net.ParseMAC(option(v, "mac")); err == nil {
				copy(s.mac[:], mac)
			}
		case "-blockdev":
			s.nbd = option(v, "server.path")
		}
	}
	if s.fds["qmp"] == 0 || s.nbd == "" {
		return fmt.Errorf("not a machine's command line: %q", args)
	}
	return nil
}

func option(list, name string) string {
	for _, o := range strings.Split(list, ",") {
		if v, ok := strings.CutPrefix(o, name+"="); ok {
			return v
		}
	}
	return ""
}

// serve answers one connection after the other, as QEMU's character devices do.
func (s *stub) serve(name string, f func(net.Conn)) {
	fd := s.fds[name]
	if fd == 0 {
		return
	}
	l, err := net.FileListener(os.NewFile(uintptr(fd), name))
	if err != nil {
		fmt.Fprintln(os.Stderr, name, err)
		os.Exit(1)
	}
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			f(c)
			c.Close()
		}
	}()
}

// letGo is what the guard's "cont" does.
func (s *stub) letGo() { s.once.Do(func() { close(s.going) }) }

// say puts a line on the serial line; nothing waits for it.
func (s *stub) say(format string, a ...any) {
	s.mu.Lock()
	if len(s.line) < 1<<16 {
		s.line = fmt.Appendf(s.line, format+"\r\n", a...)
	}
	s.mu.Unlock()
	select {
	case s.more <- struct{}{}:
	default:
	}
}

// serial writes what is said.
func (s *stub) serial(c net.Conn) {
	go drain(c)
	for range s.more {
		s.mu.Lock()
		b := s.line
		s.line = nil
		s.mu.Unlock()
		if _, err := c.Write(b); err != nil {
			return
		}
	}
}

func (s *stub) noAgent(c net.Conn) { drain(c) }

func drain(c net.Conn) {
	b := make([]byte, 64<<10)
	for {
		if _, err := c.Read(b); err != nil {
			return
		}
	}
}

// flood writes what next gives until the connection ends, without reading.
func flood(c net.Conn, next func() []byte) {
	for {
		if _, err := c.Write(next()); err != nil {
			return
		}
	}
}

// for a while, so that a test can look at what comes after.
func until(d time.Duration) func() bool {
	end := time.Now().Add(d)
	return func() bool { return time.Now().Before(end) }
}
