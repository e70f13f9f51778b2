package network

import (
	"errors"
	"io"
	"net"
	"time"

	"gvisor.dev/gvisor/pkg/buffer"
	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/stack"
	"gvisor.dev/gvisor/pkg/tcpip/stack/gro"
)

// readFrames is the frame loop: it sees every frame of the guest first, one after the other.
func (n *Network) readFrames(conn net.Conn) error {
	r := newFrameReader(conn)
	var merge gro.GRO
	merge.Init(true)
	merge.Dispatcher = n.link
	for {
		frame, err := r.next()
		if err != nil {
			if errors.Is(err, io.EOF) || errors.Is(err, net.ErrClosed) {
				return nil
			}
			return err
		}
		n.frame(frame, &merge)
		if !r.ready() {
			flush(&merge)
		}
	}
}

// flush empties all of a GRO. Its Flush takes one packet from each of its buckets, which hold eight at most.
func flush(merge *gro.GRO) {
	for range 8 {
		merge.Flush()
	}
}

// frame deals with one frame from the guest. Quarantine comes before anything reads it.
func (n *Network) frame(frame []byte, merge *gro.GRO) {
	n.stats.framesIn.Add(1)
	n.stats.bytesIn.Add(int64(len(frame)))
	if n.taps.active() {
		n.taps.frame(frame, fromGuest)
	}
	if n.quarantine.on.Load() {
		n.dropQuarantined(frame)
		return
	}
	p := n.wire.classify(frame)
	switch p.class {
	case classDrop:
		n.deny(p.reason, "", p.flow())
	case classARP:
		if answer := n.wire.answerARP(p.payload); answer != nil {
			n.out.offer(answer)
		}
	case classDHCP:
		n.dhcp(&p)
	case classPing:
		n.ping(&p)
	case classStack:
		n.deliver(p.payload, merge)
	}
}

func (n *Network) dropQuarantined(frame []byte) {
	n.quarantine.dropped(n.cfg.OnFirstDrop)
	n.deny(reasonQuarantine, "", flowKey{})
}

// deliver hands an IPv4 packet to the stack. Segments of one TCP flow that came together go up together.
func (n *Network) deliver(b []byte, merge *gro.GRO) {
	view := buffer.NewViewSize(len(b))
	copy(view.AsSlice(), b)
	pkt := stack.NewPacketBuffer(stack.PacketBufferOptions{Payload: buffer.MakeWithView(view)})
	pkt.NetworkProtocolNumber = header.IPv4ProtocolNumber
	pkt.RXChecksumValidated = true // a unix socket does not flip bits
	merge.Enqueue(pkt)
	pkt.DecRef()
}

// deny counts and reports a refusal.
func (n *Network) deny(r reason, detail string, k flowKey) {
	n.stats.dropped[r].Add(1)
	if r == reasonIPv6 || r == reasonQuarantine || r == reasonProtocol || r == reasonMulticast {
		k = flowKey{proto: k.proto} // one report for all of it: noise of every booting guest, or a flood
	}
	name := ""
	if k.far.IsValid() {
		name = n.names.nameOf(k.far.Addr(), time.Now())
	}
	n.report.denied(r, detail, k, name)
}
