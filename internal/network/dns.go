package network

import (
	"context"
	"crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"strings"
	"sync"
	"time"

	"golang.org/x/net/dns/dnsmessage"
	"golang.org/x/time/rate"
	"gvisor.dev/gvisor/pkg/tcpip/transport/tcp"

	"vigia/internal/event"
)

// dnsProxy is the gateway's name server. It passes a question on to the host's own name servers and the answer
// back, byte for byte but for the identifier; it reads both to report them, and to learn which address the guest
// knows under which name.
type dnsProxy struct {
	n     *Network
	slots chan struct{} // one per question on its way
	calls chan struct{} // one per TCP connection
	rate  *rate.Limiter

	mu   sync.Mutex
	ctx  context.Context // of the questions on their way
	stop context.CancelFunc
}

const (
	maxQuery    = 4 << 10
	maxReply    = 64 << 10
	maxAnswers  = 64 // looked at in one reply
	askTimeout  = 3 * time.Second
	callTimeout = 15 * time.Second
	maxCalls    = 16
)

var (
	errDNSQuery = errors.New("dns: not a question")
	errDNSReply = errors.New("dns: not an answer to the question")
	errNoServer = errors.New("dns: the host has no name server")
)

func newDNSProxy(n *Network) *dnsProxy {
	l := n.cfg.Limits
	p := &dnsProxy{n: n, slots: make(chan struct{}, l.DNSInFlight), calls: make(chan struct{}, maxCalls)}
	p.rate = rate.NewLimiter(rate.Limit(l.DNSRate), 2*l.DNSRate)
	p.ctx, p.stop = context.WithCancel(n.ctx)
	return p
}

func (n *Network) dnsAddr() netip.AddrPort { return netip.AddrPortFrom(n.cfg.Gateway, 53) }

// cut gives up all questions on their way.
func (p *dnsProxy) cut() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.stop()
	p.ctx, p.stop = context.WithCancel(p.n.ctx)
}

func (p *dnsProxy) context() context.Context {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.ctx
}

// datagram takes a question by UDP.
func (p *dnsProxy) datagram(near netip.AddrPort, query []byte) {
	if !p.take(near) {
		return
	}
	ctx := p.context()
	ok := p.n.start(func() {
		defer func() { <-p.slots }()
		if reply := p.resolve(ctx, "udp", query); reply != nil && ctx.Err() == nil {
			p.n.sendUDP(p.n.dnsAddr(), near.Port(), reply)
		}
	})
	if !ok {
		<-p.slots
	}
}

// take takes a slot for a question, or reports a flood.
func (p *dnsProxy) take(near netip.AddrPort) bool {
	if p.rate.Allow() {
		select {
		case p.slots <- struct{}{}:
			return true
		default:
		}
	}
	p.n.deny(reasonFlood, "", flowKey{proto: protoUDP, near: near, far: p.n.dnsAddr()})
	return false
}

// acceptDNS serves a guest's TCP connection to the name server.
func (n *Network) acceptDNS(f *flow, r *tcp.ForwarderRequest) {
	select {
	case n.dns.calls <- struct{}{}:
		defer func() { <-n.dns.calls }()
	default:
		r.Complete(true)
		n.finish(f, endDenied)
		return
	}
	ep, wq, ok := n.shake(f, r)
	if !ok {
		n.finish(f, endReset)
		return
	}
	conn := gonetConn(ep, wq)
	if f.onCut(ep.Abort) {
		n.dns.serveStream(conn, f.key.near)
	}
	n.finish(f, endClosed)
	n.closeGuest(ep, wq)
}

// serveStream answers questions with a 2-byte length before each, RFC 7766.
func (p *dnsProxy) serveStream(conn net.Conn, near netip.AddrPort) {
	for {
		conn.SetDeadline(time.Now().Add(callTimeout))
		query, err := readDNS(conn, maxQuery)
		if err != nil || !p.take(near) {
			return
		}
		reply := p.resolve(p.context(), "tcp", query)
		<-p.slots
		if reply == nil {
			return
		}
		if _, err := conn.Write(append(binary.BigEndian.AppendUint16(nil, uint16(len(reply))), reply...)); err != nil {
			return
		}
	}
}

