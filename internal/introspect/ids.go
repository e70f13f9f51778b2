package introspect

import "encoding/binary"

// Capabilities are a task's sets of them, as bits by the kernel's numbers (include/uapi/linux/capability.h).
type Capabilities struct {
	Effective   uint64 `json:"effective"`
	Permitted   uint64 `json:"permitted"`
	Inheritable uint64 `json:"inheritable"`
	Bounding    uint64 `json:"bounding"`
	Ambient     uint64 `json:"ambient"`
}

// maxGroups of a process are listed. The kernel allows 65,536; a list that is longer is said to be cut by "groups" in Unknown.
const maxGroups = 1024

type idLayout struct {
	uid, euid, suid, fsuid, gid, egid, sgid, fsgid       uint64
	effective, permitted, inheritable, bounding, ambient uint64
	groups, userNS                                       uint64
	count, list                                          uint64 // of group_info
	errCaps, errGroups                                   error
}

func newIDLayout(r *resolver) idLayout {
	var c idLayout
	for _, f := range []struct {
		at   *uint64
		name string
	}{{&c.uid, "uid"}, {&c.euid, "euid"}, {&c.suid, "suid"}, {&c.fsuid, "fsuid"}, {&c.gid, "gid"}, {&c.egid, "egid"}, {&c.sgid, "sgid"}, {&c.fsgid, "fsgid"}} {
		*f.at = r.field("cred", f.name)
	}
	// A set was two words of 32 bits up to 6.2, and is one of 64 since: the same bytes.
	caps := &resolver{p: r.p}
	c.effective, c.permitted = caps.field("cred", "cap_effective"), caps.field("cred", "cap_permitted")
	c.inheritable, c.bounding = caps.field("cred", "cap_inheritable"), caps.field("cred", "cap_bset")
	c.ambient = caps.field("cred", "cap_ambient")
	groups := &resolver{p: r.p}
	c.groups = groups.field("cred", "group_info")
	c.count, c.list = groups.field("group_info", "ngroups"), groups.field("group_info", "gid")
	c.errCaps, c.errGroups = caps.err, groups.err
	c.userNS = r.optional("cred", "user_ns")
	return c
}

// credentials fills in a task's ids, capabilities and groups from its cred.
func (g *Guest) credentials(p *Process, cred uint64) {
	c := &g.layout.cred
	r := &reader{s: g.space}
	p.UID, p.EUID, p.SUID, p.FSUID = r.u32(cred+c.uid), r.u32(cred+c.euid), r.u32(cred+c.suid), r.u32(cred+c.fsuid)
	p.GID, p.EGID, p.SGID, p.FSGID = r.u32(cred+c.gid), r.u32(cred+c.egid), r.u32(cred+c.sgid), r.u32(cred+c.fsgid)
	if r.err != nil {
		p.Unknown = append(p.Unknown, "uid", "capabilities", "groups")
		return
	}
	if c.errCaps == nil {
		p.Capabilities = Capabilities{r.u64(cred + c.effective), r.u64(cred + c.permitted), r.u64(cred + c.inheritable),
			r.u64(cred + c.bounding), r.u64(cred + c.ambient)}
	}
	if c.errCaps != nil || r.err != nil {
		p.Unknown = append(p.Unknown, "capabilities")
	}
	whole := false
	if p.Groups, whole = g.groups(cred); !whole {
		p.Unknown = append(p.Unknown, "groups")
	}
}

// groups reads the supplementary groups. One group_info is shared by all that were forked from one login.
func (g *Guest) groups(cred uint64) (list []uint32, whole bool) {
	c := &g.layout.cred
	if c.errGroups != nil {
		return nil, false
	}
	r := &reader{s: g.space}
	info := r.u64(cred + c.groups)
	n := int(int32(r.u32(info + c.count)))
	if r.err != nil || n < 0 {
		return nil, false
	}
	if n == 0 {
		return nil, true
	}
	keep := min(n, maxGroups)
	raw := make([]byte, 4*keep)
	if r.bytes(info+c.list, raw); r.err != nil {
		return nil, false
	}
	list = make([]uint32, keep)
	for i := range list {
		list[i] = binary.LittleEndian.Uint32(raw[4*i:])
	}
	return list, keep == n
}
