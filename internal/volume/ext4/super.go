package ext4

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"strings"
)

// Errors that callers tell apart.
var (
	// ErrNotExt4 says that there is no ext2, ext3 or ext4 superblock.
	ErrNotExt4 = errors.New("not an ext4 file system")
	// ErrCorrupt says that the file system contradicts itself or is cut short.
	ErrCorrupt = errors.New("corrupt ext4 file system")
	// ErrTooLarge says that something is larger than the caller's or this package's cap.
	ErrTooLarge = errors.New("too large")
)

// ErrUnsupported says that the file system uses a feature that this package can't follow.
type ErrUnsupported struct{ Feature string }

func (e ErrUnsupported) Error() string { return "ext4 feature not supported: " + e.Feature }

func corrupt(format string, args ...any) error {
	return fmt.Errorf("%w: %s", ErrCorrupt, fmt.Sprintf(format, args...))
}

var le, be = binary.LittleEndian, binary.BigEndian

const (
	superOffset = 1024
	superSize   = 1024
	superMagic  = 0xEF53

	rootInode = 2

	// maxInodes leaves two bits of an index entry for the kind of block.
	maxInodes = 1 << 30
	maxBlocks = 1 << 36
)

const (
	compatHasJournal = 0x4
	compatFastCommit = 0x400

	incompatCompression = 0x1
	incompatFiletype    = 0x2
	incompatRecover     = 0x4
	incompatJournalDev  = 0x8
	incompatMetaBG      = 0x10
	incompatExtents     = 0x40
	incompat64Bit       = 0x80
	incompatMMP         = 0x100
	incompatFlexBG      = 0x200
	incompatEAInode     = 0x400
	incompatDirdata     = 0x1000
	incompatCsumSeed    = 0x2000
	incompatLargeDir    = 0x4000
	incompatInlineData  = 0x8000
	incompatEncrypt     = 0x10000
	incompatCasefold    = 0x20000

	incompatKnown = incompatFiletype | incompatRecover | incompatMetaBG | incompatExtents | incompat64Bit |
		incompatMMP | incompatFlexBG | incompatEAInode | incompatCsumSeed | incompatLargeDir | incompatInlineData |
		incompatEncrypt | incompatCasefold

	roGDTCsum      = 0x10
	roBigalloc     = 0x200
	roMetadataCsum = 0x400

	groupInodeUninit = 0x1
)

// superblock is the part of struct ext4_super_block that matters here, checked.
type superblock struct {
	blockSize      int64
	blocks         uint64
	inodes         uint32
	firstData      uint32
	blocksPerGroup uint32
	inodesPerGroup uint32
	inodeSize      int64
	descSize       int64
	firstMetaBG    uint32
	groups         uint32
	compat         uint32
	incompat       uint32
	ro             uint32
	journalInode   uint32
	reservedGDT    uint32
	uuid           [16]byte
	label          string
}

func parseSuper(b []byte, size int64) (*superblock, error) {
	if len(b) < superSize || le.Uint16(b[0x38:]) != superMagic {
		return nil, ErrNotExt4
	}
	s := &superblock{
		inodes:         le.Uint32(b),
		blocks:         uint64(le.Uint32(b[4:])),
		firstData:      le.Uint32(b[0x14:]),
		blocksPerGroup: le.Uint32(b[0x20:]),
		inodesPerGroup: le.Uint32(b[0x28:]),
		inodeSize:      128,
		descSize:       32,
		reservedGDT:    uint32(le.Uint16(b[0xCE:])),
		label:          label(b[0x78:0x88]),
	}
	copy(s.uuid[:], b[0x68:])
	if le.Uint32(b[0x4C:]) > 0 { // s_rev_level: the old revision has no features
		s.inodeSize = int64(le.Uint16(b[0x58:]))
		s.compat, s.incompat, s.ro = le.Uint32(b[0x5C:]), le.Uint32(b[0x60:]), le.Uint32(b[0x64:])
	}
	if err := s.features(b); err != nil {
		return nil, err
	}
	return s, s.geometry(b, size)
}

func (s *superblock) features(b []byte) error {
	switch {
	case s.incompat&incompatJournalDev != 0:
		return ErrUnsupported{"journal_dev: this is the external journal of another file system"}
	case s.incompat&incompatCompression != 0:
		return ErrUnsupported{"compression"}
	case s.incompat&incompatDirdata != 0:
		return ErrUnsupported{"dirdata"}
	case s.incompat&^incompatKnown != 0:
		return ErrUnsupported{fmt.Sprintf("incompat %#x", s.incompat&^incompatKnown)}
	}
	if s.incompat&incompat64Bit != 0 {
		s.blocks |= uint64(le.Uint32(b[0x150:])) << 32
		s.descSize = int64(le.Uint16(b[0xFE:]))
	}
	if s.incompat&incompatMetaBG != 0 {
		s.firstMetaBG = le.Uint32(b[0x104:])
	}
	if s.compat&compatHasJournal != 0 {
		s.journalInode = le.Uint32(b[0xE0:])
	}
	return nil
}

