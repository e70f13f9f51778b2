package ext4

import (
	"io/fs"
	"time"
)

const (
	modeType    = 0xF000
	modeFIFO    = 0x1000
	modeChar    = 0x2000
	modeDir     = 0x4000
	modeBlock   = 0x6000
	modeRegular = 0x8000
	modeSymlink = 0xA000
	modeSocket  = 0xC000

	flagExtents = 0x80000
	flagEncrypt = 0x800
	flagEAInode = 0x200000
	flagInline  = 0x10000000

	iBlockOffset = 0x28
	iBlockSize   = 60
)

// inode is the part of struct ext4_inode that matters here. raw is the whole inode and must not be changed.
type inode struct {
	number     uint32
	mode       uint16
	links      uint16
	uid, gid   uint32
	size       int64
	flags      uint32
	dtime      uint32
	generation uint32
	mtime      time.Time
	raw        []byte
}

func parseInode(number uint32, b []byte) *inode {
	i := &inode{
		number: number, raw: b,
		mode: le.Uint16(b), links: le.Uint16(b[0x1A:]), flags: le.Uint32(b[0x20:]),
		uid:   uint32(le.Uint16(b[2:])) | uint32(le.Uint16(b[0x78:]))<<16,
		gid:   uint32(le.Uint16(b[0x18:])) | uint32(le.Uint16(b[0x7A:]))<<16,
		dtime: le.Uint32(b[0x14:]), generation: le.Uint32(b[0x64:]),
	}
	size := uint64(le.Uint32(b[4:]))
	if i.isRegular() || i.isDir() {
		size |= uint64(le.Uint32(b[0x6C:])) << 32
	}
	i.size = int64(size & (1<<63 - 1))
	sec, nsec := int64(int32(le.Uint32(b[0x10:]))), int64(0)
	if len(b) > 128 && le.Uint16(b[0x80:]) >= 12 && len(b) >= 0x8C {
		extra := le.Uint32(b[0x88:])
		sec += int64(extra&3) << 32
		nsec = int64(extra >> 2)
	}
	i.mtime = time.Unix(sec, nsec)
	return i
}

func (i *inode) isDir() bool     { return i.mode&modeType == modeDir }
func (i *inode) isRegular() bool { return i.mode&modeType == modeRegular }
func (i *inode) isSymlink() bool { return i.mode&modeType == modeSymlink }
func (i *inode) inline() bool    { return i.flags&flagInline != 0 }
func (i *inode) root() []byte    { return i.raw[iBlockOffset : iBlockOffset+iBlockSize] }

// inUse tells live inodes, and deleted ones that are still open (whose dtime is the next inode of the orphan list),
// from freed ones (whose dtime is a time).
func (i *inode) inUse(inodes uint32) bool {
	return i.mode != 0 && (i.links > 0 || i.dtime <= inodes)
}

// mapped says whether the inode's i_block is a map of blocks, and not a link's target, inline data or a device number.
func (i *inode) mapped() bool {
	if i.inline() {
		return false
	}
	switch i.mode & modeType {
	case modeRegular, modeDir:
		return true
	case modeSymlink:
		return i.flags&flagExtents != 0 || i.size >= iBlockSize
	}
	return i.mode&modeType == 0 && i.number < 11 // the bad-blocks inode has no type
}

func (i *inode) fileMode() fs.FileMode {
	m := fs.FileMode(i.mode & 0o777)
	switch i.mode & modeType {
	case modeDir:
		m |= fs.ModeDir
	case modeSymlink:
		m |= fs.ModeSymlink
	case modeFIFO:
		m |= fs.ModeNamedPipe
	case modeSocket:
		m |= fs.ModeSocket
	case modeChar:
		m |= fs.ModeDevice | fs.ModeCharDevice
	case modeBlock:
		m |= fs.ModeDevice
	}
	for bit, f := range map[uint16]fs.FileMode{0o4000: fs.ModeSetuid, 0o2000: fs.ModeSetgid, 0o1000: fs.ModeSticky} {
		if i.mode&bit != 0 {
			m |= f
		}
	}
	return m
}

// inlineData is the contents of an inode with inline_data: the 60 bytes of i_block, then the value of the extended
// attribute "system.data" in the inode's own tail.
func (i *inode) inlineData() []byte {
	data := append([]byte(nil), i.root()...)
	data = append(data, i.inlineTail()...)
	if i.size < int64(len(data)) {
		data = data[:i.size]
	}
	return data
}

func (i *inode) inlineTail() []byte {
	const magic, system = 0xEA020000, 7
	if len(i.raw) <= 132 {
		return nil
	}
	start := 128 + int(le.Uint16(i.raw[0x80:]))
	if start+4 > len(i.raw) || le.Uint32(i.raw[start:]) != magic {
		return nil
	}
	area := i.raw[start+4:]
	for at := 0; at+16 <= len(area); {
		n := int(area[at])
		if le.Uint32(area[at:]) == 0 || at+16+n > len(area) {
			return nil
		}
		off, inum, size := int(le.Uint16(area[at+2:])), le.Uint32(area[at+4:]), int(le.Uint32(area[at+8:]))
		if area[at+1] == system && string(area[at+16:at+16+n]) == "data" && inum == 0 {
			if size < 0 || size > len(area) || off > len(area)-size {
				return nil
			}
			return area[off : off+size]
		}
		at += (16 + n + 3) &^ 3
	}
	return nil
}