func readDNS(r io.Reader, most int) ([]byte, error) {
	var size [2]byte
	if _, err := io.ReadFull(r, size[:]); err != nil {
		return nil, err
	}
	n := int(binary.BigEndian.Uint16(size[:]))
	if n < 12 || n > most {
		return nil, fmt.Errorf("dns: a message of %d bytes", n)
	}
	b := make([]byte, n)
	_, err := io.ReadFull(r, b)
	return b, err
}

// question is what a guest asked.
type question struct {
	id   uint16
	q    dnsmessage.Question
	name string // lower case, without the last dot
}

func parseQuery(b []byte) (question, error) {
	if len(b) > maxQuery {
		return question{}, errDNSQuery
	}
	var p dnsmessage.Parser
	h, err := p.Start(b)
	if err != nil || h.Response || h.OpCode != 0 {
		return question{}, errDNSQuery
	}
	q, err := p.Question()
	if err != nil {
		return question{}, errDNSQuery
	}
	if _, err := p.Question(); err != dnsmessage.ErrSectionDone {
		return question{}, errDNSQuery
	}
	return question{id: h.ID, q: q, name: plainName(q.Name.String())}, nil
}

func plainName(s string) string { return strings.ToLower(strings.TrimSuffix(s, ".")) }

// answer is what a reply says.
type answer struct {
	rcode   dnsmessage.RCode
	addrs   []netip.Addr
	ttls    []uint32
	aliases []string
	cut     bool
}

// parseReply reads a reply to q. What follows a record that can't be read is ignored.
func parseReply(b []byte, q *question) (answer, error) {
	var p dnsmessage.Parser
	h, err := p.Start(b)
	if err != nil || !h.Response {
		return answer{}, errDNSReply
	}
	asked, err := p.Question()
	if err != nil || asked.Type != q.q.Type || asked.Class != q.q.Class || plainName(asked.Name.String()) != q.name {
		return answer{}, errDNSReply
	}
	a := answer{rcode: h.RCode, cut: h.Truncated}
	if p.SkipAllQuestions() != nil {
		return a, nil
	}
	for range maxAnswers {
		rh, err := p.AnswerHeader()
		if err != nil || !a.record(&p, rh) {
			break
		}
	}
	return a, nil
}

func (a *answer) record(p *dnsmessage.Parser, h dnsmessage.ResourceHeader) bool {
	switch h.Type {
	case dnsmessage.TypeA:
		r, err := p.AResource()
		if err != nil {
			return false
		}
		a.addrs, a.ttls = append(a.addrs, netip.AddrFrom4(r.A)), append(a.ttls, h.TTL)
	case dnsmessage.TypeAAAA:
		r, err := p.AAAAResource()
		if err != nil {
			return false
		}
		a.addrs, a.ttls = append(a.addrs, netip.AddrFrom16(r.AAAA)), append(a.ttls, h.TTL)
	case dnsmessage.TypeCNAME:
		r, err := p.CNAMEResource()
		if err != nil {
			return false
		}
		a.aliases = append(a.aliases, plainName(r.CNAME.String()))
	default:
		return p.SkipAnswer() == nil
	}
	return true
}

// resolve returns the reply to a question, nil where it deserves none.
func (p *dnsProxy) resolve(ctx context.Context, network string, query []byte) []byte {
	q, err := parseQuery(query)
	if err != nil {
		p.n.deny(reasonDNS, "", flowKey{proto: protoUDP, near: netip.AddrPortFrom(p.n.guest, 0), far: p.n.dnsAddr()})
		return nil
	}
	if v := p.n.decideName(q.name); !v.allow {
		p.n.stats.dropped[v.reason].Add(1)
		p.n.report.denied(v.reason, v.detail, flowKey{proto: protoUDP, near: netip.AddrPortFrom(p.n.guest, 0), far: p.n.dnsAddr()}, q.name)
		p.tell(&q, &answer{rcode: dnsmessage.RCodeRefused})
		return emptyReply(&q, dnsmessage.RCodeRefused)
	}
	reply, a, err := p.ask(ctx, network, query, &q)
	if ctx.Err() != nil {
		return nil
	}
	if err != nil {
		a.rcode = dnsmessage.RCodeServerFailure
		reply = emptyReply(&q, a.rcode)
	}
	p.n.keepAnswer(&q, reply)
	for i, addr := range a.addrs {
		if addr.Is4() {
			p.n.names.learn(q.name, addr, time.Duration(a.ttls[i])*time.Second, time.Now())
		}
	}
	p.tell(&q, &a)
	return reply
}