func (s *superblock) geometry(b []byte, size int64) error {
	shift := le.Uint32(b[0x18:])
	if shift > 6 {
		return corrupt("block size 1024<<%d", shift)
	}
	s.blockSize = 1024 << shift
	switch {
	case s.inodeSize < 128 || s.inodeSize > s.blockSize || s.inodeSize&(s.inodeSize-1) != 0:
		return corrupt("inode size %d", s.inodeSize)
	case s.descSize < 32 || s.descSize > 1024 || s.descSize&(s.descSize-1) != 0 || s.incompat&incompat64Bit != 0 && s.descSize < 64:
		return corrupt("group descriptor size %d", s.descSize)
	case s.blocksPerGroup < 256 || int64(s.blocksPerGroup) > 8*s.blockSize && s.ro&roBigalloc == 0:
		return corrupt("%d blocks per group", s.blocksPerGroup)
	case s.inodesPerGroup == 0 || int64(s.inodesPerGroup) > 8*s.blockSize:
		return corrupt("%d inodes per group", s.inodesPerGroup)
	case s.blocks <= uint64(s.firstData) || s.blocks > maxBlocks || s.firstData > 1:
		return corrupt("%d blocks, the first is %d", s.blocks, s.firstData)
	case s.inodes > maxInodes:
		return ErrUnsupported{fmt.Sprintf("%d inodes: more than %d", s.inodes, maxInodes)}
	case int64(s.blocks) > size/s.blockSize:
		return corrupt("%d blocks of %d bytes on a volume of %d bytes", s.blocks, s.blockSize, size)
	}
	groups := (s.blocks - uint64(s.firstData) + uint64(s.blocksPerGroup) - 1) / uint64(s.blocksPerGroup)
	if groups*uint64(s.inodesPerGroup) != uint64(s.inodes) {
		return corrupt("%d inodes in %d groups of %d", s.inodes, groups, s.inodesPerGroup)
	}
	s.groups = uint32(groups)
	return nil
}

// same reports whether an index built for s still fits o.
func (s *superblock) same(o *superblock) bool {
	mask := uint32(incompatRecover)
	return s.blocks == o.blocks && s.blockSize == o.blockSize && s.inodes == o.inodes && s.uuid == o.uuid &&
		s.compat&compatHasJournal == o.compat&compatHasJournal && s.incompat&^mask == o.incompat&^mask &&
		s.journalInode == o.journalInode && s.inodeSize == o.inodeSize && s.inodesPerGroup == o.inodesPerGroup
}

// kind is the name by which people call a file system with these features.
func (s *superblock) kind() string {
	switch {
	case s.incompat&^(incompatFiletype|incompatRecover|incompatMetaBG) != 0 || s.ro&^7 != 0:
		return "ext4"
	case s.compat&compatHasJournal != 0:
		return "ext3"
	}
	return "ext2"
}

// group is where one block group keeps its inodes.
type group struct {
	blockBitmap, inodeBitmap, inodeTable uint64
	used                                 uint32 // inodes that may be in use, from the first
}

func (s *superblock) tableBlocks() uint64 {
	return (uint64(s.inodesPerGroup)*uint64(s.inodeSize) + uint64(s.blockSize) - 1) / uint64(s.blockSize)
}

// descBlock is the block of the n-th block of group descriptors.
func (s *superblock) descBlock(n uint32) uint64 {
	if s.incompat&incompatMetaBG == 0 || n < s.firstMetaBG {
		return uint64(superOffset/s.blockSize) + 1 + uint64(n)
	}
	first := n * uint32(s.blockSize/s.descSize) // the meta group's first group
	b := uint64(s.firstData) + uint64(first)*uint64(s.blocksPerGroup)
	if s.ro&1 == 0 || isPowerGroup(first) {
		b++ // behind the group's copy of the superblock
	}
	if n == 0 && s.blockSize == 1024 && s.firstData == 0 {
		b++ // bigalloc counts the boot block
	}
	return b
}

// isPowerGroup says whether a sparse_super file system keeps a superblock copy in group g.
func isPowerGroup(g uint32) bool {
	if g <= 1 {
		return true
	}
	for _, p := range []uint32{3, 5, 7} {
		n := p
		for n < g {
			n *= p
		}
		if n == g {
			return true
		}
	}
	return false
}

