package ext4

import "slices"

const (
	parentChunk = 1024
	maxLinked   = 1 << 16 // inodes with several names that are followed
)

// parents maps an inode to the directories that name it: one in the table, the rest of a file with several hard links
// aside. The same directory may name it twice.
type parents struct {
	first  [][]uint32
	more   map[uint32][]uint32
	chunks int
	limit  int // chunks
	full   bool
}

func newParents(inodes uint32, limit int) *parents {
	return &parents{first: make([][]uint32, inodes/parentChunk+1), more: map[uint32][]uint32{}, limit: limit}
}

func (p *parents) slot(inode uint32, grow bool) *uint32 {
	c := inode / parentChunk
	if int(c) >= len(p.first) {
		return nil
	}
	if p.first[c] == nil {
		if !grow {
			return nil
		}
		if p.chunks >= p.limit {
			p.full = true
			return nil
		}
		p.first[c] = make([]uint32, parentChunk)
		p.chunks++
	}
	return &p.first[c][inode%parentChunk]
}

func (p *parents) add(inode, dir uint32) {
	s := p.slot(inode, true)
	switch {
	case s == nil:
	case *s == 0:
		*s = dir
	case len(p.more) >= maxLinked || len(p.more[inode]) >= 256:
		p.full = true
	default:
		p.more[inode] = append(p.more[inode], dir)
	}
}

func (p *parents) remove(inode, dir uint32) {
	s := p.slot(inode, false)
	if s == nil {
		return
	}
	rest := p.more[inode]
	if i := slices.Index(rest, dir); i >= 0 {
		rest = slices.Delete(rest, i, i+1)
	} else if *s == dir {
		*s = 0
		if len(rest) > 0 {
			*s, rest = rest[0], rest[1:]
		}
	}
	if len(rest) == 0 {
		delete(p.more, inode)
		return
	}
	p.more[inode] = rest
}

// of lists the directories that name inode.
func (p *parents) of(inode uint32) []uint32 {
	s := p.slot(inode, false)
	if s == nil || *s == 0 {
		return nil
	}
	return append([]uint32{*s}, p.more[inode]...)
}

func (p *parents) one(inode uint32) uint32 {
	if s := p.slot(inode, false); s != nil {
		return *s
	}
	return 0
}

func (p *parents) bytes() int64 {
	return int64(len(p.first))*24 + int64(p.chunks)*parentChunk*4 + int64(len(p.more))*96
}