// ask tries the host's name servers in turn, twice.
func (p *dnsProxy) ask(ctx context.Context, network string, query []byte, q *question) ([]byte, answer, error) {
	if stage := p.n.cfg.Stage; stage != nil {
		return stage.resolve(q)
	}
	err := errNoServer
	for range 2 {
		for _, server := range p.n.cfg.Resolvers {
			var reply []byte
			var a answer
			if reply, a, err = p.askOne(ctx, network, server, query, q); err == nil {
				return reply, a, nil
			}
			if ctx.Err() != nil {
				return nil, answer{}, ctx.Err()
			}
		}
	}
	return nil, answer{}, err
}

// askOne asks one name server, under a fresh identifier and from a fresh port.
func (p *dnsProxy) askOne(ctx context.Context, network string, server netip.AddrPort, query []byte, q *question) ([]byte, answer, error) {
	ctx, cancel := context.WithTimeout(ctx, askTimeout)
	defer cancel()
	conn, err := p.n.cfg.Dial(ctx, network, server)
	if err != nil {
		return nil, answer{}, err
	}
	defer conn.Close()
	defer context.AfterFunc(ctx, func() { conn.Close() })()
	ours := append([]byte(nil), query...)
	rand.Read(ours[:2])
	if err := sendDNS(conn, network, ours); err != nil {
		return nil, answer{}, err
	}
	for range 8 { // answers to somebody else's question
		reply, err := receiveDNS(conn, network)
		if err != nil {
			return nil, answer{}, err
		}
		if len(reply) < 12 || [2]byte(reply) != [2]byte(ours) {
			continue
		}
		if a, err := parseReply(reply, q); err == nil {
			binary.BigEndian.PutUint16(reply, q.id)
			return reply, a, nil
		}
	}
	return nil, answer{}, errDNSReply
}

func sendDNS(conn net.Conn, network string, b []byte) error {
	if network == "tcp" {
		b = append(binary.BigEndian.AppendUint16(nil, uint16(len(b))), b...)
	}
	_, err := conn.Write(b)
	return err
}

func receiveDNS(conn net.Conn, network string) ([]byte, error) {
	if network == "tcp" {
		return readDNS(conn, maxReply)
	}
	buf := buffers.Get().(*[]byte)
	defer buffers.Put(buf)
	n, err := conn.Read(*buf)
	return append([]byte(nil), (*buf)[:n]...), err
}

// emptyReply builds a reply without answers.
func emptyReply(q *question, code dnsmessage.RCode) []byte {
	b := dnsmessage.NewBuilder(nil, dnsmessage.Header{ID: q.id, Response: true, RecursionDesired: true, RecursionAvailable: true, RCode: code})
	if b.StartQuestions() != nil || b.Question(q.q) != nil {
		return nil
	}
	reply, err := b.Finish()
	if err != nil {
		return nil
	}
	return reply
}

// tell reports a question and what came of it.
func (p *dnsProxy) tell(q *question, a *answer) {
	answers := []string{}
	for _, alias := range a.aliases[:min(len(a.aliases), 8)] {
		answers = append(answers, event.Text([]byte(alias)))
	}
	for _, addr := range a.addrs[:min(len(a.addrs), 16)] {
		answers = append(answers, addr.String())
	}
	p.n.report.dns(event.Fields{
		"name": event.Text([]byte(q.name)), "type": strings.TrimPrefix(q.q.Type.String(), "Type"),
		"rcode": rcodeName(a.rcode), "answers": answers,
	})
}

func rcodeName(c dnsmessage.RCode) string {
	names := []string{"NOERROR", "FORMERR", "SERVFAIL", "NXDOMAIN", "NOTIMP", "REFUSED"}
	if int(c) < len(names) {
		return names[c]
	}
	return fmt.Sprintf("RCODE%d", c)
}
