package network

import (
	"context"
	"io"
	"net"
	"net/netip"
	"strings"
	"sync"
	"testing"
	"time"

	"vigia/internal/event"
)

// memo keeps inputs in memory, as a stage takes them.
type memo struct {
	mu      sync.Mutex
	flows   []*StageFlow
	answers []string
}

func (m *memo) Flow(proto uint8, in bool, near, far, client netip.AddrPort) uint64 {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.flows = append(m.flows, &StageFlow{ID: uint64(len(m.flows) + 1), Protocol: proto, In: in, Near: near, Far: far, Client: client, Began: time.Now()})
	return uint64(len(m.flows))
}

func (m *memo) part(flow uint64, p StagePart) {
	m.mu.Lock()
	defer m.mu.Unlock()
	p.Time = time.Now()
	m.flows[flow-1].Parts = append(m.flows[flow-1].Parts, p)
}

func (m *memo) Opened(flow uint64) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.flows[flow-1].Opened = true
}

func (m *memo) Data(flow uint64, sent int64, b []byte) {
	m.part(flow, StagePart{Sent: sent, Data: append([]byte(nil), b...)})
}
func (m *memo) Closed(flow uint64, sent int64, reset bool) {
	m.part(flow, StagePart{Sent: sent, Closed: !reset, Reset: reset})
}
func (m *memo) Ended(uint64, string) {}
func (m *memo) Answer(name string, _, _ uint16, _ []byte) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.answers = append(m.answers, name)
}

// serveWeb is a guest that answers one line with another, after its banner, and says what it heard.
func serveWeb(g *guest, port uint16) chan string {
	heard := make(chan string, 8)
	l := g.listen(port)
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			io.WriteString(c, "banner\n")
			buf := make([]byte, 256)
			for {
				n, err := c.Read(buf)
				if n > 0 {
					heard <- strings.TrimSpace(string(buf[:n]))
					io.WriteString(c, "answer to "+string(buf[:n]))
				}
				if err != nil {
					c.Close()
					break
				}
			}
			heard <- "end"
		}
	}()
	return heard
}

// asks begins flows to the outside, and says what it was answered.
func asks(g *guest) string {
	c := g.mustDial("198.51.100.7:80")
	say(g.t, c, "ping")
	buf := make([]byte, 64)
	n, _ := io.ReadAtLeast(c, buf, len("hello")+len("ping"))
	c.Close()
	return string(buf[:n])
}

// TestStage records a guest that is called and that calls, and gives another guest the same again: nothing leaves, and each hears what the
// first one heard.
func TestStage(t *testing.T) {
	l, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	kept := &memo{}
	w := newWorld(t, Config{Listeners: []Listener{{TCP: l, Guest: 80}}, Dial: toLoopback(map[uint16]netip.AddrPort{80: echoTCP(t, "hello")})})
	w.n.KeepInputs(kept)
	g := w.boot()
	heard := serveWeb(g, 80)
	c, err := net.Dial("tcp4", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	hear(t, c, "banner\n")
	say(t, c, "first\n")
	hear(t, c, "answer to first\n")
	say(t, c, "second\n")
	hear(t, c, "answer to second\n")
	c.Close()
	for _, want := range []string{"first", "second", "end"} {
		if got := <-heard; got != want {
			t.Fatalf("the guest heard %q, want %q", got, want)
		}
	}
	if got := asks(g); got != "helloping" {
		t.Fatalf("the guest was answered %q", got)
	}
	w.await(event.NetFlow, "198.51.100.7:80")
	w.n.KeepInputs(nil)
	w.n.Close()
	kept.mu.Lock()
	flows := kept.flows
	kept.mu.Unlock()
	if len(flows) != 2 || !flows[0].In || flows[1].In || !flows[0].Opened || !flows[1].Opened {
		t.Fatalf("kept: %+v", flows)
	}

	began := flows[0].Began
	stage := NewStage(flows, func(at time.Time) time.Duration { return at.Sub(began) })
	again := newWorld(t, Config{Stage: stage})
	g = again.boot()
	heard = serveWeb(g, 80)
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	done := make(chan StageReport, 1)
	go func() { done <- again.n.Play(ctx) }()
	for _, want := range []string{"first", "second", "end"} {
		if got := <-heard; got != want {
			t.Fatalf("the guest heard %q again, want %q", got, want)
		}
	}
	if got := asks(g); got != "helloping" {
		t.Errorf("the guest was answered %q again", got)
	}
	// A second one was not recorded.
	if c, err := g.dial("198.51.100.7:80"); err == nil {
		c.Close()
		t.Error("a flow that nobody recorded was answered")
	}
	again.await(event.NetDenied, "198.51.100.7:80", "not in what is given again")
	again.await(event.InputGiven, "direction:in", "first")
	again.await(event.InputGiven, "direction:out", "hello")
	if r := <-done; r.In != 1 || r.Out != 1 || r.Late != 0 || r.Bytes != int64(len("first\nsecond\nhelloping")) {
		t.Errorf("report: %+v", r)
	}
}

// TestStageWaits has a guest that never sends what it had sent: it is given its bytes all the same, and that is counted.
func TestStageWaits(t *testing.T) {
	at := time.Now()
	flow := &StageFlow{ID: 1, Protocol: protoTCP, In: true, Near: netip.MustParseAddrPort("10.77.0.2:80"), Client: netip.MustParseAddrPort("127.0.0.1:9"), Began: at, Opened: true,
		Parts: []StagePart{{Time: at, Data: []byte("a")}, {Time: at, Sent: 1000, Data: []byte("b")}, {Time: at, Sent: 1000, Reset: true}}}
	w := newWorld(t, Config{Stage: NewStage([]*StageFlow{flow}, func(time.Time) time.Duration { return 0 })})
	heard := serveWeb(w.boot(), 80)
	done := make(chan StageReport, 1)
	go func() { done <- w.n.Play(context.Background()) }()
	for _, want := range []string{"a", "b", "end"} {
		if got := <-heard; got != want {
			t.Fatalf("the guest heard %q, want %q", got, want)
		}
	}
	if r := <-done; r.Late != 2 {
		t.Errorf("report: %+v", r)
	}
}

// TestStageNames answers a question as it was answered, and another one with a failure.
func TestStageNames(t *testing.T) {
	stage := NewStage(nil, func(time.Time) time.Duration { return 0 })
	q, err := parseQuery(queryFor(t, "example.org."))
	if err != nil {
		t.Fatal(err)
	}
	stage.Answer("example.org", uint16(q.q.Type), uint16(q.q.Class), emptyReply(&q, 0))
	w := newWorld(t, Config{Stage: stage})
	for name, want := range map[string]string{"example.org.": "NOERROR", "example.net.": "SERVFAIL"} {
		p := w.n.dns
		query := queryFor(t, name)
		if reply := p.resolve(p.context(), "udp", query); len(reply) < 12 || reply[0] != query[0] || reply[1] != query[1] {
			t.Errorf("%s: %x", name, reply)
		}
		w.await(event.NetDNS, strings.TrimSuffix(name, "."), want)
	}
}
