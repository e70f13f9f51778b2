package network

import (
	"net/netip"
)

// Inputs is told of all that enters the machine from the network, in order. Its methods are called from many goroutines; they must not
// block, and keep no slice they are given.
type Inputs interface {
	// Flow begins a flow and returns its number, which is not 0. client is who really called, where far is a stand-in.
	Flow(proto uint8, in bool, near, far, client netip.AddrPort) uint64
	// Opened says that the other end is there.
	Opened(flow uint64)
	// Data is what came in, after the guest had sent so much: bytes, or datagrams.
	Data(flow uint64, sent int64, b []byte)
	// Closed says that the outside has sent all, or has cut the flow.
	Closed(flow uint64, sent int64, reset bool)
	Ended(flow uint64, why string)
	// Answer is what a name server answered.
	Answer(name string, qtype, class uint16, reply []byte)
}

// KeepInputs tells in of all flows that begin from now on, and of what comes in on them. A nil one ends that.
func (n *Network) KeepInputs(in Inputs) {
	if in == nil {
		n.inputs.Store(nil)
		return
	}
	n.inputs.Store(&in)
}

// keeping is one flow's; nil where it began before anybody asked.
type keeping struct {
	in Inputs
	id uint64
}

func (n *Network) keepFlow(f *flow) {
	if in := n.inputs.Load(); in != nil && !f.internal {
		f.keep.Store(&keeping{*in, (*in).Flow(f.key.proto, f.key.in, f.key.near, f.key.far, f.client)})
	}
}

func (k *keeping) opened() {
	if k != nil {
		k.in.Opened(k.id)
	}
}

func (k *keeping) data(sent int64, b []byte) {
	if k != nil {
		k.in.Data(k.id, sent, b)
	}
}

func (k *keeping) closed(sent int64, reset bool) {
	if k != nil {
		k.in.Closed(k.id, sent, reset)
	}
}

func (k *keeping) ended(why ending) {
	if k != nil {
		k.in.Ended(k.id, string(why))
	}
}

func (n *Network) keepAnswer(q *question, reply []byte) {
	if in := n.inputs.Load(); in != nil && reply != nil {
		(*in).Answer(q.name, uint16(q.q.Type), uint16(q.q.Class), reply)
	}
}
