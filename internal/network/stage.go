package network

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"slices"
	"sync"
	"syscall"
	"time"

	"vigia/internal/event"
)

// A Stage stands where the world is: a machine that goes on from a checkpoint is given again what came in on its flows, and what it
// sends goes nowhere. A flow that the outside had begun is begun by the stage, through this package's own TCP/IP stack, so that it does not matter
// which sequence numbers the guest chooses this time. One that the guest begins is answered with what a flow to the same place was
// answered, in the order in which they were recorded; one that nobody recorded is refused.
//
// Bytes are due at their own pace, and not before the guest has sent as much on the flow as it had then: an answer does not come before its
// question. A guest that does not send it is waited for a while, and then given them all the same, which is counted.
type Stage struct {
	pace func(time.Time) time.Duration
	in   []*StageFlow
	last time.Time // the last part of any

	mu      sync.Mutex
	n       *Network
	out     []*StageFlow // not yet asked for
	answers map[stageName][][]byte
	report  StageReport
	giving  int // flows of which a part is yet to be given
}

// StageFlow is a recorded flow, StagePart bytes that came in on it, or an end of them.
type StageFlow struct {
	ID                uint64
	Protocol          uint8
	In                bool
	Near, Far, Client netip.AddrPort
	Began             time.Time
	Opened            bool
	Over              time.Time // zero: that is not known
	Parts             []StagePart
}

// StagePart is due at a time, after the guest has sent so much.
type StagePart struct {
	Time   time.Time
	Sent   int64
	Data   []byte
	Closed bool // the outside has sent all
	Reset  bool // it has cut the flow
}

// StageReport is what was given.
type StageReport struct {
	In, Out, Names int   // flows begun, flows answered, names answered
	Bytes          int64 // given on them
	Late           int   // parts that were given though the guest had not sent as much as then
	Refused        int   // flows and names that the guest asked for and nobody had recorded
	Unasked        int   // recorded flows that it did not ask for
}

type stageName struct {
	name         string
	qtype, class uint16
}

// How long the stage waits for a guest that has not sent as much as it had: altogether, and since it last sent something. And how many
// bytes of a flow an event tells; stageLook is how often it is looked whether all is given.
const (
	stageLook     = 50 * time.Millisecond
	stagePatience = 10 * time.Second
	stageQuiet    = 2 * time.Second
	stageOrder    = 30 * time.Second // for a flow that should be over
	stageTells    = 256
)

// NewStage makes a stage of recorded flows. pace says how long after the beginning something recorded is due.
func NewStage(flows []*StageFlow, pace func(time.Time) time.Duration) *Stage {
	s := &Stage{pace: pace, answers: map[stageName][][]byte{}}
	for _, f := range flows {
		if n := len(f.Parts); n > 0 && f.Parts[n-1].Time.After(s.last) {
			s.last = f.Parts[n-1].Time
		}
		if f.In {
			s.in = append(s.in, f)
		} else {
			s.out = append(s.out, f)
		}
	}
	byTime := func(a, b *StageFlow) int { return a.Began.Compare(b.Began) }
	slices.SortStableFunc(s.in, byTime)
	slices.SortStableFunc(s.out, byTime)
	return s
}

// Answer adds what was answered to a question for a name. Asked again, the guest hears the last one again.
func (s *Stage) Answer(name string, qtype, class uint16, reply []byte) {
	k := stageName{name, qtype, class}
	s.answers[k] = append(s.answers[k], reply)
}

var errNotRecorded = errors.New("nobody recorded that flow")

// Dial answers a flow that the guest begins.
func (s *Stage) Dial(_ context.Context, network string, to netip.AddrPort) (net.Conn, error) {
	f, err := s.asked(network, to)
	if err != nil {
		return nil, err
	}
	return newStageConn(s, f), nil
}

// asked finds the flow that is the answer.
func (s *Stage) asked(network string, to netip.AddrPort) (*StageFlow, error) {
	proto := map[string]uint8{"tcp4": protoTCP, "udp4": protoUDP, "ping4": protoICMP}[network]
	s.mu.Lock()
	defer s.mu.Unlock()
	i := slices.IndexFunc(s.out, func(f *StageFlow) bool { return f.Protocol == proto && s.same(f.Far, to) })
	if i < 0 {
		s.report.Refused++
		s.n.deny(reasonUnrecorded, "", flowKey{proto: proto, far: to})
		return nil, errNotRecorded
	}
	f := s.out[i]
	s.out = slices.Delete(s.out, i, i+1)
	s.report.Out++
	if !f.Opened {
		return nil, syscall.ECONNREFUSED
	}
	s.tell(f, "out")
	return f, nil
}

