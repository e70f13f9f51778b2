package introspect

import (
	"encoding/binary"
	"fmt"
)

// The tables in which the kernel looks sockets up. Arrays of chains: a chain is a list that ends with 0, or, where readers may be
// carried to another chain by a change (hlist_nulls), with an odd number.
//
//	tcp     inet_hashinfo: ehash (connections, and the small stand-ins of closing and opening ones), lhash2 (listeners)
//	udp     udp_table.hash, one for all network namespaces up to 6.1, then one for each that wants its own
//	raw     raw_v4_hashinfo, raw_v6_hashinfo
//	unix    net->unx.table.buckets (since 6.0)
//	packet  net->packet.sklist
//
// Sources: net/ipv4/inet_hashtables.c, udp.c, raw.c, net/unix/af_unix.c, net/packet/af_packet.c.
type tableLayout struct {
	node, state, family                 uint64 // of sock_common
	namespaces, link                    uint64 // link address of the list of struct net; its field
	hashinfo, ownTCP                    uint64 // link address; of net
	ehash, ehashMask, lhash, lhashMask  uint64
	ehashSize, chain, lhashSize, listen uint64
	udp, udplite, ownUDP                uint64
	udpHash, udpMask, udpSize, udpHead  uint64
	raw                                 [2]uint64
	rawHead, rawCount                   uint64
	unixBuckets, packetList             uint64 // of net

	errTCP, errUDP, errRaw, errUnix, errPacket error
}

const (
	maxBuckets  = 1 << 22
	maxNets     = 1 << 14
	unixBuckets = 512 // UNIX_HASH_SIZE
	bucketChunk = 4096
)

func (g *Guest) tableLayout() *tableLayout {
	if g.tables != nil {
		return g.tables
	}
	l := &tableLayout{}
	part := func(err *error, f func(r *resolver)) {
		r := &resolver{p: g.profile}
		l.node, l.state = r.field("sock_common", "skc_node"), r.field("sock_common", "skc_state")
		l.family = r.field("sock_common", "skc_family")
		f(r)
		*err = r.err
	}
	o := &resolver{p: g.profile}
	part(&l.errTCP, func(r *resolver) {
		l.hashinfo = r.symbol("tcp_hashinfo")
		l.ownTCP = o.optional("net", "ipv4.tcp_death_row.hashinfo")
		l.ehash, l.ehashMask = r.field("inet_hashinfo", "ehash"), r.field("inet_hashinfo", "ehash_mask")
		l.lhash, l.lhashMask = r.field("inet_hashinfo", "lhash2"), r.field("inet_hashinfo", "lhash2_mask")
		l.ehashSize, l.chain = r.size("inet_ehash_bucket"), r.field("inet_ehash_bucket", "chain")
		l.lhashSize, l.listen = r.size("inet_listen_hashbucket"), r.field("inet_listen_hashbucket", "nulls_head")
	})
	part(&l.errUDP, func(r *resolver) {
		l.udp, l.ownUDP = r.symbol("udp_table"), o.optional("net", "ipv4.udp_table")
		l.udplite, _ = g.profile.Symbol("udplite_table")
		l.udpHash, l.udpMask = r.field("udp_table", "hash"), r.field("udp_table", "mask")
		l.udpSize, l.udpHead = r.size("udp_hslot"), r.field("udp_hslot", "head")
	})
	part(&l.errRaw, func(r *resolver) {
		l.raw[0] = r.symbol("raw_v4_hashinfo")
		l.raw[1], _ = g.profile.Symbol("raw_v6_hashinfo")
		f, err := g.profile.Field("raw_hashinfo", "ht")
		if err != nil {
			r.err = err
			return
		}
		l.rawHead, l.rawCount = f.Offset, min(f.Count, 1<<16)
	})
	nets := func(r *resolver) {
		l.namespaces, l.link = r.symbol("net_namespace_list"), r.field("net", "list")
	}
	part(&l.errUnix, func(r *resolver) { nets(r); l.unixBuckets = r.field("net", "unx.table.buckets") })
	part(&l.errPacket, func(r *resolver) { nets(r); l.packetList = r.field("net", "packet.sklist") })
	g.tables = l
	g.profile.Trim()
	return l
}

// missingTables says of which sorts of sockets a kernel's tables can't be read.
func (l *tableLayout) missing() (out []string) {
	for _, t := range []struct {
		name string
		err  error
	}{{"tcp", l.errTCP}, {"udp", l.errUDP}, {"raw", l.errRaw}, {"unix", l.errUnix}, {"packet", l.errPacket}} {
		if t.err != nil {
			out = append(out, "sockets of "+t.name+" that no process holds: "+t.err.Error())
		}
	}
	return out
}

// hashedSockets visits every socket in the kernel's tables, each once; full is false of TCP's small stand-ins. What a kernel
// lacks is left out: tableLayout.missing names it.
func (g *Guest) hashedSockets(visit func(sk uint64, full bool) error) error {
	w := &tableWalk{g: g, l: g.tableLayout(), seen: map[uint64]bool{}, visit: visit}
	nets, err := w.networks()
	if err != nil {
		return err
	}
	for _, step := range []func([]uint64) error{w.tcp, w.udp, w.rawSockets, w.ofNets} {
		if err := step(nets); err != nil {
			return err
		}
	}
	return nil
}

type tableWalk struct {
	g     *Guest
	l     *tableLayout
	seen  map[uint64]bool // tables, then sockets
	visit func(sk uint64, full bool) error
}

