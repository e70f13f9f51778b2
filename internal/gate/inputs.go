package gate

import (
	"context"
	"net/netip"
	"os"

	"vigia/internal/inputs"
	"vigia/internal/link"
	"vigia/internal/network"
)

// keep begins to keep what enters. A gate that does so already goes on as it is.
func (g *Gate) keep(n *network.Network, r link.Request) error {
	g.mu.Lock()
	defer g.mu.Unlock()
	var k link.KeepInputs
	err := r.Decode(&k)
	if err != nil || g.log != nil {
		closeFiles(r.Files)
		return err
	}
	if g.log, err = inputs.Open(r.Files, inputs.Bounds{Bytes: k.Bytes, Age: k.Age}); err != nil {
		closeFiles(r.Files)
		return err
	}
	g.log.Add(inputs.Record{Kind: inputs.Began, Flow: uint64(k.Run.UnixNano())})
	n.KeepInputs(Kept(g.log))
	return nil
}

// Kept writes what a network tells of its inputs into a log.
func Kept(log *inputs.Log) network.Inputs { return kept{log} }

type kept struct{ log *inputs.Log }

func (k kept) Flow(proto uint8, in bool, near, far, client netip.AddrPort) uint64 {
	id := k.log.NextFlow()
	ends := inputs.Ends{Protocol: proto, In: in, Near: near, Far: far, Client: client}
	k.log.Add(inputs.Record{Kind: inputs.Flowed, Flow: id, Data: ends.Append(nil)})
	return id
}

func (k kept) Opened(flow uint64) { k.log.Add(inputs.Record{Kind: inputs.Opened, Flow: flow}) }

func (k kept) Data(flow uint64, sent int64, b []byte) {
	k.log.Add(inputs.Record{Kind: inputs.Data, Flow: flow, Sent: sent, Data: b})
}

func (k kept) Closed(flow uint64, sent int64, reset bool) {
	kind := inputs.Closed
	if reset {
		kind = inputs.Reset
	}
	k.log.Add(inputs.Record{Kind: kind, Flow: flow, Sent: sent})
}

func (k kept) Ended(flow uint64, why string) {
	k.log.Add(inputs.Record{Kind: inputs.Ended, Flow: flow, Data: []byte(why)})
}

func (k kept) Answer(name string, qtype, class uint16, reply []byte) {
	if len(name) <= 255 && len(reply) <= inputs.MaxData-512 { // what is longer than a datagram is left out
		k.log.Add(inputs.Record{Kind: inputs.Answered, Data: inputs.Answer{Name: name, Type: qtype, Class: class, Reply: reply}.Append(nil)})
	}
}

// set is what a stage is furnished with.
type set struct {
	script *inputs.Script
	stage  *network.Stage
}

// newSet reads the logs of another machine. The guard's is read for its pace only.
func newSet(p link.Play, files []*os.File) *set {
	s := &set{script: inputs.OpenScript(files[:p.Gate], p.From)}
	other := inputs.OpenScript(files[p.Gate:], p.From)
	pace := inputs.NewPace(p.From, p.Wait, s.script, other)
	var flows []*network.StageFlow
	for _, f := range s.script.Flows {
		flows = append(flows, staged(f))
	}
	s.stage = network.NewStage(flows, pace.At)
	for _, a := range s.script.Answers {
		s.stage.Answer(a.Name, a.Type, a.Class, a.Reply)
	}
	return s
}

func staged(f *inputs.Flow) *network.StageFlow {
	out := &network.StageFlow{ID: f.ID, Protocol: f.Protocol, In: f.In, Near: f.Near, Far: f.Far, Client: f.Client, Began: f.Began, Opened: f.Opened, Over: f.Over}
	for _, p := range f.Parts {
		out.Parts = append(out.Parts, network.StagePart{Time: p.Time, Sent: p.Sent, Data: p.Data, Closed: p.End == inputs.PartClosed, Reset: p.End == inputs.PartReset})
	}
	return out
}

// play gives all of it. A gate without a set has nothing to give.
func (s *set) play(ctx context.Context, n *network.Network) link.Played {
	if s == nil {
		return link.Played{}
	}
	r := n.Play(ctx)
	return link.Played{FlowsIn: r.In, FlowsOut: r.Out, Names: r.Names, Bytes: r.Bytes, Late: r.Late, Refused: r.Refused, Unasked: r.Unasked,
		Older: s.script.Older, OlderBytes: s.script.OlderBytes, Until: s.script.Until, Gaps: s.script.Gaps}
}
