package network

import (
	"bytes"
	"errors"
	"io"
	"net"
	"net/netip"
	"strings"
	"testing"

	"github.com/gopacket/gopacket/pcapgo"

	"vigia/internal/event"
)

func contains(s, part string) bool { return strings.Contains(s, part) }

func TestConfig(t *testing.T) {
	for want, cfg := range map[string]Config{
		"MAC":            {},
		"unicast":        {MAC: net.HardwareAddr{1, 0, 0, 0, 0, 0}},
		"guest address":  {MAC: guestMAC, Guest: netip.MustParsePrefix("fd00::2/64")},
		"subnet":         {MAC: guestMAC, Guest: netip.MustParsePrefix("10.0.0.2/31")},
		"gateway":        {MAC: guestMAC, Gateway: netip.MustParseAddr("10.0.0.1")},
		"MTU 100":        {MAC: guestMAC, MTU: 100},
		"MTU 65536":      {MAC: guestMAC, MTU: 65536},
		"listener":       {MAC: guestMAC, Listeners: []Listener{{Guest: 1}}},
		"net rule":       {MAC: guestMAC, Rules: append(rules(t, "allow out any"), rules(t, "deny in any")...)},
		"no guest port":  {MAC: guestMAC, Listeners: []Listener{{TCP: fakeListener{}}}},
		"gateway's MAC":  {MAC: guestMAC, GatewayMAC: net.HardwareAddr{1}},
		"not 576":        {MAC: guestMAC, MTU: 575},
		"another addres": {MAC: guestMAC, Guest: netip.MustParsePrefix("10.77.0.1/24")},
	} {
		if want == "net rule" {
			cfg.Rules[0].Direction = "sideways"
		}
		n, err := New(cfg, nil)
		if err == nil {
			n.Close()
		}
		if !errors.Is(err, ErrConfig) || !strings.Contains(err.Error(), want) {
			t.Errorf("%+v: %v, want %q", cfg, err, want)
		}
	}
}

type fakeListener struct{ net.Listener }

// Flows outlive the wire: QEMU listens, and a gate that lost it comes back.
func TestReattach(t *testing.T) {
	server := echoTCP(t, "hello")
	w := newWorld(t, Config{Dial: toLoopback(map[uint16]netip.AddrPort{80: server})})
	first := w.plug()
	w.waitAttached()
	gate, other := socketpair(t)
	if err := w.n.Attach(gate); !errors.Is(err, ErrAttached) {
		t.Errorf("a second wire: %v", err)
	}
	other.Close()
	first.Close()
	for w.n.Stats().Attached {
	}
	hear(t, w.boot().mustDial(outside+":80"), "hello")
	w.n.Close()
	gate, other = socketpair(t)
	defer other.Close()
	if err := w.n.Attach(gate); !errors.Is(err, ErrClosed) {
		t.Errorf("after Close: %v", err)
	}
}

// Flows that a former gate had are reset at the guest's next segment.
func TestUnknownFlowIsReset(t *testing.T) {
	w := newWorld(t, Config{})
	wire := w.plug()
	frame := synFrame(t, outside, 1000, 80)
	frame[47] = 0x10 // ACK, as in the middle of a flow
	send(t, wire, frame)
	if f := receive(t, wire); f[47]&0x04 == 0 {
		t.Errorf("not a reset: flags %x", f[47])
	}
}

func TestCapture(t *testing.T) {
	w := newWorld(t, Config{})
	wire := w.plug()
	expectAlive(t, wire)
	var file bytes.Buffer
	if _, err := w.n.Capture(&file, CaptureOptions{SnapLength: 30}); err != nil {
		t.Fatal(err)
	}
	expectAlive(t, wire)
	stats, err := w.n.Capture(nil, CaptureOptions{})
	if err != nil || stats.Frames != 2 || stats.Bytes != 60 || stats.On {
		t.Fatalf("capture: %+v, %v", stats, err)
	}
	expectAlive(t, wire) // not in it
	r, err := pcapgo.NewNgReader(bytes.NewReader(file.Bytes()), pcapgo.NgReaderOptions{})
	if err != nil {
		t.Fatal(err)
	}
	for i, want := range [][]byte{arpRequest(gatewayIP)[:30], nil} {
		data, ci, err := r.ReadPacketData()
		if err != nil || ci.Length != 42 || ci.CaptureLength != 30 || want != nil && !bytes.Equal(data, want) {
			t.Errorf("frame %d: %x, %+v, %v", i, data, ci, err)
		}
	}
	if _, _, err := r.ReadPacketData(); err != io.EOF {
		t.Errorf("more than two frames: %v", err)
	}
}