// same compares where a flow went with where one goes: the gateway stands for the host's loopback.
func (s *Stage) same(recorded, to netip.AddrPort) bool {
	return recorded == to || (recorded.Addr() == s.n.cfg.Gateway && to.Addr().IsLoopback() && recorded.Port() == to.Port())
}

// resolve answers a question.
func (s *Stage) resolve(q *question) ([]byte, answer, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	k := stageName{q.name, uint16(q.q.Type), uint16(q.q.Class)}
	list := s.answers[k]
	if len(list) == 0 {
		s.report.Refused++
		return nil, answer{}, errNotRecorded
	}
	if len(list) > 1 {
		s.answers[k] = list[1:]
	}
	s.report.Names++
	reply := slices.Clone(list[0])
	if len(reply) < 12 {
		return nil, answer{}, errDNSReply
	}
	reply[0], reply[1] = byte(q.id>>8), byte(q.id)
	a, err := parseReply(reply, q)
	return reply, a, err
}

// Play gives what the outside had begun, each at its time from now on, and returns when the last part was given or ctx ends.
func (n *Network) Play(ctx context.Context) StageReport {
	s := n.cfg.Stage
	if s == nil {
		return StageReport{}
	}
	began := time.Now()
	var given []*stageConn
	for _, f := range s.in {
		if !sleep(ctx, time.Until(began.Add(s.pace(f.Began)))) {
			break
		}
		given = awaitBefore(ctx, given, f)
		if conn := n.give(s, f); conn != nil {
			given = append(given, conn)
		}
	}
	for sleep(ctx, time.Until(began.Add(s.pace(s.last)))); s.open() > 0 && sleep(ctx, stageLook); {
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.report.Unasked = len(s.out)
	return s.report
}

func (s *Stage) open() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.giving
}

// awaitBefore waits until the flows that were over when this one began are over again: who called then may have waited for that. It returns
// those that are not.
func awaitBefore(ctx context.Context, given []*stageConn, f *StageFlow) (open []*stageConn) {
	late := time.NewTimer(stageOrder)
	defer late.Stop()
	for _, c := range given {
		if c.f.Over.IsZero() || !c.f.Over.Before(f.Began) {
			open = append(open, c)
			continue
		}
		select {
		case <-c.closed:
		case <-ctx.Done():
		case <-late.C:
			return nil // a guest that does not end one is not waited for again and again
		}
	}
	return open
}

func sleep(ctx context.Context, d time.Duration) bool {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return true
	case <-ctx.Done():
		return false
	}
}

// give begins a flow as the outside had.
func (n *Network) give(s *Stage, f *StageFlow) *stageConn {
	if f.Protocol != protoTCP && f.Protocol != protoUDP {
		return nil
	}
	s.mu.Lock()
	s.report.In++
	s.tell(f, "in")
	s.mu.Unlock()
	conn := newStageConn(s, f)
	if f.Protocol == protoTCP {
		n.admit(conn, f.Near.Port())
		return conn
	}
	u := &flow{key: flowKey{proto: protoUDP, in: true, near: f.Near, far: f.Far}, client: f.Client}
	u.send = func(b []byte) { conn.Write(b) }
	if n.begin(u, false) != allowed || !u.onCut(func() { conn.Close() }) ||
		!n.start(func() { n.readDatagrams(u, conn, func(b []byte) { n.sendUDP(f.Far, f.Near.Port(), b) }) }) {
		conn.Close()
	}
	return conn
}

// tell emits what is given. The caller holds the lock.
func (s *Stage) tell(f *StageFlow, direction string) {
	far := f.Far
	if f.Client.IsValid() {
		far = f.Client
	}
	var first []byte
	var bytes int64
	for _, p := range f.Parts {
		bytes += int64(len(p.Data))
		if room := stageTells - len(first); room > 0 {
			first = append(first, p.Data[:min(room, len(p.Data))]...)
		}
	}
	s.n.report.input(event.Fields{"source": "network", "direction": direction, "protocol": protoName(f.Protocol), "local": f.Near.String(), "remote": far.String(),
		"flow": int64(f.ID), "recorded": f.Began.UTC().Format(time.RFC3339Nano), "bytes": bytes, "text": event.Text(first)})
}
