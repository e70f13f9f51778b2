// Package gate is the worker that is a guest's network: every frame between QEMU's network card and the world passes
// through it (package network). It sees neither the guest's memory nor its disk, and of the host it has the network
// and nothing else.
package gate

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"runtime/debug"
	"sync"
	"time"

	"vigia/internal/inputs"
	"vigia/internal/jail"
	"vigia/internal/link"
	"vigia/internal/network"
	"vigia/internal/vm"
)

// Gate is one guest's gate.
type Gate struct {
	out      *link.Outbox
	measures []link.Measure
	version  string

	mu    sync.Mutex
	net   *network.Network // nil: not configured
	log   *inputs.Log      // nil: what enters is not kept
	set   *set             // of a gate that is a stage
	ahead bool             // nobody has asked for its machine yet
}

// Main is `vigia gate`, or with another profile a gate that leads nowhere: it confines itself and serves daemons until it is ended.
func Main(version string, profile jail.Profile) error {
	footprint := link.NewFootprint()
	measures, err := jail.Confine(profile)
	if err != nil {
		return err
	}
	debug.SetGCPercent(50)
	control, err := link.Control()
	if err != nil {
		return err
	}
	g := &Gate{version: version, out: link.NewOutbox("")}
	for _, m := range measures {
		g.measures = append(g.measures, link.Measure{Name: m.Name, InForce: m.InForce, Detail: m.Detail + m.Why})
	}
	footprint.TrimLater(nil)
	w := &link.Worker{Outbox: g.out, Hello: g.hello, Handle: g.handle, Left: g.left}
	if err := w.Count(); err != nil {
		return err
	}
	return w.Serve(context.Background(), control)
}

func (g *Gate) hello() link.Hello {
	return link.Hello{Source: g.out.Source(), PID: os.Getpid(), Version: g.version, Configured: g.network() != nil, InForce: g.measures}
}

func (g *Gate) network() *network.Network {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.net
}

func (g *Gate) handle(ctx context.Context, r link.Request) (link.Response, error) {
	if r.Method == link.CallConfigure {
		return link.Response{}, g.configure(r)
	}
	n := g.network()
	if n == nil {
		closeFiles(r.Files)
		return link.Response{}, errors.New("not configured")
	}
	switch r.Method {
	case link.CallFrames:
		return link.Response{}, frames(n, r.Files)
	case link.CallCapture:
		return link.Response{}, capture(ctx, n, r)
	case link.CallKeepInputs:
		return link.Response{}, g.keep(n, r)
	}
	closeFiles(r.Files)
	switch r.Method {
	case link.CallName:
		return link.Response{}, g.name(r)
	case link.CallQuarantine:
		return quarantine(n, r)
	case link.CallRules:
		var rules link.Rules
		if err := r.Decode(&rules); err != nil {
			return link.Response{}, err
		}
		return link.Response{}, n.SetRules(rules.Rules)
	case link.CallEnding: // QEMU is gone: what is open ends, and what was counted is told
		err := n.Close()
		g.log.Close()
		return link.Response{}, err
	case link.CallPlay:
		return link.Response{Body: g.set.play(ctx, n)}, nil
	case link.CallGateStatus:
		return link.Response{Body: status(n.Stats())}, nil
	}
	return link.Response{}, fmt.Errorf("gate has no call %q", r.Method)
}

// configure makes the network, once. Its files are the published ports, bound by the daemon.
func (g *Gate) configure(r link.Request) error {
	g.mu.Lock()
	defer g.mu.Unlock()
	var cfg link.GateConfig
	err := r.Decode(&cfg)
	if g.net != nil {
		err = errors.New("configured already")
	}
	segments := 0
	if cfg.Stage != nil {
		segments = max(cfg.Stage.Gate, 0) + max(cfg.Stage.Guard, 0)
	}
	if err == nil && len(cfg.Publish)+segments != len(r.Files) {
		err = errors.New("configure: ports and descriptors do not match")
	}
	var mac net.HardwareAddr
	if err == nil {
		mac, err = net.ParseMAC(cfg.MAC)
	}
	if err != nil {
		closeFiles(r.Files)
		return err
	}
	ports := len(cfg.Publish)
	var stage *network.Stage
	if cfg.Stage != nil {
		g.set = newSet(*cfg.Stage, r.Files[ports:])
		stage = g.set.stage
	}
	listeners, err := listeners(cfg, r.Files[:ports])
	if err != nil {
		return err
	}
	g.out.SetMachine(cfg.Name)
	made, err := network.New(network.Config{Name: cfg.Name, MAC: mac, Guest: subnet(cfg.Address), Rules: cfg.Rules, Listeners: listeners,
		Resolvers: cfg.Resolvers, MTU: cfg.MTU, Stage: stage, Quarantined: cfg.Quarantined, Held: g.out.Holder()}, g.out.Emit)
	if err != nil {
		for _, l := range listeners {
			if l.TCP != nil {
				l.TCP.Close()
			} else {
				l.UDP.Close()
			}
		}
		return err
	}
	g.net, g.ahead = made, cfg.Ahead
	return nil
}