// What a quarantined machine tries is evidence.
func TestCaptureInQuarantine(t *testing.T) {
	w := newWorld(t, Config{Quarantined: true})
	wire := w.plug()
	var file bytes.Buffer
	w.n.Capture(&file, CaptureOptions{})
	send(t, wire, synFrame(t, outside, 1, 80))
	w.await(event.NetDenied, "quarantine")
	if s, _ := w.n.Capture(nil, CaptureOptions{}); s.Frames != 1 {
		t.Errorf("%+v", s)
	}
}

// A capture is bounded by its limit and survives a file that does not take it.
func TestCaptureLimits(t *testing.T) {
	w := newWorld(t, Config{})
	wire := w.plug()
	w.n.Capture(io.Discard, CaptureOptions{MaxBytes: 100})
	for range 10 {
		expectAlive(t, wire)
	}
	if s, _ := w.n.Capture(nil, CaptureOptions{}); s.Frames != 2 || s.Bytes != 84 || s.Dropped != 18 {
		t.Errorf("limit: %+v", s)
	}
	slow := &stuckWriter{free: make(chan struct{}), after: 1}
	w.n.Capture(slow, CaptureOptions{})
	big := udpFrame(t, "192.0.2.1", 9, make([]byte, 60000))
	for range 100 {
		send(t, wire, big)
	}
	w.settled(110)
	s := w.n.Stats().Capture
	if s.Dropped == 0 || s.Bytes > 4<<20 {
		t.Errorf("a file that is stuck: %+v", s)
	}
	close(slow.free)
	if s, _ := w.n.Capture(nil, CaptureOptions{}); s.Error == nil {
		t.Errorf("a write error is not told: %+v", s)
	}
}

// A capture whose reader is stuck holds up neither its own end, nor Stats, nor Close.
func TestStuckCapture(t *testing.T) {
	w := newWorld(t, Config{})
	wire := w.plug()
	file, reader := net.Pipe()
	defer reader.Close()
	go reader.Read(make([]byte, 4096)) // the section header, then no more
	if _, err := w.n.Capture(file, CaptureOptions{}); err != nil {
		t.Fatal(err)
	}
	expectAlive(t, wire)
	w.n.Stats()
	if s, _ := w.n.Capture(nil, CaptureOptions{}); s.Error == nil {
		t.Errorf("the write that failed is not told: %+v", s)
	}
}

type stuckWriter struct {
	free  chan struct{}
	after int
}

func (s *stuckWriter) Write(b []byte) (int, error) {
	if s.after--; s.after >= 0 {
		return len(b), nil
	}
	<-s.free
	return 0, io.ErrShortWrite
}

// Alike refusals are one event and a count; sorts beyond the limit are counted together; nothing is lost silently.
func TestReportsAreCoalesced(t *testing.T) {
	w := newWorld(t, Config{Limits: Limits{EventRate: 5}})
	k := flowKey{proto: protoTCP, near: netip.MustParseAddrPort("10.77.0.2:1"), far: netip.MustParseAddrPort("198.51.100.7:25")}
	for range 1000 {
		w.n.deny(reasonRule, "deny out tcp any:25", k)
	}
	for i := range 1000 {
		k.far = netip.AddrPortFrom(k.far.Addr(), uint16(1000+i))
		w.n.deny(reasonRule, "deny out any", k)
	}
	for range 1000 {
		w.n.report.flow(event.Fields{"protocol": "tcp"})
	}
	w.n.report.close()
	var denied, flows, lost int64
	for _, e := range w.all() {
		switch e.Kind {
		case event.NetDenied:
			denied += e.Fields["count"].(int64)
		case event.NetFlow:
			flows++
		case event.EventsLost:
			lost += e.Fields["count"].(int64)
		}
	}
	if denied != 2000 || flows+lost != 1000 || lost != w.n.Stats().EventsLost {
		t.Errorf("%d refusals, %d flows and %d lost were told; %d", denied, flows, lost, w.n.Stats().EventsLost)
	}
	if n := len(w.all()); n > 120 {
		t.Errorf("%d events for it", n)
	}
}