// networks lists the network namespaces.
func (w *tableWalk) networks() (list []uint64, err error) {
	if w.l.namespaces == 0 {
		return nil, nil
	}
	err = w.g.walk(w.l.namespaces+w.g.boot.Slide, func(node uint64) error {
		if len(list) == maxNets {
			return fmt.Errorf("%w: more than %d network namespaces", ErrEndless, maxNets)
		}
		list = append(list, node-w.l.link)
		return nil
	})
	return list, err
}

// own gathers a global table and those that namespaces have for themselves.
func (w *tableWalk) own(global []uint64, nets []uint64, field uint64) (tables []uint64) {
	add := func(at uint64) {
		if at != 0 && !w.seen[at] {
			w.seen[at] = true
			tables = append(tables, at)
		}
	}
	for _, at := range global {
		if at != 0 {
			add(at + w.g.boot.Slide)
		}
	}
	if field != noField {
		for _, net := range nets {
			if at, err := w.g.space.U64(net + field); err == nil {
				add(at)
			}
		}
	}
	return tables
}

func (w *tableWalk) tcp(nets []uint64) error {
	l := w.l
	if l.errTCP != nil {
		return nil
	}
	for _, info := range w.own([]uint64{l.hashinfo}, nets, l.ownTCP) {
		r := reader{s: w.g.space}
		ehash, ehashMask := r.u64(info+l.ehash), r.u32(info+l.ehashMask)
		lhash, lhashMask := r.u64(info+l.lhash), r.u32(info+l.lhashMask)
		if r.err != nil {
			return ErrTorn
		}
		if err := w.buckets(ehash, uint64(ehashMask)+1, l.ehashSize, l.chain); err != nil {
			return err
		}
		if err := w.buckets(lhash, uint64(lhashMask)+1, l.lhashSize, l.listen); err != nil {
			return err
		}
	}
	return nil
}

func (w *tableWalk) udp(nets []uint64) error {
	l := w.l
	if l.errUDP != nil {
		return nil
	}
	for _, table := range w.own([]uint64{l.udp, l.udplite}, nets, l.ownUDP) {
		r := reader{s: w.g.space}
		hash, mask := r.u64(table+l.udpHash), r.u32(table+l.udpMask)
		if r.err != nil {
			return ErrTorn
		}
		if hash == 0 { // a protocol that is not in use
			continue
		}
		if err := w.buckets(hash, uint64(mask)+1, l.udpSize, l.udpHead); err != nil {
			return err
		}
	}
	return nil
}

func (w *tableWalk) rawSockets([]uint64) error {
	if w.l.errRaw != nil {
		return nil
	}
	for _, at := range w.l.raw {
		if at == 0 {
			continue
		}
		if err := w.buckets(at+w.g.boot.Slide+w.l.rawHead, w.l.rawCount, 8, 0); err != nil {
			return err
		}
	}
	return nil
}

// ofNets visits the unix and packet sockets of each namespace.
func (w *tableWalk) ofNets(nets []uint64) error {
	for _, net := range nets {
		if w.l.errUnix == nil {
			table, err := w.g.space.U64(net + w.l.unixBuckets)
			if err != nil {
				return ErrTorn
			}
			if table != 0 {
				if err := w.buckets(table, unixBuckets, 8, 0); err != nil {
					return err
				}
			}
		}
		if w.l.errPacket == nil {
			if err := w.buckets(net+w.l.packetList, 1, 8, 0); err != nil {
				return err
			}
		}
	}
	return nil
}

// buckets visits the chains of an array: count elements of size bytes, with the chain's head at offset head in each.
func (w *tableWalk) buckets(array, count, size, head uint64) error {
	if count > maxBuckets || size == 0 || size > 256 || head+8 > size {
		return fmt.Errorf("%w: table of %d buckets of %d bytes", ErrEndless, count, size)
	}
	var chunk [bucketChunk]byte
	each := bucketChunk / size
	for i := uint64(0); i < count; i += each {
		part := chunk[:min(each, count-i)*size]
		at := array + i*size
		if w.g.space.Read(at, part) != nil {
			return ErrTorn
		}
		for off := head; off < uint64(len(part)); off += size {
			if first := binary.LittleEndian.Uint64(part[off:]); first != 0 && first&1 == 0 {
				if err := steady(func() error { return w.chain(at + off) }); err != nil {
					return err
				}
			}
		}
	}
	return nil
}

// chain visits the sockets of one chain. Each node points back at the pointer that leads to it; where it does not, the chain was
// caught in a change.
func (w *tableWalk) chain(link uint64) error {
	for range maxNodes {
		node, err := w.g.space.U64(link)
		if err != nil {
			return ErrTorn
		}
		if node == 0 || node&1 != 0 {
			return nil
		}
		back, err := w.g.space.U64(node + 8)
		if err != nil || back != link {
			return w.g.torn()
		}
		if err := w.socket(node - w.l.node); err != nil {
			return err
		}
		link = node
	}
	return fmt.Errorf("%w: more than %d elements", ErrTorn, maxNodes)
}

// TCP's states in which a sock is a small stand-in, and what those stand for.
const (
	stateSynRecv    = 3
	stateFinWait2   = 5
	stateTimeWait   = 6
	stateNewSynRecv = 12
)

func (w *tableWalk) socket(sk uint64) error {
	if w.seen[sk] { // in another chain too, or again
		return nil
	}
	r := reader{s: w.g.space}
	state, family := r.u8(sk+w.l.state), r.u16(sk+w.l.family)
	if r.err != nil {
		return ErrTorn
	}
	w.seen[sk] = true
	inet := family == familyIPv4 || family == familyIPv6
	return w.visit(sk, !inet || state != stateTimeWait && state != stateNewSynRecv)
}