// name says what the machine is called that nobody had asked for when this gate began.
func (g *Gate) name(r link.Request) error {
	var n link.Name
	if err := r.Decode(&n); err != nil {
		return err
	}
	g.out.SetMachine(n.Name)
	g.mu.Lock()
	defer g.mu.Unlock()
	g.ahead = false
	g.net.SetName(n.Name)
	return nil
}

// left is told that no daemon is there any more: a gate whose machine nobody has asked for is of no use to the next one.
func (g *Gate) left() {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.ahead {
		os.Exit(0)
	}
}

func listeners(cfg link.GateConfig, files []*os.File) (out []network.Listener, err error) {
	defer closeFiles(files)
	for i, p := range cfg.Publish {
		l := network.Listener{Guest: p.Guest}
		if p.Protocol == "udp" {
			l.UDP, err = net.FilePacketConn(files[i])
		} else {
			l.TCP, err = net.FileListener(files[i])
		}
		if err != nil {
			return nil, fmt.Errorf("publish %s: %w", p, err)
		}
		out = append(out, l)
	}
	return out, nil
}

// frames serves QEMU's network card over the connection that came along.
func frames(n *network.Network, files []*os.File) error {
	defer closeFiles(files)
	if len(files) != 1 && len(files) != 2 {
		return errors.New("frames: no socket was given")
	}
	card, err := net.FileConn(files[0])
	if err != nil {
		return err
	}
	if len(files) == 2 {
		in, err := net.FileConn(files[1])
		if err != nil {
			card.Close()
			return err
		}
		card = twoWays{card, in}
	}
	go func() {
		if err := n.Attach(card); errors.Is(err, network.ErrFraming) {
			// QEMU is out of step and this connection lost: another gate makes a new one.
			fmt.Fprintf(os.Stderr, "vigia gate: %v\n", err)
			os.Exit(1)
		}
	}()
	return nil
}

// twoWays is a card whose frames come on one socket and go on another.
type twoWays struct {
	net.Conn // from the card
	to       net.Conn
}

func (c twoWays) Write(b []byte) (int, error)        { return c.to.Write(b) }
func (c twoWays) SetWriteDeadline(t time.Time) error { return c.to.SetWriteDeadline(t) }
func (c twoWays) Close() error                       { return errors.Join(c.Conn.Close(), c.to.Close()) }

func quarantine(n *network.Network, r link.Request) (link.Response, error) {
	var q link.Quarantine
	if err := r.Decode(&q); err != nil {
		return link.Response{}, err
	}
	cut := n.Quarantine(q.On)
	return link.Response{Body: link.Quarantined{Flows: cut.Flows, At: cut.At}}, nil
}

// captureMost bounds one capture, in bytes of frames.
const captureMost = 16 << 30

// capture writes frames into the pipe that came along until the far end closes it or the call ends.
func capture(ctx context.Context, n *network.Network, r link.Request) error {
	defer closeFiles(r.Files)
	var c link.Capture
	if err := r.Decode(&c); err != nil {
		return err
	}
	if len(r.Files) != 1 {
		return errors.New("capture: no pipe was given")
	}
	pipe := &watched{file: r.Files[0], broken: make(chan struct{})}
	if _, err := n.Capture(pipe, network.CaptureOptions{SnapLength: int(c.SnapLength), MaxBytes: captureMost}); err != nil {
		return err
	}
	select {
	case <-ctx.Done():
	case <-pipe.broken:
	}
	_, err := n.Capture(nil, network.CaptureOptions{})
	return err
}

// watched tells when nobody reads the pipe any more.
type watched struct {
	file   *os.File
	once   sync.Once
	broken chan struct{}
}

// SetWriteDeadline lets a capture end though nobody reads it.
func (w *watched) SetWriteDeadline(t time.Time) error { return w.file.SetWriteDeadline(t) }

func (w *watched) Write(b []byte) (int, error) {
	n, err := w.file.Write(b)
	if err != nil {
		w.once.Do(func() { close(w.broken) })
	}
	return n, err
}

func status(s network.Stats) link.GateStatus {
	out := link.GateStatus{FramesIn: uint64(s.FramesIn), FramesOut: uint64(s.FramesOut), Flows: s.Open, Quarantined: s.Quarantined, FirstDrop: s.FirstDrop}
	for _, n := range s.Dropped {
		out.Dropped += uint64(n)
	}
	return out
}

func closeFiles(files []*os.File) {
	for _, f := range files {
		f.Close()
	}
}

// subnet is a machine's network by its guest's address; the zero one where it has none of its own.
func subnet(a netip.Addr) netip.Prefix {
	if !a.IsValid() {
		return netip.Prefix{}
	}
	return netip.PrefixFrom(a, vm.Subnet.Bits())
}