func (s *superblock) readGroups(v *view) ([]group, error) {
	per := uint32(s.blockSize / s.descSize)
	groups := make([]group, 0, min(s.groups, 1<<16))
	buf := make([]byte, s.blockSize)
	for g := uint32(0); g < s.groups; g++ {
		if g%per == 0 {
			if err := v.block(s.descBlock(g/per), buf); err != nil {
				return nil, fmt.Errorf("group descriptors: %w", err)
			}
		}
		d, err := s.parseGroup(buf[int64(g%per)*s.descSize:])
		if err != nil {
			return nil, fmt.Errorf("group %d: %w", g, err)
		}
		groups = append(groups, d)
	}
	return groups, nil
}

func (s *superblock) parseGroup(d []byte) (group, error) {
	g := group{blockBitmap: uint64(le.Uint32(d)), inodeBitmap: uint64(le.Uint32(d[4:])), inodeTable: uint64(le.Uint32(d[8:]))}
	unused := uint32(le.Uint16(d[0x1C:]))
	if s.descSize >= 64 {
		g.blockBitmap |= uint64(le.Uint32(d[0x20:])) << 32
		g.inodeBitmap |= uint64(le.Uint32(d[0x24:])) << 32
		g.inodeTable |= uint64(le.Uint32(d[0x28:])) << 32
		unused |= uint32(le.Uint16(d[0x32:])) << 16
	}
	if g.inodeTable <= uint64(s.firstData) || g.inodeTable+s.tableBlocks() > s.blocks || g.inodeTable > s.blocks {
		return g, corrupt("inode table at block %d", g.inodeTable)
	}
	g.used = s.inodesPerGroup
	if s.ro&(roGDTCsum|roMetadataCsum) != 0 {
		if unused <= s.inodesPerGroup {
			g.used -= unused
		}
		if le.Uint16(d[0x12:])&groupInodeUninit != 0 {
			g.used = 0
		}
	}
	return g, nil
}

func label(b []byte) string {
	s, _, _ := strings.Cut(string(b), "\x00")
	return strings.ToValidUTF8(s, "?")
}

func formatUUID(u []byte) string {
	return fmt.Sprintf("%x-%x-%x-%x-%x", u[0:4], u[4:6], u[6:8], u[8:10], u[10:16])
}

// view reads blocks as of one instant: what the journal holds for a block wins over what lies in its place.
type view struct {
	r      io.ReaderAt
	off    int64
	bs     int64
	blocks uint64
	limit  uint64              // blocks of the volume: a journal may speak of those that a resize adds
	layers []map[uint64]logged // nearest last
	log    *journal
}

// logged says where the journal has a block's newest contents.
type logged struct {
	index  uint32
	escape bool // its first four bytes were the journal's magic, and are zero in the log
	data   bool // the block is a file's (data=journal)
}

func (v *view) raw(b uint64, buf []byte) error {
	if b >= v.blocks {
		return corrupt("block %d of %d", b, v.blocks)
	}
	n, err := v.r.ReadAt(buf[:v.bs], v.off+int64(b)*v.bs)
	if n == int(v.bs) {
		return nil
	}
	if err == nil || errors.Is(err, io.EOF) {
		err = io.ErrUnexpectedEOF
	}
	return fmt.Errorf("block %d: %w", b, err)
}

func (v *view) lookup(b uint64) (logged, bool) {
	for i := len(v.layers) - 1; i >= 0; i-- {
		if l, ok := v.layers[i][b]; ok {
			return l, true
		}
	}
	return logged{}, false
}

func (v *view) block(b uint64, buf []byte) error {
	if l, ok := v.lookup(b); ok && b < v.blocks {
		return v.log.copyOf(l, buf)
	}
	return v.raw(b, buf)
}

// run reads n successive blocks with as few reads as it can.
func (v *view) run(b uint64, n int, buf []byte) error {
	if b >= v.blocks || uint64(n) > v.blocks-b {
		return corrupt("blocks %d+%d of %d", b, n, v.blocks)
	}
	want := n * int(v.bs)
	got, err := v.r.ReadAt(buf[:want], v.off+int64(b)*v.bs)
	if got < want {
		if err == nil || errors.Is(err, io.EOF) {
			err = io.ErrUnexpectedEOF
		}
		return fmt.Errorf("block %d: %w", b, err)
	}
	for i := range n {
		if l, ok := v.lookup(b + uint64(i)); ok {
			if err := v.log.copyOf(l, buf[int64(i)*v.bs:]); err != nil {
				return err
			}
		}
	}
	return nil
}

// under is the same view with one more layer on top.
func (v *view) under(top map[uint64]logged) *view {
	w := *v
	w.layers = append(append([]map[uint64]logged{}, v.layers...), top)
	return &w
}
