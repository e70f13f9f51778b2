package network

import (
	"sync/atomic"
	"time"
)

// reason names why a frame or flow was refused. The names appear in events and in Stats.
type reason int

const (
	allowed reason = iota
	reasonQuarantine
	reasonRule
	reasonNoRule
	reasonHost
	reasonLinkLocal
	reasonMulticast
	reasonNeighbour
	reasonReserved
	reasonSpoofedMAC
	reasonSpoofedIP
	reasonIPv6
	reasonProtocol
	reasonMalformed
	reasonFragment
	reasonICMP
	reasonNoPing
	reasonTooManyFlows
	reasonTooManyOpening
	reasonFlood
	reasonDNS
	reasonUnreachable
	reasonUnrecorded
	reasons
)

var reasonNames = [reasons]string{
	reasonQuarantine:     "quarantine",
	reasonRule:           "rule",
	reasonNoRule:         "nothing allows it",
	reasonHost:           "an address of the host",
	reasonLinkLocal:      "link-local or cloud metadata",
	reasonMulticast:      "multicast or broadcast",
	reasonNeighbour:      "no such neighbour",
	reasonReserved:       "not an address of the internet",
	reasonSpoofedMAC:     "not the machine's MAC address",
	reasonSpoofedIP:      "not the machine's IP address",
	reasonIPv6:           "ipv6",
	reasonProtocol:       "protocol",
	reasonMalformed:      "malformed",
	reasonFragment:       "fragment",
	reasonICMP:           "icmp",
	reasonNoPing:         "host allows no unprivileged ping",
	reasonTooManyFlows:   "too many flows",
	reasonTooManyOpening: "too many flows being opened",
	reasonFlood:          "flood",
	reasonDNS:            "malformed dns",
	reasonUnreachable:    "the host has no way there",
	reasonUnrecorded:     "not in what is given again",
}

func (r reason) String() string { return reasonNames[r] }

// counters are touched on every frame: atomics, no lock.
type counters struct {
	framesIn, bytesIn   atomic.Int64 // from the guest
	framesOut, bytesOut atomic.Int64 // to the guest
	overflow            atomic.Int64 // frames to the guest for which there was no room
	dropped             [reasons]atomic.Int64
	flows               atomic.Int64
}

// Stats is what a network has done so far. In and out are seen from the guest: out is what it sent.
type Stats struct {
	FramesOut, BytesOut int64
	FramesIn, BytesIn   int64
	Dropped             map[string]int64 // frames or flows, by reason
	Overflow            int64            // frames for the guest that found its queue full
	Flows               int64            // ever
	Open                int              // now
	EventsLost          int64            // counted in vigia.lost
	Attached            bool
	Quarantined         bool
	QuarantinedAt       time.Time // from then on no frame passed
	FirstDrop           time.Time // the first frame that this quarantine dropped; zero: none yet
	Capture             CaptureStats
}

// Stats reads the counters.
func (n *Network) Stats() Stats {
	s := Stats{
		FramesOut: n.stats.framesIn.Load(), BytesOut: n.stats.bytesIn.Load(),
		FramesIn: n.stats.framesOut.Load(), BytesIn: n.stats.bytesOut.Load(),
		Dropped:  map[string]int64{},
		Overflow: n.stats.overflow.Load(),
		Flows:    n.stats.flows.Load(), Open: n.flows.len(),
		EventsLost:  n.report.lostTotal(),
		Quarantined: n.quarantine.on.Load(),
		Capture:     n.taps.stats(),
	}
	s.QuarantinedAt, s.FirstDrop = n.quarantine.times()
	for r := range reasons {
		if c := n.stats.dropped[r].Load(); c > 0 {
			s.Dropped[r.String()] = c
		}
	}
	n.mu.Lock()
	s.Attached = n.conn != nil
	n.mu.Unlock()
	return s
}
