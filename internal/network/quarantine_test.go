package network

import (
	"errors"
	"io"
	"net"
	"net/netip"
	"syscall"
	"testing"
	"time"

	"vigia/internal/event"
)

// A transfer in the middle is cut: the far end sees a reset, the guest no frame more, and nothing new begins until release.
func TestQuarantineCutsALiveTransfer(t *testing.T) {
	far, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer far.Close()
	pub, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	told := make(chan time.Time, 1)
	w := newWorld(t, Config{
		Dial:        toLoopback(map[uint16]netip.AddrPort{80: addrPortOf(far.Addr())}),
		Listeners:   []Listener{{TCP: pub, Guest: 22}},
		OnFirstDrop: func(at time.Time) { told <- at },
	})
	g := w.boot()
	inside := g.listen(22)
	caller, err := net.Dial("tcp4", pub.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer caller.Close()
	if _, err := inside.Accept(); err != nil {
		t.Fatal(err)
	}

	c := g.mustDial(outside + ":80")
	server, err := far.Accept()
	if err != nil {
		t.Fatal(err)
	}
	defer server.Close()
	go flood(c)
	wrote := make(chan error, 1)
	go func() { wrote <- flood(server) }()
	if _, err := io.ReadFull(server, make([]byte, 1<<20)); err != nil {
		t.Fatalf("before the cut: %v", err)
	}

	cut := w.n.Quarantine(true)
	if cut.Flows != 2 {
		t.Errorf("cut %d flows, want 2", cut.Flows)
	}
	in := w.n.Stats().FramesIn
	for len(g.seen) > 0 {
		<-g.seen
	}
	server.SetDeadline(time.Now().Add(patience))
	// The kernel tells of a reset once, to the reader or to the writer.
	if _, err := io.Copy(io.Discard, server); !errors.Is(errors.Join(err, <-wrote), syscall.ECONNRESET) {
		t.Errorf("the far end of a cut flow saw %v, want a reset", err)
	}
	caller.SetDeadline(time.Now().Add(patience))
	if _, err := caller.Read(make([]byte, 1)); !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("the caller of a cut flow saw %v, want a reset", err)
	}
	if again, err := net.Dial("tcp4", pub.Addr().String()); err == nil {
		again.SetDeadline(time.Now().Add(patience))
		if _, err := again.Read(make([]byte, 1)); err == nil {
			t.Error("a published port spoke in quarantine")
		}
		again.Close()
	}
	w.await(event.NetFlow, "quarantine", outside)
	w.await(event.NetFlow, "quarantine", "10.77.0.2:22")
	w.await(event.NetDenied, "quarantine")
	if got := w.n.Stats().FramesIn; got != in {
		t.Errorf("%d frames went to the guest after the cut", got-in)
	}
	first := <-told // the guest sends again what nobody acknowledges
	s := w.n.Stats()
	if !s.Quarantined || s.QuarantinedAt.IsZero() || s.FirstDrop.IsZero() || !s.FirstDrop.Equal(first.Round(0)) {
		t.Errorf("quarantined %v at %v, first drop %v, told %v", s.Quarantined, s.QuarantinedAt, s.FirstDrop, first)
	}

	w.n.Quarantine(false)
	again := g.mustDial(outside + ":80")
	served, err := far.Accept()
	if err != nil {
		t.Fatal(err)
	}
	defer served.Close()
	say(t, again, "free")
	hear(t, served, "free")
}

func flood(c net.Conn) error {
	b := make([]byte, 32<<10)
	for {
		if _, err := c.Write(b); err != nil {
			return err
		}
	}
}

// A guest that does not read can't have a frame kept for it over a quarantine: the one that was torn is filled with
// zeros, and the stream is in step after.
func TestQuarantineTearsAFrame(t *testing.T) {
	w := newWorld(t, Config{})
	wire := w.plug()
	w.waitAttached()
	secret := make([]byte, 60000)
	for i := range secret {
		secret[i] = 'S'
	}
	for range 40 { // far more than the socket holds
		w.n.out.offer(secret)
	}
	r := newFrameReader(wire)
	if _, err := r.next(); err != nil {
		t.Fatal(err)
	}
	w.n.Quarantine(true)
	w.n.Quarantine(false)
	w.n.out.offer([]byte("the first frame after"))
	wire.SetDeadline(time.Now().Add(patience))
	whole, torn := 1, 0
	for {
		f, err := r.next()
		if err != nil {
			t.Fatal(err)
		}
		if string(f) == "the first frame after" {
			break
		}
		if f[len(f)-1] == 'S' {
			whole++
		} else {
			torn++
		}
	}
	if whole > 10 || torn > 1 {
		t.Errorf("%d whole frames and %d torn ones came through", whole, torn)
	}
}

func (w *world) waitAttached() {
	for !w.n.Stats().Attached || !w.n.out.attached() {
		time.Sleep(time.Millisecond)
	}
}

func (e *egress) attached() bool {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.conn != nil
}

func TestBeginsQuarantined(t *testing.T) {
	server := echoTCP(t, "hello")
	w := newWorld(t, Config{Quarantined: true, Dial: toLoopback(map[uint16]netip.AddrPort{80: server})})
	wire := w.plug()
	send(t, wire, arpRequest(gatewayIP))
	send(t, wire, dhcpFrame(t, 1))
	w.await(event.NetDenied, "quarantine")
	expectSilence(t, wire)
	w.n.Quarantine(false)
	send(t, wire, arpRequest(gatewayIP))
	if f := receive(t, wire); f[13] != 6 || f[21] != 2 {
		t.Errorf("no ARP answer after release: %x", f)
	}
}

func TestTear(t *testing.T) {
	batch := []byte{0, 0, 0, 3, 'a', 'b', 'c', 0, 0, 0, 2, 'd', 'e'}
	for _, c := range []struct {
		n, owed int
		want    string
	}{
		{0, 0, ""}, {7, 0, ""}, {13, 0, ""},
		{1, 0, "\x00\x00\x03\x00\x00\x00"}, {4, 0, "\x00\x00\x00"}, {6, 0, "\x00"},
		{9, 0, "\x00\x02\x00\x00"}, {12, 0, "\x00"},
		{2, 7, "\x00\x03abc"}, {7, 7, ""}, {8, 7, "\x00\x00\x02\x00\x00"},
	} {
		if got := string(tear(batch, c.n, c.owed)); got != c.want {
			t.Errorf("tear after %d, %d owed: %q, want %q", c.n, c.owed, got, c.want)
		}
	}
}
