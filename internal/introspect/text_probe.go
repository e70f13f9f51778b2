package introspect

import (
	"cmp"
	"encoding/binary"
	"slices"
)

// armed is a place in the code where the kernel has a probe of its own: it may hold a breakpoint, or, once the kernel has
// made that faster, a jump to instructions that it keeps for this probe.
type armed struct {
	at     uint64
	detour uint64 // 0: none
}

const (
	opJumpNear = 0xe9
	jumpLen    = 5
)

// probes lists the kernel's own probes, by address. Whose handlers they have is another check's question (kprobes): what is
// in no list of the kernel's is not explained by this.
func (t *textCheck) probes() (list []armed) {
	c := &control{Guest: t.Guest, code: t.code}
	table, err := c.symbolAddr("kprobe_table")
	r := c.resolver()
	link, addr := r.field("kprobe", "hlist"), r.field("kprobe", "addr")
	insn := r.optional("optimized_kprobe", "optinsn.insn")
	pre := r.field("kprobe", "pre_handler")
	if err != nil || r.err != nil {
		return nil
	}
	for i := range uint64(kprobeBuckets) {
		_ = c.hashed(table+i*8, func(node uint64) error {
			if len(list) == maxProbes {
				return ErrEndless
			}
			read := reader{s: t.space}
			p := armed{at: read.u64(node - link + addr)}
			if insn != noField && read.u64(node-link+pre) == c.known("aggr_pre_handler") { // only these are more than a struct kprobe
				p.detour = read.u64(node - link + insn)
			}
			if read.err == nil {
				list = append(list, p)
			}
			return nil
		})
	}
	slices.SortFunc(list, func(a, b armed) int { return cmp.Compare(a.at, b.at) })
	return list
}

// probed expects what the kernel's probes have written into the code from run on, and reports whether there is any. Such code is not
// remembered as it must be: the probe may go and what it wrote stay.
func (t *textCheck) probed(run uint64, got, want []byte) (any bool) {
	first, _ := slices.BinarySearchFunc(t.armed, run, func(p armed, va uint64) int { return cmp.Compare(p.at, va) })
	for _, p := range t.armed[first:] {
		off := p.at - run
		if off >= uint64(len(got)) {
			break
		}
		if got[off] == opInt3 {
			want[off], any = opInt3, true
		} else if got[off] != opJumpNear {
			continue
		}
		if uint64(len(got))-off < jumpLen || p.detour == 0 || t.code.at(p.detour).owner != ownerMade {
			continue
		}
		// The kernel leaves the jump's target behind the breakpoint where it switches a probe off and on again.
		jump := got[off:][:jumpLen]
		if p.at+jumpLen+uint64(int64(int32(binary.LittleEndian.Uint32(jump[1:])))) == p.detour {
			copy(want[off:], jump)
			any = true
		}
	}
	return any
}
